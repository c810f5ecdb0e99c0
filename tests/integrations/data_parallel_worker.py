"""A process of a training that ``data_parallel.trained`` starts.

``data_parallel_worker.py RANK WORLD_SIZE FOLDER MODULE WAY``: ``MODULE.train_in_process(WAY)``.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from spawned import work


def function(rank: int, world_size: int) -> Any:
    module, way = sys.argv[4:]
    return importlib.import_module(module).train_in_process(way)


if __name__ == "__main__":
    # As torchrun tells it to accelerate.
    os.environ |= {"RANK": sys.argv[1], "LOCAL_RANK": sys.argv[1], "WORLD_SIZE": sys.argv[2]}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    work(function)
