"""Kernels of a few lines of PTX, and their launch: eight numbers of 64 bits for each thread."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from ptx_on_host import compiled
from torch import Tensor

SLOT = 8  # bytes
SLOTS = 8  # of a thread

HEAD = """.version 9.0
.target sm_90
.address_size 64
.extern .shared .align 128 .b8 memory[];
"""


def entry(name: str, lines: Sequence[str], directives: str = "") -> str:
    """A kernel that begins with the address of its thread's slots in %d0, and its index in %r0."""
    body = "\n".join(f"\t{line}" for line in lines)
    return f"""
.visible .entry {name}(
\t.param .u64 {name}_param_0
)
{directives}
{{
\t.reg .pred %p<10>;
\t.reg .b16 %h<10>;
\t.reg .b32 %r<30>;
\t.reg .b64 %d<10>;
\t.reg .f32 %f<10>;
\t.reg .f64 %g<10>;
\tld.param.u64 %d0, [{name}_param_0];
\tmov.u32 %r0, %tid.x;
\tmul.wide.u32 %d1, %r0, {SLOT * SLOTS};
\tadd.s64 %d0, %d0, %d1;
{body}
\tret;
}}
"""


def run(
    code: compiled.Compiled,
    name: str,
    slots: Tensor,
    *,
    threads: int | None = None,
    cluster_size: int = 1,
    shared_bytes: int = 0,
    seed: int = 0,
    writable: bool = True,
) -> Tensor:
    """What one cluster leaves of the slots, a row for each thread of a block."""
    memory = slots.clone()
    code.call(
        "run_kernel",
        [(memory.data_ptr(), memory.numel() * SLOT, writable)],
        name.encode(),
        ctypes.c_int64(cluster_size),
        cluster_size,
        len(memory) if threads is None else threads,
        ctypes.c_int64(shared_bytes),
        ctypes.c_uint64(seed),
        ctypes.c_void_p(memory.data_ptr()),
    )
    return memory
