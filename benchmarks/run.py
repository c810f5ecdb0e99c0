"""Benchmarks of gated_ce on the CPU: time side by side, peak memory, cores in use.

    python benchmarks/run.py                 all cases, about four minutes on two cores
    python benchmarks/run.py --quick         one small shape, a smoke test

Writes <machine>.json with every single time, and <machine>.csv and <machine>.md made from it.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from cases import DTYPES, QUICK_SHAPES, SHAPES, Case, Rotation
from contenders import CONTENDERS, Contender, Runner
from device import Cpu, Device
from machine import describe, file_stem, load
from memory import measure_peaks
from report import csv_text, markdown
from results import FOLDER, Result
from timing import time_once, time_side_by_side
from utilisation import measure_utilisation

# So few rows that one for each thread would leave cores idle.
FEW_ROWS = 8
WARM_UP = 2
MIN_SECONDS = 3.0


def shape(text: str) -> tuple[int, int]:
    """ROWSxVOCABULARY, such as 512x151936."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 512x151936")
    return int(match[1]), int(match[2])


def positive(text: str) -> int:
    """An integer from 1."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def parse() -> argparse.Namespace:
    """The command line."""
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--shapes", type=shape, nargs="+", metavar="NxV", help="rows x vocabulary, any number"
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--repeats", type=positive, help="rounds of each case (default 15)")
    parser.add_argument(
        "--quick", action="store_true", help="one small shape, few rounds, without torch.compile"
    )
    parser.add_argument(
        "--output", type=Path, default=FOLDER, metavar="DIR", help="default: benchmarks/results"
    )
    arguments = parser.parse_args()
    arguments.shapes = arguments.shapes or (QUICK_SHAPES if arguments.quick else SHAPES)
    arguments.repeats = arguments.repeats or (3 if arguments.quick else 15)
    return arguments


def warmed_up(contender: Contender, rotation: Rotation, device: Device) -> Runner | None:
    """The contender after a few calls, None if it fails here (torch.compile needs a compiler)."""
    try:
        runner = Runner(contender)
        for _ in range(WARM_UP):
            time_once(runner, rotation, device)
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "")
        print(f"  without {contender.name}: {type(error).__name__}: {reason}", file=sys.stderr)
        return None
    return runner


def measure(
    case: Case, contenders: list[Contender], device: Device, repeats: int, min_seconds: float
) -> dict[str, Any]:
    """One case, as it stands in the result file. All memory is released in between."""
    torch.compiler.reset()
    rotation = Rotation(case, device.cache_bytes(), device.type)
    runners = [r for c in contenders if (r := warmed_up(c, rotation, device))]
    seconds = time_side_by_side(runners, rotation, device, repeats, min_seconds)
    del runners, rotation
    gc.collect()
    # Compiled code keeps the number of threads that it was compiled for.
    losses = [c.name for c in contenders if c.is_loss and c.name != "compiled"]
    return {
        "case": asdict(case),
        "seconds": {
            name: {phase: [round(t, 9) for t in times] for phase, times in phases.items()}
            for name, phases in seconds.items()
        },
        "peak_bytes": measure_peaks(case, list(seconds)),
        "utilisation": measure_utilisation(case, losses) if case.num_rows <= FEW_ROWS else {},
    }


def main() -> None:
    """Measure, print and write."""
    arguments = parse()
    device = Cpu()
    contenders = [c for c in CONTENDERS if not (arguments.quick and c.name == "compiled")]
    min_seconds = 0.0 if arguments.quick else MIN_SECONDS
    raw = {
        "machine": describe(device),
        "repeats": arguments.repeats,
        "load_before": load(),
        "cases": [],
    }
    if raw["load_before"] > 0.5:
        print(f"load {raw['load_before']:.1f}: times will be unsteady", file=sys.stderr)
    for rows, vocab in arguments.shapes:
        for dtype in arguments.dtypes:
            case = Case(rows, vocab, dtype)
            print(case, file=sys.stderr)
            raw["cases"].append(measure(case, contenders, device, arguments.repeats, min_seconds))
    report = markdown(result := Result(raw))
    stem = file_stem(result.machine)
    arguments.output.mkdir(parents=True, exist_ok=True)
    for suffix, text in (
        ("json", json.dumps(raw) + "\n"),
        ("csv", csv_text(result)),
        ("md", report),
    ):
        (arguments.output / f"{stem}.{suffix}").write_text(text)
    print(report)
    print(f"wrote {arguments.output / stem}.json, .csv and .md", file=sys.stderr)


if __name__ == "__main__":
    main()
