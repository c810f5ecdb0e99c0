"""A benchmark: its command line, its cases one after the other, its exit status.

The status is 1 if one of our own contenders failed, and 3 if the device was lost: the same command
with --resume then goes on.
"""

import argparse
import json
import os
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from contenders import peers
from contenders.cases import DTYPES, FEW_ROWS, Case
from contenders.contender import ANY, Contender

from eaft_ext.cli.options import positive_float

from .command import EXAMPLE, add_measured, parser_of, set_measured
from .device import Device, open_device
from .machine import describe, file_stem, load
from .measure import How, Session, measure_case
from .progress import LEFT_OUT, DeviceLostError, Progress, describe_error
from .schedule import Schedule

MIN_SECONDS = {"cpu": 3.0, "cuda": 1.5}
DEVICE_LOST = 3


@dataclass(frozen=True)
class Benchmark:
    """What is measured: contenders in cases, by device.

    ``report`` writes what is made of the result file, and returns it. ``suffix`` ends the files'
    names, ``make_case`` makes a case of a shape, like ``example``, and a dtype, and ``compilation``
    is how many seconds the first contender that compiles may well take.
    """

    contenders: Sequence[Contender]
    shapes: Mapping[str, Sequence[tuple[int, ...]]]
    quick_shapes: Sequence[tuple[int, ...]]
    repeats: Mapping[str, int]
    report: Callable[[Progress], str]
    dtypes: Mapping[str, Sequence[str]] = field(default_factory=lambda: dict.fromkeys(ANY, DTYPES))
    suffix: str = ""
    form: str = "NxV"
    example: str = EXAMPLE
    make_case: Callable[[tuple[int, ...], str], Case] = lambda shape, dtype: Case(*shape, dtype)
    how: How = field(default_factory=How)
    compilation: float = 0.0

    def parse(self, text: str | None) -> argparse.Namespace:
        parser = parser_of(text)
        add = parser.add_argument
        add("--device", choices=ANY, default="cpu")
        add_measured(parser, self.form, self.example, self.repeats)
        limit = "about how long all may take; what is worth least is cut"
        add("--minutes", type=positive_float, help=limit)
        add("--resume", action="store_true", help="keep the cases that the result file has already")
        checks = "JSON to keep with the result, of gpu_check.sh"
        add("--checks", type=Path, metavar="FILE", help=checks)
        arguments = parser.parse_args()
        by_device = (self.dtypes[arguments.device], self.repeats[arguments.device])
        shapes = self.shapes[arguments.device]
        return set_measured(arguments, shapes, self.quick_shapes, *by_device)

    def cases(self, arguments: argparse.Namespace) -> list[Case]:
        """What is measured, on a GPU by worth: bfloat16 first, and few rows last."""
        cases = [
            self.make_case(shape, dtype) for shape in arguments.shapes for dtype in arguments.dtypes
        ]
        if arguments.device == "cuda":
            cases.sort(key=lambda case: (case.num_rows <= FEW_ROWS, case.dtype != "bfloat16"))
        return cases

    def measure(self, arguments: argparse.Namespace, device: Device, progress: Progress) -> None:
        """Every case that the result file does not have yet."""
        schedule = Schedule(arguments.minutes, self.compilation)
        min_seconds = 0.0 if arguments.quick else MIN_SECONDS[device.type]
        installed = {"", *peers.versions()}
        candidates = [
            c
            for c in self.contenders
            if c.module in installed and not (arguments.quick and c.compiles)
        ]
        pending = [case for case in self.cases(arguments) if not progress.is_complete(case)]
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
            session = Session(device, entry, schedule, arguments.repeats, min_seconds, self.how)
            reason = None
            try:
                measure_case(case, contenders, session)
            except DeviceLostError:
                self.report(progress)
                raise
            except Exception as error:
                traceback.print_exc()
                reason = describe_error(error)
            finally:
                watchdog.cancel()
            self.report(progress)
            if reason is not None:
                entry.fail("all", reason)
                device.release()
                if not device.is_alive():
                    raise DeviceLostError(f"the device is lost in {case}: {reason}")

    def has_failed(self, progress: Progress) -> bool:
        """Whether something was not measured that should have been: no peer, and not for time."""
        own = {"all", *(c.name for c in self.contenders if c.is_ours)}
        return any(
            name.split(" of ")[-1] in own and reason != LEFT_OUT
            for case in progress.raw["cases"]
            for name, reason in case["failed"].items()
        )

    def execute(self, text: str | None) -> int:
        """Measure, print and write; the exit status."""
        arguments = self.parse(text)
        device = open_device(arguments.device)
        raw = {
            "machine": describe(device),
            "repeats": arguments.repeats,
            "load_before": load(),
            "checks": json.loads(arguments.checks.read_text()) if arguments.checks else {},
        }
        path = arguments.output / f"{file_stem(raw['machine'])}{self.suffix}.json"
        progress = Progress(path, raw, arguments.resume)
        try:
            self.measure(arguments, device, progress)
        except DeviceLostError as error:
            print(error, file=sys.stderr)
            lose_device()
        print(self.report(progress))
        print(f"wrote {path}", file=sys.stderr)
        return int(self.has_failed(progress))


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
