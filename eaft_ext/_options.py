"""What a token's loss is, and how the losses of tokens become one: options, each as one thing.

Public functions take them as keywords, whose one home this is; what is beneath them takes the two
objects. A new option is a field, a line in the keywords, a check and a formula.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar, get_args

import torch
from torch import Tensor

from eaft_ext._checks import check_token_weight
from eaft_ext._library import MAX_TOP_K, MIN_TOP_K
from eaft_ext.gates import EntropyGate, Gate, GateFunction, HardGate, NoGate, is_built_in
from eaft_ext.reference import (
    PARTIAL_HEAD,
    Merged,
    Reduction,
    TokenStats,
    gate_weights,
    map_logits,
    mean_divisor,
    merge_partials,
    reduce_loss,
    shard_partial,
    weigh,
    without_muted,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack as Unpack

Function = TypeVar("Function", bound=Callable[..., Any])
ReturnStats = bool | Literal["full"]


class LossKeywords(TypedDict, total=False):
    """Keywords of what a token's loss is; :func:`eaft_ext.gated_ce` says what they mean."""

    alpha: float
    normalizer: float | None
    gate: Gate | GateFunction | None
    ignore_index: int
    softcap: float | None
    logit_scale: float
    label_smoothing: float
    z_loss: float


class Keywords(LossKeywords, total=False):
    """Those, and how the losses of tokens become one."""

    reduction: Reduction
    num_items_in_batch: float | Tensor | None
    token_weight: Tensor | None


@dataclass(frozen=True)
class TokenLoss:
    """What a token's loss is. Processes that share a vocabulary compare these fields."""

    k: int | None
    """Of how many of the largest logits the gate's entropy is; None: of all."""
    gate: Gate | GateFunction
    ignore_index: int
    softcap: float | None = None
    logit_scale: float = 1.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    return_stats: ReturnStats = field(default=False, compare=False)
    """What is told of a token besides: nothing that its loss depends on."""

    @property
    def num_extra(self) -> int:
        """How many stats the operators are to tell besides: lse, correct, vocab_entropy."""
        return _NUM_EXTRA[self.return_stats]

    @property
    def tells_entropy(self) -> bool:
        """Whether the entropy of the whole vocabulary is asked for."""
        return self.return_stats == "full"

    @property
    def sums_entropy(self) -> bool:
        """Whether that is computed."""
        return self.k is None or self.tells_entropy

    @property
    def kernel_gate(self) -> Gate:
        """The gate that the kernels compute: without one of their own, the loss is the nll."""
        return self.gate if is_built_in(self.gate) else NoGate()

    @property
    def is_known_to_kernels(self) -> bool:
        """Whether they compute the whole of it."""
        return is_built_in(self.gate)

    @property
    def z_loss_alone(self) -> TokenLoss | None:
        """What is left to add where the gate is not the kernels': the z-loss, if there is one."""
        if self.z_loss == 0 or self.is_known_to_kernels:
            return None
        return replace(self, gate=_NEVER, label_smoothing=0.0, return_stats=False)

    def kernel_arguments(self) -> tuple[int, str, list[float], int]:
        """As the operators take it."""
        gate = self.kernel_gate
        return self.k or 0, gate.name, gate.parameters(), self.ignore_index

    def family(self) -> list[float]:
        """As the operators take it: nothing where it is the logits as they are, and no z-loss."""
        z_loss = self.z_loss if self.is_known_to_kernels else 0.0
        map_ = (self.softcap or 0, self.logit_scale)
        others = (self.label_smoothing, z_loss)
        if map_ == (0, 1) and others == (0, 0):
            return []
        return [float(number) for number in (*map_, *others)]

    def reference_options(self) -> dict[str, Any]:
        """The same as :func:`eaft_ext.reference.token_losses` takes it."""
        return {
            "softcap": self.softcap,
            "logit_scale": self.logit_scale,
            "label_smoothing": self.label_smoothing,
            "z_loss": self.z_loss,
        }

    @property
    def num_top(self) -> int:
        """How many of its largest logits a shard of the vocabulary tells."""
        return 1 if self.k is None else self.k

    @property
    def partial_size(self) -> int:
        """Numbers of what a shard of the vocabulary tells of a token."""
        return PARTIAL_HEAD + self.num_top + self.sums_entropy + (self.label_smoothing != 0)

    def shard_partial(self, words: Tensor, labels: Tensor, vocab_start: int) -> Tensor:
        """What a shard tells, in plain PyTorch, of its ``words`` as :meth:`map_logits` has them."""
        return shard_partial(
            words,
            labels,
            self.num_top,
            vocab_start,
            self.ignore_index,
            sums_entropy=self.sums_entropy,
            sums_logits=self.label_smoothing != 0,
        )

    def merge_partials(self, partials: Tensor, labels: Tensor) -> Merged:
        """What all shards make of that; the entropy is that of the gate."""
        merged = merge_partials(
            partials, labels, self.ignore_index, self.num_top, sums_entropy=self.sums_entropy
        )
        if self.k is not None:
            return merged
        assert merged.vocab_entropy is not None, "it is what was asked for"
        return merged._replace(entropy=merged.vocab_entropy)

    def smoothed(
        self,
        merged: Merged,
        partials: Tensor,
        ignored: Tensor,
        num_words: int | None,
    ) -> Tensor:
        """The cross-entropy of tokens, from what shards of ``num_words`` in all tell of them.

        ``merged`` is what :func:`eaft_ext.reference.merge_partials` makes of that.
        """
        nll, row_max, log_sum = merged.nll, merged.row_max, merged.log_sum
        if self.label_smoothing == 0:
            return nll.clone()
        assert num_words is not None, "it was checked"
        mean = partials[..., -1].sum(0) / num_words
        of_all = torch.where(ignored, 0.0, (row_max - mean) + log_sum)
        return (1 - self.label_smoothing) * nll + self.label_smoothing * of_all

    def uniform(self, weight: Tensor, num_words: int | None) -> Tensor | None:
        """What label smoothing takes from every gradient of a row."""
        if self.label_smoothing == 0:
            return None
        assert num_words is not None, "it was checked"
        return weight * (self.label_smoothing / num_words)

    def map_logits(self, logits: Tensor) -> Tensor:
        """What the loss is of, in plain PyTorch."""
        return map_logits(logits, self.softcap, self.logit_scale)

    def gate_weights(self, vocab_size: int, nll: Tensor, entropy: Tensor, valid: Tensor) -> Tensor:
        """What the gate makes of the stats, of k words or of all where there are fewer."""
        k = vocab_size if self.k is None else min(self.k, vocab_size)
        return gate_weights(self.gate, k, nll, entropy, valid)

    def stats(
        self,
        nll: Tensor,
        entropy: Tensor,
        weight: Tensor,
        valid: Tensor,
        extra: Sequence[Tensor],
        dropped: Tensor | None = None,
    ) -> TokenStats:
        """With what an operator tells besides: as many tensors as ``num_extra``."""
        if self.num_extra == 0:
            return TokenStats(nll, entropy, weight, valid, dropped=dropped)
        lse = extra[0]
        return TokenStats(
            nll,
            entropy,
            weight,
            valid,
            correct=extra[1].bool(),
            lse=lse,
            z_loss=None if self.z_loss == 0 else self.z_loss * lse**2,
            vocab_entropy=extra[2] if self.tells_entropy else None,
            dropped=dropped,
        )

    def extra(self, merged: Merged, ignored: Tensor) -> list[Tensor]:
        """The same of what shards tell, in plain PyTorch."""
        lse = torch.where(ignored, 0.0, merged.row_max + merged.log_sum)
        whole = [] if merged.vocab_entropy is None else [merged.vocab_entropy]
        return [lse, merged.correct.to(lse.dtype), *whole][: self.num_extra]


def from_family(family: Sequence[float]) -> tuple[float | None, float, float, float]:
    """softcap, logit_scale, label_smoothing and z_loss, from what ``family()`` makes of them."""
    softcap, *others = family or (0.0, 1.0, 0.0, 0.0)
    logit_scale, label_smoothing, z_loss = others
    return softcap or None, logit_scale, label_smoothing, z_loss


@dataclass(frozen=True)
class Reduce:
    """How the losses of tokens become one."""

    reduction: Reduction
    num_items_in_batch: float | Tensor | None
    token_weight: Tensor | None = None
    """(...), like the labels."""

    def divisor(self, valid: Tensor, dtype: torch.dtype) -> float | Tensor:
        """What the sum is divided by."""
        if self.reduction == "sum":
            return 1.0
        return mean_divisor(valid, self.num_items_in_batch, dtype)

    def reduced(self, loss: Tensor, valid: Tensor) -> Tensor:
        """The losses (...) of tokens, or what becomes of them."""
        loss = self.weighted(loss)
        return reduce_loss(loss, valid, self.reduction, self.num_items_in_batch)

    def weighted(self, loss: Tensor) -> Tensor:
        """Each times its weight, and 0 where that is 0."""
        if self.token_weight is None:
            return loss
        return weigh(loss, self.token_weight.to(loss.dtype))

    def without_muted(self, labels: Tensor, of_token: TokenLoss) -> tuple[Tensor, Reduce]:
        """Labels that are ignored where their weight is 0, and what reduces the losses then."""
        if self.token_weight is None:
            return labels, self
        muted = without_muted(labels, self.token_weight, of_token.ignore_index)
        labels, weight, num_valid = muted
        num_items = self.num_items_in_batch
        if self.reduction == "mean" and num_items is None:
            num_items = num_valid
        return labels, Reduce(self.reduction, num_items, weight)


SMALLEST, LARGEST = 2.0**-126, 2.0**127
"""Of float32."""
_DEFAULT_GATE = EntropyGate()
_NEVER = HardGate(2.0)  # above any normalised entropy
_REDUCTIONS = get_args(Reduction)
_NUM_EXTRA: dict[ReturnStats, int] = {False: 0, True: 2, "full": 3}
STATS_OF_EXTRA = {number: asked for asked, number in _NUM_EXTRA.items()}


def token_loss(
    op: str,
    k: int | None,
    *,
    alpha: float = 1.0,
    normalizer: float | None = None,
    gate: Gate | GateFunction | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    **unknown: Any,
) -> TokenLoss:
    """The keywords of a token's loss, checked; their defaults are here."""
    if unknown:
        raise TypeError(f"{op}() got an unexpected keyword argument {next(iter(unknown))!r}")
    if k is not None:
        check_k(op, k, MIN_TOP_K, MAX_TOP_K, ", or None for all")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"{op}: ignore_index must be an int, got {ignore_index!r}")
    is_default = alpha == 1.0 and normalizer is None
    if gate is None:
        gate = _DEFAULT_GATE if is_default else EntropyGate(alpha, normalizer)
    elif not is_default:
        raise TypeError(
            f"{op}: alpha and normalizer are shorthand for gate=EntropyGate(alpha, normalizer) and "
            f"cannot go with gate={gate!r}"
        )
    elif isinstance(gate, type) or not (isinstance(gate, Gate) or callable(gate)):
        raise TypeError(
            f"{op}: gate must be a gate such as EntropyGate() or a function of (nll, entropy), got "
            f"{gate!r}"
        )
    if softcap is not None:
        softcap = _checked_number(op, "softcap", softcap, "above 0, or None")
    logit_scale = _checked_number(op, "logit_scale", logit_scale, "above 0")
    label_smoothing = _checked_number(op, "label_smoothing", label_smoothing, "at least 0")
    if label_smoothing > 1:
        raise ValueError(f"{op}: label_smoothing must be at most 1, got {label_smoothing}")
    z_loss = _checked_number(op, "z_loss", z_loss, "at least 0")
    return TokenLoss(k, gate, ignore_index, softcap, logit_scale, label_smoothing, z_loss)


def checked(
    op: str,
    k: int | None,
    where: Tensor,
    name: str = "logits",
    *,
    return_stats: ReturnStats = False,
    reduction: Reduction = "mean",
    num_items_in_batch: float | Tensor | None = None,
    token_weight: Tensor | None = None,
    **keywords: Unpack[LossKeywords],
) -> tuple[TokenLoss, Reduce]:
    """All keywords, checked. The loss will be where the logits are, or what ``name`` says."""
    loss = token_loss(op, k, **keywords)
    if not (return_stats == "full" or isinstance(return_stats, bool)):
        raise ValueError(f"{op}: return_stats must be True, False or 'full', got {return_stats!r}")
    if return_stats:
        loss = replace(loss, return_stats=return_stats)
    if reduction not in _REDUCTIONS:
        raise ValueError(f"{op}: reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if num_items_in_batch is not None:
        _check_num_items(op, num_items_in_batch, reduction, where, name)
    if token_weight is not None:
        check_token_weight(op, token_weight, where, name)
    return loss, Reduce(reduction, num_items_in_batch, token_weight)


def _defaults(kind: Any) -> dict[str, Any]:
    found = inspect.signature(token_loss).parameters | inspect.signature(checked).parameters
    return {name: found[name].default for name in kind.__annotations__}


LOSS_DEFAULTS = _defaults(LossKeywords)
"""Of what a token's loss is."""


def with_keywords(function: Function) -> Function:
    """Show the keywords of a function's ``**options`` where people look for them, as in help()."""
    signature = inspect.signature(function)
    *parameters, options = signature.parameters.values()
    kind = Keywords if options.annotation == "Unpack[Keywords]" else LossKeywords
    defaults = _defaults(kind)
    own = {parameter.name for parameter in parameters}
    for name, annotation in kind.__annotations__.items():
        if name in own:
            continue
        keyword = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=defaults[name])
        parameters.append(keyword.replace(annotation=annotation.__forward_arg__))
    function.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    of_others = {name: value for name, value in defaults.items() if name not in own}
    function.__kwdefaults__ = (function.__kwdefaults__ or {}) | of_others
    return function


def check_k(op: str, k: int, smallest: int, largest: int, otherwise: str = "") -> None:
    """How many of the largest logits are asked for."""
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"{op}: k must be an int{otherwise}, got {k!r}")
    if not smallest <= k <= largest:
        raise ValueError(f"{op}: k must be from {smallest} to {largest}{otherwise}, got {k}")


def check_gradient_in_forward(op: str, gradient_in_forward: bool, reduction: str) -> None:
    """There is one gradient for one loss."""
    if gradient_in_forward and reduction == "none":
        raise ValueError(
            f"{op}: gradient_in_forward needs reduction 'mean' or 'sum', got {reduction!r}"
        )


def _checked_number(op: str, name: str, value: float, bound: str) -> float:
    # Real alone would take longer to tell.
    if isinstance(value, bool) or not isinstance(value, (float, int, Real)):
        raise TypeError(f"{op}: {name} must be a number, got {value!r}")
    value = float(value)
    # Kernels take it as a float32, in which it must neither be 0 nor infinite.
    is_0 = value == 0 and bound.startswith("at least")
    if not (is_0 or SMALLEST <= value <= LARGEST):
        raise ValueError(f"{op}: {name} must be finite and {bound}, got {value}")
    return value


def _check_num_items(
    op: str, num_items_in_batch: float | Tensor, reduction: str, where: Tensor, name: str
) -> None:
    if reduction != "mean":
        raise ValueError(
            f"{op}: num_items_in_batch goes with reduction='mean', got reduction={reduction!r}"
        )
    if isinstance(num_items_in_batch, Tensor):
        if num_items_in_batch.numel() != 1:
            raise ValueError(
                f"{op}: num_items_in_batch must be one number, got a tensor of shape "
                f"{tuple(num_items_in_batch.shape)}"
            )
        if num_items_in_batch.device not in (where.device, torch.device("cpu")):
            raise ValueError(
                f"{op}: num_items_in_batch is on {num_items_in_batch.device} and {name} on "
                f"{where.device}"
            )
    elif not isinstance(num_items_in_batch, Real):
        raise TypeError(
            f"{op}: num_items_in_batch must be a number or a tensor, got {num_items_in_batch!r}"
        )
    elif not num_items_in_batch >= 0:
        raise ValueError(f"{op}: num_items_in_batch must be at least 0, got {num_items_in_batch}")
