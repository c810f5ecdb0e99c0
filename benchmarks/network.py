"""vocab_parallel_gated_ce across hosts, beside Megatron-Core's cross-entropy: latency and loss.

    python benchmarks/network.py            some minutes on two cores, as root
    python benchmarks/network.py --page     put the table into docs/scaling.md
    python benchmarks/network.py --check    exits with 1 if that would change the page

Two processes of one thread, each on a host of its own (harness/hosts.py), share the vocabulary over
gloo. On each wire the loss and its gradient are compared with those of one process, and a step of
every contender is timed. Writes network.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from contenders.cases import Case
from contenders.contender import Contender
from contenders.shards import CONTENDERS, FUSED, INPLACE, peer_version
from harness import hosts, lockstep
from harness.command import parser_of
from harness.device import Cpu
from harness.fresh_processes import measure_in
from harness.machine import FOLDER, ROOT, describe
from harness.timing import TOTAL
from reports.pages import fill
from reports.tables import number, table
from torch import distributed as dist

import eaft_ext

FILE = FOLDER / "network.json"
PAGE = ROOT / "docs" / "scaling.md"
CASE = Case(64, 50_304, "float32")
NAMES = [c.name for c in CONTENDERS if c.name not in (INPLACE, FUSED)]
# Milliseconds from host to host, and the share of packets that is lost.
WIRES = ((0.0, 0.0), (0.1, 0.0), (1.0, 0.0), (5.0, 0.0), (1.0, 0.01))
SECONDS = 600


def error(case: Case, _: list[Contender], __: argparse.Namespace) -> dict[str, float]:
    """How far this process's loss and gradient are from those of one process with all logits."""
    batch = case.batch(torch.Generator().manual_seed(0))
    whole = batch.logits.requires_grad_()
    shard = whole.detach().chunk(dist.get_world_size(), -1)[dist.get_rank()].clone()
    expected = eaft_ext.gated_ce(whole, batch.labels)
    expected.backward()
    found = eaft_ext.vocab_parallel_gated_ce(
        shard.requires_grad_(), batch.labels, group=dist.group.WORLD
    )
    found.backward()
    assert whole.grad is not None and shard.grad is not None
    wanted = whole.grad.chunk(dist.get_world_size(), -1)[dist.get_rank()]
    of_gradient = (shard.grad - wanted).norm() / wanted.norm()
    return {"loss": abs(found.item() / expected.item() - 1), "gradient": of_gradient.item()}


def on_host(rank: int, what: Any, request: lockstep.Request) -> Iterator[Any]:
    """One process, on its host."""
    hosts.enter(rank)
    yield from lockstep.measure(rank, what, request)


def measure(latency: float, loss: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """What is found on a wire of so many milliseconds."""
    names = [c.name for c in CONTENDERS if c.name in NAMES and (peer_version() or not c.module)]
    environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": hosts.DEVICE}
    found: dict[str, Any] = {"latency_ms": latency, "loss": loss}
    with hosts.joined(latency / 1e3, loss):
        for what in (error, lockstep.measure_times):
            with hosts.inside(0):
                place = (hosts.address(0), 0)
                store = dist.TCPStore(*place, is_master=True, wait_for_workers=False)
            request = lockstep.Request((place[0], store.port), [(CASE, names)], arguments)
            each, reason = measure_in(
                len(hosts.HOSTS), environment, on_host, what, request, SECONDS
            )
            if reason:
                sys.exit(f"{latency} ms, {loss:.0%} lost: {reason}")
            found[what.__name__] = [answers[0] for answers in each]
    return found


def block() -> str:
    """The table: a row for each wire."""
    results = json.loads(FILE.read_text())
    titles = {c.name: c.title for c in CONTENDERS}
    head = ["from host to host", *(titles[name] for name in NAMES), "off from one process"]
    rows = []
    for wire in results["wires"]:
        ranks = [found["seconds"] for found in wire["measure_times"]]
        cells = [
            f"{wire['latency_ms']} ms" + (f", {wire['loss']:.0%} lost" if wire["loss"] else "")
        ]
        for name in NAMES:
            # The slowest counts, step by step.
            steps = [
                max(times) for times in zip(*(rank[name][TOTAL] for rank in ranks), strict=True)
            ]
            cells.append(f"{number(1e3 * statistics.median(steps))} ms")
        worst = max(one["gradient"] for one in wire["error"])
        rows.append([*cells, f"{worst:.0e}"])
    machine, case = results["machine"], Case(**results["case"])
    steps = f"medians of {results['repeats']} steps, forward and backward"
    return (
        f"{machine['model']}, {machine['cores']} cores; {case}; {steps}; Megatron-Core "
        f"{machine['megatron_core']}.\n\n{table(head, rows)}"
    )


def main() -> None:
    """Measure, or write or check the page."""
    parser = parser_of(__doc__)
    parser.add_argument("--repeats", type=int, default=51, help="steps (default: %(default)s)")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--page", action="store_true", help="put the table into docs/scaling.md")
    group.add_argument("--check", action="store_true", help="exit with 1 if that would change it")
    arguments = parser.parse_args()
    if not (arguments.page or arguments.check):
        if reason := hosts.why_not():
            sys.exit(f"network.py {reason}")
        arguments.world_size, arguments.seconds = len(hosts.HOSTS), SECONDS
        arguments.quick = True  # no more batches than a step needs
        results = {
            "machine": describe(Cpu()) | {"megatron_core": peer_version()},
            "case": asdict(CASE),
            "repeats": arguments.repeats,
            "wires": [],
        }
        for wire in WIRES:
            results["wires"].append(measure(*wire, arguments))
            FILE.write_text(json.dumps(results, indent=1) + "\n")
        print(block())
        return
    text = PAGE.read_text()
    new = fill(text, "network", block(), PAGE.name)
    if arguments.check:
        if new != text:
            sys.exit(f"{PAGE.name} is not what {FILE.name} makes it: --page does that")
        return
    PAGE.write_text(new)


if __name__ == "__main__":
    main()
