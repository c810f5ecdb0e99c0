"""The CUDA kernels on the host where the entropy of all logits is asked for, and other stats."""

from __future__ import annotations

import kernels_on_host
import pytest
import torch
from gate_cases import FAMILY
from inputs import IGNORED, TRAPS, make, upstream_of
from test_kernels_on_host import FEW_WAYS, Way, assert_right, each_dtype
from test_kernels_on_host import WAYS as ROWS
from test_shards_on_host import WAYS as SHARDS
from test_shards_on_host import Shards
from torch import Tensor

from eaft_ext import NoGate, SigmoidGate, reference
from eaft_ext._options import TokenLoss

pytestmark = kernels_on_host.MARKS

# Masks and numbers far apart, where a sum moves from one maximum to another.
WIDE = {"softcap": 1e5, "logit_scale": 3.0}


@each_dtype
@pytest.mark.parametrize("vocab_size", [1, 2, 5, 300, 20011])
def test_whole_entropy(dtype: torch.dtype, vocab_size: int) -> None:
    logits, labels = make(3, vocab_size, dtype, ignored=0.2)
    assert_right(logits, labels, k=None)
    assert_right(logits, labels, FEW_WAYS, k=None, gate=SigmoidGate())


@pytest.mark.slow
@pytest.mark.parametrize("trap", TRAPS)
def test_traps(trap: str) -> None:
    logits, labels = make(3, 1003, torch.bfloat16, trap=trap, ignored=0.2)
    assert_right(logits, labels, k=None)
    assert_right(logits, labels, FEW_WAYS, k=None, family=WIDE)


@pytest.mark.parametrize("family", FAMILY, ids=str)
def test_family(family: dict[str, float]) -> None:
    logits, labels = make(9, 1003, torch.bfloat16, ignored=0.2)
    assert_right(logits, labels, FEW_WAYS, k=None, family=family)
    assert_right(logits, labels, SHARDS[:4], k=None, family=family)


@each_dtype
def test_shards(dtype: torch.dtype) -> None:
    assert_right(*make(9, 1003, dtype, ignored=0.2), SHARDS, k=None)


def test_rising_logits() -> None:
    """Every tile has a larger maximum than the ones before."""
    logits, labels = make(2, 20011)
    logits = logits.sort(-1).values
    assert_right(logits, labels, k=None)
    logits[0] = torch.linspace(-1e4, 1e4, 20011)
    assert_right(logits, labels, k=None)


def extra_of(
    way: Way | Shards,
    logits: Tensor,
    labels: Tensor,
    k: int | None,
    family: list[float],
    count: int,
) -> Tensor:
    """What is told of the tokens besides."""
    if isinstance(way, Shards):
        return way.extra(logits, labels, k, family, count)
    asked = (logits, labels, k or 0, "entropy", [1.0], IGNORED)
    common = {"family": family, "num_extra": count}
    if way.kernel == "split":
        return kernels_on_host.forward(*asked, num_spans=way.count, **common).extra
    upstream = upstream_of(labels)
    return kernels_on_host.forward_with_grad(upstream, *asked, cluster_size=way.count, **common)[4]


@each_dtype
@pytest.mark.parametrize("k", [20, None])
@pytest.mark.parametrize(
    "num_extra", [0, 3, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))]
)
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "label_smoothing": 0.1}], ids=str)
def test_extra(
    dtype: torch.dtype, k: int | None, num_extra: int, options: dict[str, float]
) -> None:
    logits, labels = make(7, 2003, dtype, ignored=0.2)
    # Of two that are equally large, each is right.
    labels[0], labels[1] = logits[0].argmax(), 1000
    logits[1, 1000] = logits[1, 7] = logits[1].max()
    asked = {"return_stats": "full", **options}
    _, wanted = reference.gated_ce(logits.double(), labels, k, **asked)
    assert wanted.correct is not None and wanted.correct[labels != IGNORED][:2].all()
    expected = [wanted.lse, wanted.correct, wanted.vocab_entropy][:num_extra]
    family = TokenLoss(k, NoGate(), IGNORED, **options).family()
    for way in (*ROWS, *SHARDS[:4]):
        found = extra_of(way, logits, labels, k, family, num_extra)
        assert found.shape == (num_extra, 7)
        for stat, other in zip(found, expected, strict=True):
            torch.testing.assert_close(stat, other.float(), rtol=2e-6, atol=2e-6, msg=str(way))
