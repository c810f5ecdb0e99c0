"""How often properties were tried: ``EAFT_EXT_FUZZ_COUNTS=FILE`` has it written there, as JSON."""

import json
import os
from pathlib import Path

from drawn import TRIED


def pytest_sessionfinish() -> None:
    if path := os.environ.get("EAFT_EXT_FUZZ_COUNTS"):
        Path(path).write_text(json.dumps(TRIED))
