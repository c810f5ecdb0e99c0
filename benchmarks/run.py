"""Benchmarks of gated_ce: time side by side, peak memory, on a CPU also the cores in use.

    python benchmarks/run.py                    on the CPU, about four minutes on two cores
    python benchmarks/run.py --device cuda      on the current GPU, with the peers installed there
    python benchmarks/run.py --quick            one small shape, a smoke test

Writes <machine>.json with every single time, and <machine>.csv and <machine>.md made from it, anew
after each case. Ends with 1 if one of our own contenders failed, and with 3 if the device was lost:
the same command with --resume then goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import bounds
import peers
from cases import DTYPES, QUICK_SHAPES, SHAPES, Case, case_of
from contenders import CONTENDERS, Contender
from device import Device, open_device
from launches import MAX_ROWS
from machine import describe, file_stem, load
from measure import measure_case
from progress import LEFT_OUT, DeviceLostError, Progress, describe_error
from report import csv_text, markdown
from results import FOLDER, Result
from schedule import Schedule

REPEATS = {"cpu": 15, "cuda": 30}
MIN_SECONDS = {"cpu": 3.0, "cuda": 1.5}
EXAMPLE = "512x151936"
DEVICE_LOST = 3


@dataclass(frozen=True)
class Benchmark:
    """What is measured: contenders in cases, those of most worth first.

    ``measure`` takes what :func:`measure.measure_case` takes. ``report`` writes what is made of the
    result file, and returns it. ``suffix`` ends the files' names, and ``compilation`` is how many
    seconds the first contender that compiles may well take.
    """

    contenders: Sequence[Contender]
    cases: Sequence[Case]
    measure: Callable[..., None]
    report: Callable[[Progress], str]
    suffix: str = ""
    compilation: float = 0.0


def sizes(text: str, example: str) -> tuple[int, ...]:
    """Sizes that are joined with an x, as many as in the example."""
    if not re.fullmatch(re.sub(r"\d+", r"[1-9]\\d*", example), text):
        raise argparse.ArgumentTypeError(f"{text!r} is not like {example}")
    return tuple(map(int, text.split("x")))


shape = partial(sizes, example=EXAMPLE)


def positive(text: str) -> int:
    """An integer from 1."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def minutes(text: str) -> float:
    """A number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


def parse(
    text: str | None,
    form: str,
    example: str,
    shapes: Mapping[str, Sequence[tuple[int, ...]]],
    quick_shapes: Sequence[tuple[int, ...]],
    repeats: Mapping[str, int],
    dtypes: Mapping[str, Sequence[str]],
) -> argparse.Namespace:
    """The command line, which shows a text; a shape has a form, such as NxV, and an example.

    What is measured unless it says something else is by device.
    """
    summary, _, details = (text or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=list(shapes), default="cpu")
    parser.add_argument(
        "--shapes",
        type=partial(sizes, example=example),
        nargs="+",
        metavar=form,
        help=f"such as {example}, any number",
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES)
    parser.add_argument("--repeats", type=positive, help=f"rounds of each case (default {repeats})")
    parser.add_argument(
        "--minutes", type=minutes, help="about how long all may take; what is worth least is cut"
    )
    parser.add_argument(
        "--resume", action="store_true", help="keep the cases that the result file has already"
    )
    parser.add_argument(
        "--checks", type=Path, metavar="FILE", help="JSON to keep with the result, of gpu_check.sh"
    )
    parser.add_argument(
        "--quick", action="store_true", help="one small shape, few rounds, without torch.compile"
    )
    parser.add_argument(
        "--output", type=Path, default=FOLDER, metavar="DIR", help="default: benchmarks/results"
    )
    arguments = parser.parse_args()
    arguments.shapes = arguments.shapes or (
        quick_shapes if arguments.quick else shapes[arguments.device]
    )
    arguments.dtypes = arguments.dtypes or dtypes[arguments.device]
    arguments.repeats = arguments.repeats or (3 if arguments.quick else repeats[arguments.device])
    return arguments


def cases_in_order(arguments: argparse.Namespace) -> list[Case]:
    """What is measured, on a GPU by worth: bfloat16 first, and few rows last."""
    cases = [
        Case(num_rows, vocab_size, dtype)
        for num_rows, vocab_size in arguments.shapes
        for dtype in arguments.dtypes
    ]
    if arguments.device == "cuda":
        cases.sort(key=lambda case: (case.num_rows <= MAX_ROWS, case.dtype != "bfloat16"))
    return cases


def write_reports(progress: Progress) -> str:
    """The report, also written beside the result file, with a table of all figures."""
    result = Result(progress.raw)
    progress.raw["bounds"] = bounds.as_json(result)
    progress.write()
    report = markdown(result)
    progress.path.with_suffix(".csv").write_text(csv_text(result))
    progress.path.with_suffix(".md").write_text(report)
    return report


def lose_device() -> None:
    """End without the interpreter's clean-up, which would fail or wait on the device."""
    sys.stderr.flush()
    os._exit(DEVICE_LOST)


def end_when_hopeless(case: Case, seconds: float) -> threading.Timer:
    """End the process after so long, unless cancelled: a kernel that hangs cannot be interrupted.

    The result file then blames the contender that was being tried, if one was.
    """

    def give_up() -> None:
        print(f"gave up at {case} after {seconds:.0f} s", file=sys.stderr)
        lose_device()

    timer = threading.Timer(min(seconds, threading.TIMEOUT_MAX), give_up)
    timer.daemon = True
    timer.start()
    return timer


def measure_all(
    benchmark: Benchmark, arguments: argparse.Namespace, device: Device, progress: Progress
) -> None:
    """Every case that the result file does not have yet."""
    schedule = Schedule(arguments.minutes, benchmark.compilation)
    min_seconds = 0.0 if arguments.quick else MIN_SECONDS[device.type]
    candidates = [
        c
        for c in benchmark.contenders
        if (not c.module or peers.version(c.module)) and not (arguments.quick and c.compiles)
    ]
    pending = [case for case in benchmark.cases if not progress.is_complete(case)]
    # What an earlier process ended in comes last.
    pending.sort(key=lambda case: progress.entry(case).attempts)
    for index, case in enumerate(pending):
        entry = progress.entry(case)
        if not schedule.has_time():
            entry.fail("all", LEFT_OUT)
            continue
        if not entry.begin():
            continue
        print(case, file=sys.stderr)
        contenders = [c for c in candidates if c.takes_part(case, device.type)]
        schedule.begin(case, pending[index + 1 :])
        watchdog = end_when_hopeless(case, schedule.seconds_until_hopeless())
        reason = None
        try:
            benchmark.measure(
                case, contenders, device, entry, schedule, arguments.repeats, min_seconds
            )
        except DeviceLostError:
            benchmark.report(progress)
            raise
        except Exception as error:
            traceback.print_exc()
            reason = describe_error(error)
        finally:
            watchdog.cancel()
        benchmark.report(progress)
        if reason is not None:
            entry.fail("all", reason)
            device.release()
            if not device.is_alive():
                raise DeviceLostError(f"the device is lost in {case}: {reason}")


def own_failures(benchmark: Benchmark, progress: Progress) -> list[str]:
    """What should have been measured and was not, peers and a lack of time apart."""
    own = {"all", *(c.name for c in benchmark.contenders if c.is_ours)}
    return [
        f"{case_of(case['case'])}: {name}: {reason}"
        for case in progress.raw["cases"]
        for name, reason in case["failed"].items()
        if name.split(" of ")[-1] in own and reason != LEFT_OUT
    ]


def execute(benchmark: Benchmark, arguments: argparse.Namespace) -> int:
    """Measure, print and write; the exit status."""
    device = open_device(arguments.device)
    raw = {
        "machine": describe(device),
        "repeats": arguments.repeats,
        "load_before": load(),
        "checks": json.loads(arguments.checks.read_text()) if arguments.checks else {},
    }
    if raw["load_before"] > 0.5 and arguments.device == "cpu":
        print(f"load {raw['load_before']:.1f}: times will be unsteady", file=sys.stderr)
    path = arguments.output / f"{file_stem(raw['machine'])}{benchmark.suffix}.json"
    progress = Progress(path, raw, arguments.resume)
    try:
        measure_all(benchmark, arguments, device, progress)
    except DeviceLostError as error:
        print(error, file=sys.stderr)
        lose_device()
    print(benchmark.report(progress))
    print(f"wrote {path}", file=sys.stderr)
    return 1 if own_failures(benchmark, progress) else 0


def main() -> int:
    """The benchmark of ``gated_ce``."""
    dtypes = dict.fromkeys(SHAPES, DTYPES)
    arguments = parse(__doc__, "NxV", EXAMPLE, SHAPES, QUICK_SHAPES, REPEATS, dtypes)
    cases = cases_in_order(arguments)
    return execute(Benchmark(CONTENDERS, cases, measure_case, write_reports), arguments)


if __name__ == "__main__":
    sys.exit(main())
