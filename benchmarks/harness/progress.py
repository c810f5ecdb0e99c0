"""A result file that grows case by case, so that what ends a process early costs one case."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from contenders.cases import Case
from contenders.contender import Contender, Runner

T = TypeVar("T")

ENDED = "the process ended there"
LOST = "the device was lost"
LEFT_OUT = "left out: too little time"
# A contender that ends a process is left out of the next; nobody is to blame for some ends.
MAX_ATTEMPTS = 3


class DeviceLostError(Exception):
    """The device answers no more; a new process may go on without what did that."""


def describe_error(error: BaseException) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


class Entry:
    """One case in the file. ``failed`` says of contenders, or of "all", why there are no times."""

    def __init__(self, raw: dict[str, Any], progress: "Progress") -> None:
        self.raw = raw
        self.failed: dict[str, str] = raw.setdefault("failed", {})
        self.progress = progress

    @property
    def attempts(self) -> int:
        return int(self.raw.get("attempts", 0))

    def excludes(self, contender: Contender) -> bool:
        """Whether a contender failed here before, or is another's and cost a process elsewhere."""
        if contender.name in self.failed:
            return True
        if contender.is_ours or contender.name not in self.progress.culprits():
            return False
        self.fail(contender.name, "left out: it cost a process elsewhere")
        return True

    def begin(self) -> bool:
        """Count this process; False if the case has ended enough of them."""
        if self.attempts >= MAX_ATTEMPTS:
            self.fail("all", ENDED)
            return False
        self.raw["attempts"] = self.attempts + 1
        self.failed.pop("all", None)
        self.progress.write()
        return True

    def fail(self, name: str, reason: str) -> None:
        self.failed[name] = reason
        self.progress.write()

    def attempt(self, name: str) -> None:
        """Blame a contender, should this process end before ``forgive``."""
        self.fail(name, ENDED)

    def forgive(self, name: str) -> None:
        del self.failed[name]
        self.progress.write()

    def add(self, **measured: Any) -> None:
        """Add what was measured, or replace it. With ``seconds`` the case counts as measured."""
        self.raw.update(measured)
        self.progress.write()

    def for_each(
        self, what: str, runners: list[Runner], measure: Callable[[Runner], T]
    ) -> dict[str, T]:
        """What is measured of each runner, by its name; of which it failed is taken down."""
        found = {}
        for runner in runners:
            name = runner.name
            try:
                found[name] = measure(runner)
            except Exception as error:
                self.fail(f"{what} of {name}", describe_error(error))
        return found


class Progress:
    """The result file. ``resume`` takes over what an earlier process measured."""

    def __init__(self, path: Path, raw: dict[str, Any], resume: bool = False) -> None:
        self.path = path
        self.raw = raw
        self.raw.setdefault("cases", [])
        if resume and path.exists():
            self.raw["cases"] = json.loads(path.read_text())["cases"]

    def entry(self, case: Case) -> Entry:
        for known in self.raw["cases"]:
            if known["case"] == asdict(case):
                return Entry(known, self)
        self.raw["cases"].append({"case": asdict(case)})
        return Entry(self.raw["cases"][-1], self)

    def culprits(self) -> set[str]:
        """What has cost a process in any case."""
        return {
            name
            for case in self.raw["cases"]
            for name, reason in case.get("failed", {}).items()
            if reason == ENDED or reason.startswith(LOST)
        }

    def is_complete(self, case: Case) -> bool:
        return any(c["case"] == asdict(case) and "seconds" in c for c in self.raw["cases"])

    def write(self) -> None:
        """Write the file, whole at any time."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".part")
        partial.write_text(json.dumps(self.raw) + "\n")
        partial.replace(self.path)
