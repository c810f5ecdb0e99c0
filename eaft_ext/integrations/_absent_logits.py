"""What an output layer returns whose loss is computed at once: no logits, and no tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils import _pytree


@dataclass(eq=False, repr=False)
class AbsentLogits:
    """Stands in for logits [..., V] on their way to the loss function, which knows it.

    Where these would be, what they are, and what leaves them as they are has an answer. All else
    raises what ``refuse`` makes of its name: whoever takes this for logits must not go on.

    It is a dataclass, and known to ``torch.utils._pytree``, for FSDP2: the hooks that it puts on
    what an output layer returns have to find the loss in it, whose backward needs the weight.
    """

    loss: Tensor
    shape: torch.Size
    dtype: torch.dtype
    refuse: Callable[[str], NoReturn]

    @property
    def device(self) -> torch.device:
        """Where the logits would be."""
        return self.loss.device

    def size(self, dim: int | None = None) -> Any:
        """Of the logits."""
        return self.shape if dim is None else self.shape[dim]

    def float(self) -> AbsentLogits:
        """The loss is computed in float32 anyway."""
        return self

    def contiguous(self) -> AbsentLogits:
        """Nothing is stored."""
        return self

    def to(self, *args: Any, **kwargs: Any) -> AbsentLogits:
        """To another place, or to a dtype in which logits are what they were."""
        for target in (*args, *kwargs.values()):
            target = target.dtype if isinstance(target, Tensor) else target
            if isinstance(target, torch.dtype) and target not in (self.dtype, torch.float32):
                self.refuse(f"to({target})")
        return self

    def __repr__(self) -> str:
        return f"AbsentLogits(shape={tuple(self.shape)}, dtype={self.dtype})"

    def __getattr__(self, name: str) -> NoReturn:
        # Python asks for protocols, and takes no for an answer; a copy is not filled at first.
        if name.startswith("__") or name == "refuse":
            raise AttributeError(name)
        self.refuse(name)

    @classmethod
    def __torch_function__(
        cls,
        function: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> NoReturn:
        for argument in _pytree.tree_leaves((args, kwargs), is_leaf=_is_absent):
            if _is_absent(argument):
                argument.refuse(getattr(function, "__name__", str(function)))
        raise TypeError(f"{function} takes no logits that are absent")


def _is_absent(value: Any) -> bool:
    return isinstance(value, AbsentLogits)


def _refusing(name: str) -> Callable[..., NoReturn]:
    def operator(self: AbsentLogits, *_: Any) -> NoReturn:
        self.refuse(name.strip("_"))

    return operator


_BINARY = (
    "divmod",
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "matmul",
    "and",
    "or",
    "xor",
)
_OTHERS = (
    *("neg", "pos", "abs", "round", "invert", "eq", "ne", "lt", "le", "gt", "ge", "contains"),
    *("getitem", "setitem", "len", "iter", "bool", "float", "int", "complex", "index", "array"),
)
# Python looks for operators in the class.
for _name in (*_OTHERS, *_BINARY, *(f"r{_binary}" for _binary in _BINARY)):
    setattr(AbsentLogits, f"__{_name}__", _refusing(_name))


def _flatten(absent: AbsentLogits) -> tuple[list[Tensor], AbsentLogits]:
    return [absent.loss], absent


def _unflatten(children: Any, absent: AbsentLogits) -> AbsentLogits:
    (loss,) = children
    return AbsentLogits(loss, absent.shape, absent.dtype, absent.refuse)


_pytree.register_pytree_node(AbsentLogits, _flatten, _unflatten)
