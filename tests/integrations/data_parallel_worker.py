"""A process of a training that ``data_parallel.trained`` starts.

``data_parallel_worker.py RANK WORLD_SIZE FOLDER MODULE WAY``.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

from accelerate import PartialState
from spawned import work


def function(rank: int, world_size: int) -> Any:
    folder, module, way = sys.argv[3:]
    PartialState(cpu=True)  # or else axolotl asks for that of GPUs, and finds one process
    return importlib.import_module(module).train_in_process(way, Path(folder))


if __name__ == "__main__":
    # As accelerate's launcher tells it.
    os.environ |= {"RANK": sys.argv[1], "LOCAL_RANK": sys.argv[1]}
    os.environ |= {"WORLD_SIZE": sys.argv[2], "LOCAL_WORLD_SIZE": sys.argv[2]}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    os.environ["ACCELERATE_USE_CPU"] = "true"
    work(function)
