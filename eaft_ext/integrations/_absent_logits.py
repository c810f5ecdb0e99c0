"""What an output layer returns whose loss is computed at once: no logits, and no tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.utils import _pytree


class LogitMap(NamedTuple):
    """What a model makes of its logits before its loss, as :func:`eaft_ext.gated_ce` takes it."""

    softcap: float | None = None
    logit_scale: float = 1.0

    def is_close(self, other: LogitMap) -> bool:
        """The same but for rounding: a model that divides by its cap multiplies by it again."""
        caps = (self.softcap or 0.0, other.softcap or 0.0)
        return math.isclose(*caps) and math.isclose(self.logit_scale, other.logit_scale)


class Absent:
    """Stands in for a tensor that is not there: ``refuse`` is called with the name of any use."""

    refuse: Callable[[str], NoReturn]

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
    ) -> Any:
        for argument in _pytree.tree_leaves((args, kwargs), is_leaf=_is_absent):
            if _is_absent(argument):
                argument.refuse(getattr(function, "__name__", str(function)))
        raise TypeError(f"{function} takes nothing that is absent")


def _is_absent(value: Any) -> bool:
    return isinstance(value, Absent)


def _refusing(name: str) -> Callable[..., NoReturn]:
    def operator(self: Absent, *_: Any) -> NoReturn:
        self.refuse(name.strip("_"))

    return operator


_BINARY = (
    *("mul", "truediv", "divmod", "add", "sub", "floordiv", "mod", "pow", "matmul"),
    *("and", "or", "xor"),
)
_OTHERS = (
    *("neg", "pos", "abs", "round", "invert", "eq", "ne", "lt", "le", "gt", "ge", "contains"),
    *("getitem", "setitem", "len", "iter", "bool", "float", "int", "complex", "index", "array"),
)
# Python looks for operators in the class.
for _name in (*_OTHERS, *_BINARY, *(f"r{_binary}" for _binary in _BINARY)):
    setattr(Absent, f"__{_name}__", _refusing(_name))


@dataclass(eq=False, repr=False)
class AbsentLogits(Absent):
    """Stands in for logits [..., V] on their way to the loss function, which knows it.

    Where these would be, what they are, and what leaves them as they are has an answer; so have
    products with a number and one tanh, which are noted: the loss knows them as a scale and a soft
    cap. All else raises what ``refuse`` makes of its name: whoever takes this for logits must not
    go on.

    It is a dataclass, and known to ``torch.utils._pytree``, for FSDP2: the hooks that it puts on
    what an output layer returns have to find the loss in it, whose backward needs the weight.
    """

    loss: Tensor
    shape: torch.Size
    dtype: torch.dtype
    refuse: Callable[[str], NoReturn]
    before: float = 1.0
    """They were multiplied by this."""
    is_capped: bool = False
    """Then their tanh was taken."""
    after: float = 1.0
    """And was multiplied by this."""

    @property
    def map(self) -> LogitMap:
        """What they were made of, for the loss."""
        if not self.is_capped:
            return LogitMap(None, self.before)
        return LogitMap(self.after, self.before * self.after)

    def _noted(self, before: float, is_capped: bool, after: float) -> AbsentLogits:
        place = (self.loss, self.shape, self.dtype, self.refuse)
        return AbsentLogits(*place, before, is_capped, after)

    def _times(self, factor: Any, name: str) -> AbsentLogits:
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not factor > 0:
            self.refuse(name)
        if self.is_capped:
            return self._noted(self.before, True, self.after * factor)
        return self._noted(self.before * factor, False, 1.0)

    def __mul__(self, factor: Any) -> AbsentLogits:
        return self._times(factor, "mul")

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> AbsentLogits:
        is_number = isinstance(divisor, (int, float)) and divisor > 0
        return self._times(1 / divisor if is_number else divisor, "truediv")

    def tanh(self) -> AbsentLogits:
        """Once."""
        if self.is_capped:
            self.refuse("tanh")
        return self._noted(self.before, True, 1.0)

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

    @classmethod
    def __torch_function__(
        cls,
        function: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if function is torch.tanh and len(args) == 1 and _is_absent(args[0]) and not kwargs:
            return args[0].tanh()
        return super().__torch_function__(function, types, args, kwargs)


def _flatten(absent: AbsentLogits) -> tuple[list[Tensor], AbsentLogits]:
    return [absent.loss], absent


def _unflatten(children: Any, absent: AbsentLogits) -> AbsentLogits:
    (loss,) = children
    noted = (absent.before, absent.is_capped, absent.after)
    return AbsentLogits(loss, absent.shape, absent.dtype, absent.refuse, *noted)


_pytree.register_pytree_node(AbsentLogits, _flatten, _unflatten)
