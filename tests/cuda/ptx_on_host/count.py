"""Counts what the compiled kernels do, and writes it into docs/performance.md.

    python tests/cuda/ptx_on_host/count.py            writes the table
    python tests/cuda/ptx_on_host/count.py --check    exits with 1 if that would change it

Needs nvcc and a C++ compiler, and no GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

if __name__ == "__main__":
    _CUDA = Path(__file__).resolve().parents[1]
    sys.path[:0] = [str(_CUDA), str(_CUDA.parent / "support")]

import kernels_on_host
from cuda_on_host.build import CSRC
from nvcc import nvcc
from ptx_on_host import compiled

ARCHITECTURE = "sm_90"
PAGE = CSRC.parent / "docs" / "performance.md"
BEGIN, END = "<!-- counts:ptx -->", "<!-- /counts:ptx -->"

VOCAB_SIZE = 151_936
NUM_ROWS = 4
SECTOR = 32  # bytes
LANES = 32
CLASSES = ("integer", "float32", "float64", "special", "memory", "other")
GATE = ("entropy", [1.0], -100)

# Multiprocessors, GHz, and the TB/s that a kernel reaches, as docs/performance.md takes them; of
# the B200, 0.9 of what its data sheet says.
GPUS = {"H100": (132, 1.7, 3.0), "H200": (132, 1.7, 4.3), "B200": (148, 1.8, 0.9 * 8.0)}


def rows(num_rows: int = NUM_ROWS, vocab_size: int = VOCAB_SIZE) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(num_rows, vocab_size, generator=generator).to(torch.bfloat16)
    return logits, torch.randint(0, vocab_size, (num_rows,), generator=generator)


def misaligned() -> tuple[Tensor, Tensor]:
    """Every row begins elsewhere within 16 bytes, and ends raggedly."""
    return rows(vocab_size=VOCAB_SIZE - 3)


def ascending() -> tuple[Tensor, Tensor]:
    logits, labels = rows()
    return logits.sort(dim=1).values, labels


Family = Sequence[float]
SCALED, CAPPED, SMOOTHED = (0.0, 0.5, 0.0, 0.0), (30.0, 1.0, 0.0, 0.0), (0.0, 1.0, 0.1, 0.0)


def forward(logits: Tensor, labels: Tensor, num_spans: int = 1, family: Family = ()) -> None:
    kernels_on_host.forward(logits, labels, 20, *GATE, num_spans=num_spans, family=family)


def exact(logits: Tensor, labels: Tensor) -> None:
    kernels_on_host.forward(logits, labels, 0, *GATE)


def beside(logits: Tensor, labels: Tensor) -> None:
    kernels_on_host.forward(logits, labels, 20, *GATE, num_extra=3)


def backward(logits: Tensor, labels: Tensor, family: Family = ()) -> None:
    row_max = logits.float().amax(1)
    log_sum = (logits.float() - row_max[:, None]).exp().sum(1).log()
    weight = torch.ones(len(labels))
    saved = (row_max, log_sum, -100)
    kernels_on_host.backward(weight, logits, labels, *saved, family=family, upstream=weight)


def with_grad(logits: Tensor, labels: Tensor, cluster_size: int) -> None:
    upstream = torch.ones(len(labels))
    options = {"cluster_size": cluster_size}
    kernels_on_host.forward_with_grad(upstream, logits, labels, 20, *GATE, **options)


def topk(logits: Tensor, labels: Tensor) -> None:
    kernels_on_host.topk(logits, 20)


Case = tuple[str, Callable[[], tuple[Tensor, Tensor]], Callable[[Tensor, Tensor], None]]
CASES: list[Case] = [
    ("forward", rows, forward),
    ("forward, misaligned rows", misaligned, forward),
    ("forward, ascending rows: the list overflows", ascending, forward),
    ("forward, 1 row in 16 spans", lambda: rows(1), lambda x, y: forward(x, y, 16)),
    ("forward, k = None", rows, exact),
    ("forward, the entropy of all logits beside that of k", rows, beside),
    ("forward, a logit scale", rows, lambda x, y: forward(x, y, family=SCALED)),
    ("forward, a soft cap", rows, lambda x, y: forward(x, y, family=CAPPED)),
    ("forward, label smoothing", rows, lambda x, y: forward(x, y, family=SMOOTHED)),
    ("backward", rows, backward),
    ("backward, a soft cap", rows, lambda x, y: backward(x, y, CAPPED)),
    ("backward, label smoothing", rows, lambda x, y: backward(x, y, SMOOTHED)),
    ("backward, misaligned rows", misaligned, backward),
    ("forward with gradient, clusters of 4", rows, lambda x, y: with_grad(x, y, 4)),
    ("the same, misaligned rows", misaligned, lambda x, y: with_grad(x, y, 4)),
    ("forward with gradient, from L2", rows, lambda x, y: with_grad(x, y, 0)),
    ("topk", rows, topk),
]


def counting_code() -> compiled.Compiled:
    """The kernels for bfloat16."""
    return compiled.load(ARCHITECTURE, counting=True, only="13__nv_bfloat16")


def row_of(name: str, counts: Counter[str], logits: Tensor) -> str:
    """A line of the table."""
    size = logits.numel() * logits.element_size()
    read = SECTOR * counts["global_load_sectors"] + counts["copied_bytes"]
    touched = SECTOR * counts["global_load_touched"] + counts["copied_bytes"]
    written = SECTOR * counts["global_store_sectors"]
    threads = {c: counts[f"instructions_{c}"] for c in CLASSES}
    warps = sum(counts[f"warp_instructions_{c}"] for c in CLASSES)
    by_class = " + ".join(
        f"{threads[c] / logits.numel():.1f}" for c in ("integer", "float32", "float64", "special")
    )
    conflicts = counts["shared_load_conflicts"] + counts["shared_store_conflicts"]
    wavefronts = counts["shared_load_wavefronts"] + counts["shared_store_wavefronts"]
    cells = [
        f"{touched / size:.3f}",
        f"{read / size:.3f}",
        f"{written / size:.3f}",
        f"{LANES * warps / logits.numel():.1f}",
        by_class,
        f"{100 * sum(threads.values()) / (LANES * warps):.0f} %",
        f"{100 * conflicts / wavefronts:.0f} %" if wavefronts else "",
        f"{counts['atomics'] / len(logits):.0f}",
        f"{counts['barriers'] / len(logits):.0f}",
    ]
    return f"| {name} | {' | '.join(cells)} |"


def table() -> str:
    """Of bfloat16 logits, k = 20."""
    code = counting_code()
    kernels_on_host.code = code
    columns = ["read", "with re-reads", "written", "instructions", "integer + f32 + f64 + special"]
    columns += ["active lanes", "bank conflicts", "atomics a row", "barriers a row"]
    lines = [f"| {VOCAB_SIZE:,} bfloat16, {ARCHITECTURE} | {' | '.join(columns)} |"]
    lines.append("|---|" + "---:|" * len(columns))
    for name, make, run in CASES:
        logits, labels = make()
        run(logits, labels)
        counts: Counter[str] = Counter()
        for found in code.take_counts().values():
            counts.update(found)
        lines.append(row_of(name, counts, logits))
    floors = []
    for gpu, (multiprocessors, gigahertz, terabytes) in GPUS.items():
        started = multiprocessors * 4 * LANES * gigahertz * 1e9  # instructions of threads a second
        read = terabytes * 1e12 / torch.bfloat16.itemsize  # elements a second
        floors.append(f"{gpu} {started / read:.0f}")
    lines += ["", f"Instructions an element for which reading it leaves time: {', '.join(floors)};"]
    lines.append("where it is also written, twice as many.")
    return "\n".join(lines)


def main() -> None:
    """Write or check the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit with 1 if it would change")
    check = parser.parse_args().check
    if nvcc() is None:
        sys.exit("no nvcc: it is what is counted")
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    new = f"{before}{BEGIN}\n{table()}\n{END}{after}"
    if check and new != text:
        sys.exit(f"{PAGE} does not show what is counted")
    PAGE.write_text(new)


if __name__ == "__main__":
    main()
