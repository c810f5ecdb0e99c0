"""Measurements that need a process of their own, which answers with one JSON object a line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cases import Case, case_of
from contenders import Contender
from linear_contenders import contenders_of

Answer = dict[str, Any]


def ask(script: str, case: Case, names: list[str], environment: dict[str, str]) -> list[Answer]:
    """Run a script of this folder on a case and contenders; what it answered before it ended."""
    request = json.dumps({"case": asdict(case), "contenders": names})
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(script)), request],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        print(f"{script} ended with {done.returncode} at {case}", file=sys.stderr)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def serve(measure: Callable[[Case, list[Contender]], Iterator[Answer]]) -> None:
    """The other end: measure what the command line asks for."""
    request = json.loads(sys.argv[1])
    case = case_of(request["case"])
    contenders = [c for c in contenders_of(case) if c.name in request["contenders"]]
    for answer in measure(case, contenders):
        print(json.dumps(answer), flush=True)
