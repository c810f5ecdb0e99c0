"""The CUDA kernels of the loss's family on the host, as test_kernels_on_host.py has the others."""

from __future__ import annotations

import kernels_on_host
import pytest
import torch
from gate_cases import FAMILY
from inputs import TRAPS, make
from test_kernels_on_host import assert_right, each_dtype
from test_shards_on_host import WAYS as SHARDS

pytestmark = kernels_on_host.MARKS


@each_dtype
@pytest.mark.parametrize("vocab_size", [5, 300, 20011])
@pytest.mark.parametrize("family", FAMILY, ids=str)
def test_family(dtype: torch.dtype, vocab_size: int, family: dict[str, float]) -> None:
    assert_right(*make(3, vocab_size, dtype, ignored=0.2), family=family)


@pytest.mark.parametrize("trap", TRAPS)
def test_traps_of_a_soft_cap(trap: str) -> None:
    """Of -inf it makes a number, and of what lies beside a row nothing."""
    logits, labels = make(3, 1003, torch.bfloat16, trap=trap, ignored=0.2)
    assert_right(logits, labels, family={"softcap": 30.0, "z_loss": 1e-3})


@each_dtype
@pytest.mark.parametrize("family", FAMILY, ids=str)
def test_family_in_shards(dtype: torch.dtype, family: dict[str, float]) -> None:
    assert_right(*make(9, 1003, dtype, ignored=0.2), SHARDS[:4], family=family)
