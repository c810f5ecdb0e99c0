"""Tables of what the loss costs on 1 to 1,024 GPUs, by the model of costs.py: nothing is measured.

python benchmarks/cost_model.py            prints them
python benchmarks/cost_model.py --write    puts them into docs/scaling.md
python benchmarks/cost_model.py --check    exits with 1 if that would change the page
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

from reports import costs
from reports.costs import Call, Collective, Cost
from reports.pages import fill
from reports.tables import number, table

PAGE = Path(__file__).resolve().parent.parent / "docs" / "scaling.md"

WORDS, HIDDEN, SEQUENCE, LAYERS = 151_936, 4_096, 16_384, 32
# Parameters of a layer, in squares of the hidden.
LAYER_SQUARES = 12
# Of an H100: bytes a second of memory, as docs/performance.md has it, and of NVLink in one
# direction; operations a second in bfloat16.
MEMORY, LINK, OPERATIONS = 3.0e12, 450e9, 989e12
KILO, MEBI = 1e3, 2**20
MS, MICRO, NS = 1e3, 1e6, 1e9


class Division(NamedTuple):
    """How GPUs divide a model and its tokens."""

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    data: int = 1

    @property
    def gpus(self) -> int:
        """All of them."""
        return self.tensor * self.pipeline * self.context * self.data

    def __str__(self) -> str:
        names = ("TP", "PP", "CP", "DP")
        parts = [f"{name} {n}" for name, n in zip(names, self, strict=True) if n > 1]
        return " · ".join(parts) or "none"

    def call(self) -> Call:
        """That of a GPU of the last stage, for a micro-batch of one sequence."""
        return Call(SEQUENCE // self.context, WORDS, HIDDEN, processes=self.tensor)


DIVISIONS = (
    Division(),
    Division(data=8),
    Division(tensor=8),
    Division(tensor=8, context=2, data=4),
    Division(tensor=8, pipeline=4, context=2, data=8),
    Division(tensor=8, pipeline=4, context=4, data=8),
)
ALONE, SHARED = Division().call(), Division(tensor=8).call()


def default_chunk(call: Call) -> int:
    """Tokens that ``linear_gated_ce`` takes at a time on a GPU."""
    import torch

    from eaft_ext.linear._chunks import default_chunk_size

    return default_chunk_size(call.tokens, call.columns * call.item, torch.device("cuda"))


def linear(call: Call, sequence: bool = False) -> Cost:
    """The linear loss in chunks of the default size."""
    return costs.linear_loss(call, default_chunk(call), sequence=sequence)


def received(cost: Cost, call: Call) -> float:
    """Bytes over this GPU's link, forward and backward."""
    sent = (*cost.sent_forward, *cost.sent_backward)
    return sum(collective.received(call.processes) for collective in sent)


def floor(cost: Cost, call: Call) -> float:
    """Seconds that memory and link take for these bytes, one after the other."""
    return cost.moved / MEMORY + received(cost, call) / LINK


def times() -> str:
    """Of each division: what a token moves, and the floors of a call."""
    rows = []
    for division in DIVISIONS:
        call = division.call()
        ours, eager = costs.logits_loss(call), costs.eager_loss(call)
        row = [f"{division.gpus:,}", str(division), f"{call.tokens:,}", f"{call.columns:,}"]
        for cost in (ours, eager):
            row += [
                number(cost.moved / call.tokens / KILO),
                number(received(cost, call) / call.tokens / KILO),
                number(MS * floor(cost, call)),
            ]
        rows.append(row)
    head = ["GPUs", "divided by", "tokens a call", "words a GPU"]
    for name in ("`gated_ce`", "eager"):
        figures = ("KB a token in memory", "KB a token received", "ms a call, at least")
        head += [f"{name}: {figure}" for figure in figures]
    return table(head, rows)


def memory() -> str:
    """Of each division: what is allocated in a GPU at once."""
    rows = []
    for division in DIVISIONS:
        call = division.call()
        fused = linear(call)
        peaks = [
            call.logits,
            costs.logits_loss(call).peak,
            costs.logits_loss(call, in_place=True).peak,
            costs.eager_loss(call).peak,
            fused.peak - fused.kept,
        ]
        row = [f"{division.gpus:,}", str(division), *(number(peak / MEBI) for peak in peaks)]
        rows.append(row)
    head = ["GPUs", "divided by", "logits", "`gated_ce` beside them", "the same in place"]
    return table([*head, "eager beside them", "`linear_gated_ce` instead of them"], rows)


def token() -> str:
    """Of a token in each form, alone and with eight processes that share the vocabulary."""
    rows = []
    for call in (ALONE, SHARED):
        forms = {
            "`gated_ce`": costs.logits_loss(call),
            "`gated_ce`, gradient in forward": costs.logits_loss(call, in_forward=True),
            "eager EAFT": costs.eager_loss(call),
            "output layer": costs.output_layer(call),
            "`linear_gated_ce`": linear(call),
        }
        for name, cost in forms.items():
            if call.processes > 1 and "in forward" in name:
                continue  # which shards do not have
            each = (cost.forward, cost.backward, cost.moved, cost.kept, cost.peak)
            figures = (number(n / call.tokens / KILO) for n in each)
            rows.append([f"{name}, TP {call.processes}", *figures])
    head = ["KB a token", "read and written forward", "backward", "both"]
    head += ["kept for the backward", "allocated at most"]
    cost = linear(ALONE)
    each = number(MICRO * cost.moved / MEMORY / ALONE.tokens)
    products = number(MICRO * cost.products / OPERATIONS / ALONE.tokens)
    return (
        table(head, rows)
        + "\n\nThe linear loss moves more than one of logits, since each chunk adds to the weight's"
        f" gradient. On one GPU that is {each} µs a token at least, and its three products are "
        f"{products} µs: what it saves is memory."
    )


def collectives() -> str:
    """Of all calls in which there are some, with TP 8."""
    call = SHARED
    rows_too = costs.rows_divided(costs.logits_loss(call))
    forms = {
        "`vocab_parallel_gated_ce`": costs.logits_loss(call),
        "`vocab_parallel_linear_gated_ce`": linear(call),
        "the same, `reduce_hidden_gradient=False`": costs.linear_loss(
            call, default_chunk(call), reduce_hidden=False
        ),
        "the same under sequence parallelism": linear(call, sequence=True),
        "`gated_ce` of DTensors, rows divided too": rows_too,
        "eager EAFT of gathered logits": costs.eager_loss(call),
    }
    rows = []
    for name, cost in forms.items():
        directions = {"forward": cost.sent_forward, "backward": cost.sent_backward}
        for direction, sent in directions.items():
            rows += [[name, direction, *_collective(each, call)] for each in sent]
    head = ["call", "in the", "collective", "group", "how many", "bytes brought", "whose"]
    return table(head, rows)


def _collective(collective: Collective, call: Call) -> list[str]:
    given = f"{collective.given} in all"
    if collective.group == "vocabulary":
        given = f"{collective.given / call.tokens:,.0f} a token"
    whose = "ours" if collective.ours else "the stack's"
    name = collective.name.replace("_", "-")
    return [name, collective.group, str(collective.count), given, whose]


def last_stage() -> str:
    """What the loss is worth beside a layer of the transformer, by their floors."""
    rows = []
    parameters = LAYER_SQUARES * HIDDEN**2
    for call in (ALONE, SHARED):
        layer = 6 * call.tokens * parameters / call.processes / OPERATIONS
        products = costs.output_layer(call).products / OPERATIONS
        ours, eager = (floor(loss(call), call) for loss in (costs.logits_loss, costs.eager_loss))
        row = [f"TP {call.processes}", number(NS * layer / call.tokens)]
        row += [number(seconds / layer) for seconds in (products, ours, eager)]
        rows.append(row)
    head = ["", "a layer, ns a token", "output layer, in layers", "`gated_ce`", "eager EAFT"]
    return (
        f"A layer has {LAYER_SQUARES} H² parameters here; floors, forward and backward.\n\n"
        + table(head, rows)
        + f"\n\nThe output layer is worth V / {LAYER_SQUARES} H layers, however it is divided: "
        "give the last stage so many less."
    )


def setting() -> str:
    """What the tables are of."""
    return (
        f"A model of {WORDS:,} words and a hidden of {HIDDEN:,} in bfloat16, k = {ALONE.k}; one "
        f"sequence of {SEQUENCE:,} tokens a micro-batch. Floors: {MEMORY / 1e12:.1f} TB/s of "
        f"memory, {LINK / 1e9:.0f} GB/s into a GPU over its link, {OPERATIONS / 1e12:.0f} TFLOP/s, "
        "nothing overlapping, no latency. **A model: no GPU has run this.**"
    )


def notes() -> str:
    """What the first call of a group writes beside its collectives."""
    return (
        "Before a group's first call, and over gloo before each, a process writes a note of at "
        f"most {costs.NOTE_BYTES:,} bytes into the store of torch.distributed and reads those of "
        "the others: no collective."
    )


BLOCKS = {
    "setting": setting,
    "times": times,
    "memory": memory,
    "token": token,
    "collectives": collectives,
    "notes": notes,
    "last-stage": last_stage,
}


def main() -> None:
    """Print, write or check."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--page", type=Path, default=PAGE, help="default: docs/scaling.md")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--write", action="store_true", help="put the tables into the page")
    group.add_argument("--check", action="store_true", help="exit with 1 if that would change it")
    arguments = parser.parse_args()
    blocks = {name: make() for name, make in BLOCKS.items()}
    if not (arguments.write or arguments.check):
        print("\n\n".join(blocks.values()))
        return
    text = new = arguments.page.read_text()
    for name, block in blocks.items():
        new = fill(new, f"scaling-model:{name}", block, arguments.page.name)
    if arguments.write:
        arguments.page.write_text(new)
    elif new != text:
        sys.exit(f"{arguments.page} does not show what the model says: --write does that")


if __name__ == "__main__":
    main()
