"""The gates: the weight of a token's cross-entropy as a function of its nll and its entropy.

Each built-in gate is a small frozen object that knows its formula in PyTorch and its name in the
operators, whose formulas are in ``csrc/core/gates.h``. ``H`` is the entropy in nats of the k
largest logits, renormalised among themselves, with k at most the vocabulary's size V; or of all
logits, where k stands for V.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, TypeAlias, TypeGuard

import torch
from torch import Tensor

GateFunction: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Any function of ``(nll, entropy)``, both detached float32 shaped like the labels, to weights."""


def _check_finite(gate: str, **parameters: float) -> None:
    for name, value in parameters.items():
        if not -math.inf < value < math.inf:  # math.isfinite breaks a graph of torch.compile
            raise ValueError(f"{gate}: {name} must be finite, got {value}")


def _normalized(entropy: Tensor, normalizer: float) -> Tensor:
    """H / normalizer, and 0 where H is 0, also for k = 1 where ln k is 0."""
    return torch.where(entropy == 0, 0.0, entropy / (normalizer or 1.0))


def _one_where(passes: Tensor, decides: Tensor) -> Tensor:
    """1 where a token passes, else 0, and NaN where what decides it is."""
    return torch.where(decides.isnan(), decides, passes.to(decides.dtype))


class Gate:
    """Base of the built-in gates.

    Any function of ``(nll, entropy)`` serves as a gate; derive from this class, and write
    :meth:`for_k` alone, for one that depends on k.
    """

    name: ClassVar[str]

    def parameters(self) -> list[float]:
        """What the operators are given beside the name."""
        return []

    def for_k(self, k: int) -> GateFunction:
        """The gate as a function of ``(nll, entropy)``, for an entropy over ``k`` logits."""
        raise NotImplementedError


@dataclass(frozen=True)
class EntropyGate(Gate):
    """``(H / normalizer)^alpha``: EAFT (arXiv 2601.02151), the default.

    Args:
        alpha: 1 in the paper; its ablation also has 2 and 3. At least 0.
        normalizer: what H is divided by; None, the paper's and the default, is ``ln k``. The
            authors' code divides by the literal 3.0, axolotl by 1.0, that is, not at all.
    """

    alpha: float = 1.0
    normalizer: float | None = None
    name: ClassVar[str] = "entropy"

    def __post_init__(self) -> None:
        _check_finite("EntropyGate", alpha=self.alpha)
        if self.alpha < 0:
            raise ValueError(f"EntropyGate: alpha must be at least 0, got {self.alpha}")
        if self.normalizer is not None:
            _check_finite("EntropyGate", normalizer=self.normalizer)
            if self.normalizer <= 0:
                raise ValueError(
                    "EntropyGate: normalizer must be above 0, or None for ln k, got "
                    f"{self.normalizer}"
                )

    def parameters(self) -> list[float]:
        """alpha, and the normalizer unless it is ln k."""
        given = [] if self.normalizer is None else [float(self.normalizer)]
        return [float(self.alpha), *given]

    def for_k(self, k: int) -> GateFunction:
        """The gate as a function of ``(nll, entropy)``."""
        normalizer = math.log(k) if self.normalizer is None else self.normalizer
        return lambda nll, entropy: _normalized(entropy, normalizer) ** self.alpha


@dataclass(frozen=True)
class SigmoidGate(Gate):
    """``sigmoid(slope (H / ln k - beta))``: EAFT's ablation."""

    beta: float = 0.17
    slope: float = 30.0
    name: ClassVar[str] = "sigmoid"

    def __post_init__(self) -> None:
        _check_finite("SigmoidGate", beta=self.beta, slope=self.slope)

    def parameters(self) -> list[float]:
        """beta and slope."""
        return [float(self.beta), float(self.slope)]

    def for_k(self, k: int) -> GateFunction:
        """The gate as a function of ``(nll, entropy)``."""
        return lambda nll, entropy: torch.sigmoid(
            self.slope * (_normalized(entropy, math.log(k)) - self.beta)
        )


@dataclass(frozen=True)
class HardGate(Gate):
    """``1 if H / ln k > threshold else 0``: EAFT's ablation."""

    threshold: float
    name: ClassVar[str] = "hard"

    def __post_init__(self) -> None:
        _check_finite("HardGate", threshold=self.threshold)

    def parameters(self) -> list[float]:
        """The threshold."""
        return [float(self.threshold)]

    def for_k(self, k: int) -> GateFunction:
        """The gate as a function of ``(nll, entropy)``. NaN stays NaN."""
        return lambda nll, entropy: _one_where(
            _normalized(entropy, math.log(k)) > self.threshold, entropy
        )


@dataclass(frozen=True)
class ConflictGate(Gate):
    """``0 if H / ln k < entropy and p(y) < probability else 1``: confident conflicts are left out.

    The mask of EAFT's pilot study, with thresholds in place of quantiles of a data set: the model
    is sure, and of something else than the label.

    Args:
        entropy: of the normalised entropy, from 0 to 1.
        probability: of the label's, from 0 to 1.
    """

    entropy: float
    probability: float
    name: ClassVar[str] = "conflict"

    def __post_init__(self) -> None:
        _check_finite("ConflictGate", entropy=self.entropy, probability=self.probability)

    def parameters(self) -> list[float]:
        """The thresholds of entropy and probability."""
        return [float(self.entropy), float(self.probability)]

    def for_k(self, k: int) -> GateFunction:
        """The gate as a function of ``(nll, entropy)``. NaN stays NaN."""

        def gate(nll: Tensor, entropy: Tensor) -> Tensor:
            is_sure = _normalized(entropy, math.log(k)) < self.entropy
            is_unlikely = torch.exp(-nll) < self.probability
            return _one_where(~(is_sure & is_unlikely), entropy)

        return gate


@dataclass(frozen=True)
class ProbabilityGate(Gate):
    """``p(y)``, the probability of the label: DFT (arXiv 2508.05629)."""

    name: ClassVar[str] = "probability"

    def for_k(self, k: int) -> GateFunction:
        """The gate as a function of ``(nll, entropy)``."""
        return lambda nll, entropy: torch.exp(-nll)


@dataclass(frozen=True)
class PowerGate(Gate):
    """``p(y)^q``: the family of objectives ``-p^q`` (arXiv 2510.00526); q = 1 is DFT, q = 0 none.

    The gradient of a token's loss is that of ``-p(y)^q / q``.
    """

    q: float
    name: ClassVar[str] = "power"

    def __post_init__(self) -> None:
        _check_finite("PowerGate", q=self.q)
        if self.q < 0:
            raise ValueError(f"PowerGate: q must be at least 0, got {self.q}")

    def parameters(self) -> list[float]:
        """The power."""
        return [float(self.q)]

    def for_k(self, k: int) -> GateFunction:
        """The gate as a function of ``(nll, entropy)``."""
        # Of the nll, since p(y) is 0 where p(y)^q may not be; and 1 for q = 0, also where p(y) is.
        if self.q == 0:
            return lambda nll, entropy: torch.ones_like(nll)
        return lambda nll, entropy: torch.exp(-self.q * nll)


@dataclass(frozen=True)
class ThresholdGate(Gate):
    """``1 if p(y) > threshold else 0``: ProFit, which learns what the model holds for possible."""

    threshold: float
    name: ClassVar[str] = "threshold"

    def __post_init__(self) -> None:
        _check_finite("ThresholdGate", threshold=self.threshold)

    def parameters(self) -> list[float]:
        """The threshold."""
        return [float(self.threshold)]

    def for_k(self, k: int) -> GateFunction:
        """The gate as a function of ``(nll, entropy)``. NaN stays NaN."""
        return lambda nll, entropy: _one_where(torch.exp(-nll) > self.threshold, nll)


@dataclass(frozen=True)
class FocalGate(Gate):
    """``(1 - p(y))^gamma``: focal loss (arXiv 1708.02002), with the weight detached."""

    gamma: float
    name: ClassVar[str] = "focal"

    def __post_init__(self) -> None:
        _check_finite("FocalGate", gamma=self.gamma)
        if self.gamma < 0:
            raise ValueError(f"FocalGate: gamma must be at least 0, got {self.gamma}")

    def parameters(self) -> list[float]:
        """Gamma."""
        return [float(self.gamma)]

    def for_k(self, k: int) -> GateFunction:
        """The gate as a function of ``(nll, entropy)``."""
        return lambda nll, entropy: (-torch.expm1(-nll)) ** self.gamma


@dataclass(frozen=True)
class NoGate(Gate):
    """``1``: plain cross-entropy."""

    name: ClassVar[str] = "none"

    def for_k(self, k: int) -> GateFunction:
        """The gate as a function of ``(nll, entropy)``."""
        return lambda nll, entropy: torch.ones_like(nll)


BUILT_IN = (
    EntropyGate,
    SigmoidGate,
    HardGate,
    ConflictGate,
    ProbabilityGate,
    PowerGate,
    ThresholdGate,
    FocalGate,
    NoGate,
)
"""The gates that the kernels know. What derives from one of them is another function."""


def is_built_in(gate: Gate | GateFunction) -> TypeGuard[Gate]:
    """Whether the kernels know the gate; a subclass may be another function."""
    return type(gate) in BUILT_IN
