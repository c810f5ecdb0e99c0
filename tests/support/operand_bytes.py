"""What operators are given and give: bytes in memory, and what collectives bring to a group."""

from __future__ import annotations

import gc
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

IN_PYTHON = torch._C.DispatchKey.CompositeExplicitAutograd
# Operands of which nothing is read, or a number a token.
UNREAD = {
    "aten::empty_like": {"self"},
    "aten::new_empty": {"self"},
    "aten::new_zeros": {"self"},
    "aten::nll_loss_forward": {"self"},
    "aten::nll_loss_backward": {"self"},
    "eaft_ext::gated_ce_merge": {"logits"},
}
PRODUCTS = {"aten::mm", "aten::addmm", "aten::addmm_"}
UNWRITTEN = {"aten::empty_like", "aten::new_empty"}
WAITS = {"_c10d_functional::wait_tensor", "_c10d_functional::_wrap_tensor_autograd"}


class Sent(NamedTuple):
    """A collective: its name, its group's, and the bytes that this process brings."""

    name: str
    group: str
    given: int


class Operands(TorchDispatchMode):
    """Counts the bytes of all operands of more than ``few`` elements, each once an operator.

    Operators that are written in Python are seen through; views move nothing.
    """

    def __init__(self, few: int = 0) -> None:
        super().__init__()
        self.few = few
        self.moved = 0
        self.products = 0  # their floating-point operations
        self.sent: list[Sent] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # which is asked first, and calls operators of plain tensors
        name = op._schema.name
        if op.namespace == "eaft_ext" and op.has_kernel_for_dispatch_key(IN_PYTHON):
            with self:
                return op._op_dk(IN_PYTHON, *args, **kwargs)
        names = [argument.name for argument in op._schema.arguments]
        given = dict(zip(names, args, strict=False)) | kwargs
        moves = not (op.is_view or name in WAITS or _scales_by_one(name, given))
        result = op(*args, **kwargs)
        if "group_name" in given:
            kind = name.partition("::")[2].removesuffix("_")
            kind = kind.removesuffix("_into_tensor").removesuffix("_tensor")
            self.sent.append(Sent(kind, given["group_name"], args[0].nbytes))
        if name in PRODUCTS:
            self.products += 2 * result.numel() * given.get("mat1", given["self"]).size(1)
        if moves:
            self._count(op._schema, given, result)
        return result

    def _count(self, schema: Any, given: dict[str, Any], result: Any) -> None:
        unread = UNREAD.get(schema.name, set())
        for argument in schema.arguments:
            value = given.get(argument.name)
            written = argument.alias_info is not None and argument.alias_info.is_write
            nothing_of_it = argument.is_out or (written and given.get("beta") == 0)
            if not nothing_of_it and argument.name not in unread:
                self._add(value)
            if written:
                self._add(value)
        returns = result if isinstance(result, tuple) else (result,)
        for declared, value in zip(schema.returns, returns, strict=False):
            if declared.alias_info is None and schema.name not in UNWRITTEN:
                self._add(value)

    def _add(self, value: Any) -> None:
        self.moved += sum(
            t.nbytes for t in tree_leaves(value) if isinstance(t, Tensor) and t.numel() > self.few
        )


def _scales_by_one(name: str, given: dict[str, Any]) -> bool:
    """Then the device leaves the gradient alone."""
    return name == "eaft_ext::scale_gradient_" and bool(given["factor"] == 1)


class Allocations(profile):
    """The bytes that are allocated in a block: at its end, and at most."""

    def __init__(self) -> None:
        super().__init__(activities=[ProfilerActivity.CPU], profile_memory=True)
        self.end = self.peak = 0

    def __enter__(self) -> Allocations:
        gc.collect()  # or it may run in the block
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        events = self.profiler.kineto_results.events()
        memory = (event for event in events if event.name() == "[memory]")
        for event in sorted(memory, key=lambda event: event.start_ns()):
            self.end += event.nbytes()
            self.peak = max(self.peak, self.end)
