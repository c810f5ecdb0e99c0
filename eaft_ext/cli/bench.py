"""``eaft-ext bench``: time and memory of the loss on this machine, beside PyTorch's own.

The first look; benchmarks/ of the repository measures with more care, and beside other libraries.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import eaft_ext

from .batches import IGNORE_INDEX
from .errors import CommandError
from .options import add_k_and_device, default_device, number_from, positive_int

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOKENS = {"cpu": 512}
TOKENS_ELSEWHERE = 8192
MIB = 2**20


@dataclass
class Contender:
    """A loss of (logits, labels), or the copy; seconds of each call and peak bytes beyond inputs.

    ``failure`` says why there are none.
    """

    title: str
    loss: Callable[[Tensor, Tensor], Tensor] | None
    overwrites: bool = False
    seconds: list[float] = field(default_factory=list)
    peak: int | None = None
    value: float | None = None
    failure: str = ""


def eager_eaft(logits: Tensor, labels: Tensor, k: int = 20) -> Tensor:
    """EAFT's loss as training frameworks write it: the kernels' formula, operation by operation.

    They also gather the rows that are not ignored, which copies the logits once more; left out.
    """
    return eager_eaft_sum(logits, labels, k) / (labels != IGNORE_INDEX).sum()


def eager_eaft_sum(logits: Tensor, labels: Tensor, k: int = 20) -> Tensor:
    """The same, not yet divided by the number of labels that are not ignored."""
    logits, k = logits.float(), min(k, logits.size(-1))
    nll = cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="none")
    with torch.no_grad():
        top = logits.topk(k, dim=-1).values
        log_q = top - top.logsumexp(dim=-1, keepdim=True)
        entropy = -(log_q.exp() * log_q).sum(dim=-1)
        weight = entropy / math.log(k)
    return (weight * nll).sum()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``eaft-ext bench``."""
    add = parser.add_argument
    default = " (default: %(default)s)"
    add("--tokens", type=positive_int, metavar="N", help="default: 512 on a CPU, 8192 elsewhere")
    add(
        "--vocabulary",
        type=_vocabulary,
        default=151_936,
        metavar="V",
        help="columns of the logits" + default,
    )
    add("--dtype", choices=DTYPES, help="default: float32 on a CPU, bfloat16 elsewhere")
    add("--rounds", type=positive_int, default=10, metavar="N", help="calls of each" + default)
    add_k_and_device(parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure, and print a table."""
    on = torch.device(arguments.device or default_device())
    num_tokens = arguments.tokens or TOKENS.get(on.type, TOKENS_ELSEWHERE)
    dtype = DTYPES[arguments.dtype or ("float32" if on.type == "cpu" else "bfloat16")]
    found = contenders(arguments.k)
    try:
        measure(found, num_tokens, arguments.vocabulary, dtype, on, arguments.rounds)
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        raise CommandError(
            f"{num_tokens} tokens of {arguments.vocabulary} words do not fit on {on}: pass fewer "
            f"--tokens"
        ) from None
    name = torch.cuda.get_device_name(on) if on.type == "cuda" else f"{on}"
    threads = f", {torch.get_num_threads()} threads" if on.type == "cpu" else ""
    print(
        f"{name}{threads}, torch {torch.__version__}, eaft_ext {eaft_ext.__version__}; logits "
        f"{num_tokens} x {arguments.vocabulary} {str(dtype).removeprefix('torch.')}, k = "
        f"{arguments.k}; forward and backward, median of {arguments.rounds}"
    )
    print("\n".join(table(found)))
    return 0


def contenders(k: int) -> list[Contender]:
    """Return what is compared; the copy of the logits is what a read and a write cost."""

    def gated(**options: Any) -> Callable[[Tensor, Tensor], Tensor]:
        def loss(logits: Tensor, labels: Tensor) -> Tensor:
            value: Tensor = eaft_ext.gated_ce(logits, labels, k, **options)
            return value

        return loss

    return [
        Contender("copy of the logits", None),
        Contender("gated_ce", gated()),
        Contender("gated_ce, in place", gated(inplace_backward=True), overwrites=True),
        Contender("gated_ce, gradient in forward", gated(gradient_in_forward=True)),
        Contender("F.cross_entropy (no gate)", cross_entropy),
        Contender("eager EAFT", lambda logits, labels: eager_eaft(logits, labels, k)),
    ]


def measure(
    found: list[Contender],
    num_tokens: int,
    vocab_size: int,
    dtype: torch.dtype,
    on: torch.device,
    rounds: int,
) -> None:
    """Call each in turn, a round more than is counted, on logits as of a language model."""
    generator = torch.Generator(on).manual_seed(0)
    shape = (num_tokens, vocab_size)
    logits = torch.randn(shape, generator=generator, device=on).mul_(3).to(dtype)
    labels = torch.randint(vocab_size, shape[:1], generator=generator, device=on)
    workspace = logits.clone()
    for number in range(rounds + 1):
        for contender in found:
            if contender.failure:
                continue
            source = logits
            if contender.overwrites:
                source = workspace.copy_(logits)
            try:
                seconds = _call(contender, source, labels, workspace)
            except RuntimeError as error:
                if not _is_out_of_memory(error):
                    raise
                contender.failure = "out of memory"
                continue
            if number > 0:
                contender.seconds.append(seconds)


def _call(contender: Contender, source: Tensor, labels: Tensor, workspace: Tensor) -> float:
    """Call a contender once; return the seconds, and leave loss and peak in it."""
    leaf = source.detach().requires_grad_()
    on_gpu = source.is_cuda
    _wait(source)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(source.device)
        before = torch.cuda.memory_allocated(source.device)
    begin = time.perf_counter()
    if contender.loss is None:
        workspace.copy_(source)
    else:
        loss = contender.loss(leaf, labels)
        torch.autograd.backward(loss)
    _wait(source)
    seconds = time.perf_counter() - begin
    if on_gpu:
        contender.peak = torch.cuda.max_memory_allocated(source.device) - before
    if contender.loss is not None:
        contender.value = loss.item()
    return seconds


def _is_out_of_memory(error: RuntimeError) -> bool:
    messages = ("can't allocate memory", "out of memory", "size calculation overflowed")
    return any(message in str(error) for message in messages)


def _wait(tensor: Tensor) -> None:
    if tensor.device.type != "cpu":
        torch.accelerator.synchronize(tensor.device)


def table(found: list[Contender]) -> list[str]:
    """Return the lines of a table."""
    ours = next(contender for contender in found if contender.title == "gated_ce")
    head = ["", "ms", "x gated_ce", "peak MiB", "loss"]
    rows = [head]
    for contender in found:
        if not contender.seconds:
            rows.append([contender.title, contender.failure or "-", "-", "-", "-"])
            continue
        seconds = statistics.median(contender.seconds)
        times = f"{seconds / statistics.median(ours.seconds):.2f}" if ours.seconds else "-"
        peak = "-" if contender.peak is None else f"{contender.peak / MIB:.1f}"
        value = "-" if contender.value is None else f"{contender.value:.6f}"
        rows.append([contender.title, f"{1e3 * seconds:.2f}", times, peak, value])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]


def _vocabulary(text: str) -> int:
    return number_from(2, text)
