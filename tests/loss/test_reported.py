"""Faults that users of other fused losses reported, as tests: each says which library had it.

Those of hidden states, shards, models and processes are in the rooms that they belong to.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from inputs import make, same_bits
from parity import assert_parity
from torch import Tensor

from eaft_ext import gated_ce, reference

V = 300

UPSTREAM: dict[str, Callable[[Tensor], Tensor]] = {
    "expanded": lambda u: u[:1, :1].expand(4, 5),
    "transposed": lambda u: u.t().contiguous().t(),
    "every_other": lambda u: torch.stack([u, torch.full_like(u, math.nan)], -1)[..., 0],
    "one_number": lambda u: torch.full_like(u, 0.25),
}


@pytest.mark.parametrize("name", UPSTREAM)
def test_upstream_gradients_of_any_strides(device: str, name: str) -> None:
    """Liger #968, #1298, NeMo-Automodel #3853, TransformerEngine #623: read as if contiguous."""
    logits, labels = make(20, V, device=device)
    logits, labels = logits.view(4, 5, V).requires_grad_(), labels.view(4, 5)
    generator = torch.Generator().manual_seed(1)
    upstream = UPSTREAM[name](torch.randn(4, 5, generator=generator).to(device))
    (found,) = torch.autograd.grad(gated_ce(logits, labels, reduction="none"), logits, upstream)
    loss = reference.gated_ce(logits, labels, reduction="none")
    (expected,) = torch.autograd.grad(loss, logits, upstream)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_labels_and_logits_of_any_strides(device: str) -> None:
    """TransformerEngine #2734, unsloth #10713: a shifted view was read from its buffer's start."""
    buffer, labels = make(24, V, device=device)
    buffer, labels = buffer.view(4, 6, V), labels.view(6, 4).t()
    found = gated_ce(buffer[:, :-1], labels[:, 1:])
    expected = gated_ce(buffer[:, :-1].contiguous(), labels[:, 1:].contiguous())
    assert not labels.is_contiguous()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_most_logits_are_minus_infinity(device: str, dtype: torch.dtype) -> None:
    """flash-attention #1930, SkyRL #2259: a masked vocabulary gave NaN, in loss or entropy."""
    logits, labels = make(12, V, dtype, trap="one_finite", device=device)
    assert_parity(logits, labels)
    logits, labels = make(12, V, dtype, trap="five_finite", device=device)
    assert_parity(logits, labels)
    assert gated_ce(logits, labels).isfinite()


@pytest.mark.parametrize("in_place", [False, True])
def test_another_use_of_the_logits(device: str, in_place: bool) -> None:
    """Megatron #1594, Liger #1251: gradients of other uses, of a gradient written over logits."""
    logits, labels = make(12, V, device=device)
    logits.requires_grad_()
    (of_loss,) = torch.autograd.grad(gated_ce(logits, labels), logits)
    x = logits * 1
    loss = gated_ce(x, labels, inplace_backward=in_place)
    (found,) = torch.autograd.grad(loss + 0.5 * x.sum(), logits)
    torch.testing.assert_close(found, of_loss + 0.5)


@pytest.mark.parametrize("fused", [False, True], ids=["backward", "gradient_in_forward"])
def test_accumulation_over_uneven_batches(device: str, fused: bool) -> None:
    """TRL #4096, transformers #46204, #37766: the mean of means is not the mean of all tokens."""
    logits, labels = make(30, V, device=device)
    labels[7:20] = -100
    whole = logits.clone().requires_grad_()
    gated_ce(whole, labels).backward()
    parts = logits.clone().requires_grad_()
    number = (labels != -100).sum()
    total = 0.0
    for rows in (slice(0, 9), slice(9, 18), slice(18, 30)):  # the second has no token
        how: dict[str, Any] = {"num_items_in_batch": number, "gradient_in_forward": fused}
        loss = gated_ce(parts[rows], labels[rows], **how)
        loss.backward()
        total += loss.item()
    torch.testing.assert_close(parts.grad, whole.grad)
    assert total == pytest.approx(gated_ce(logits, labels).item())


@pytest.mark.parametrize("logits_dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
def test_mixed_dtypes(device: str, logits_dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    """Liger #501, LLaMA-Factory #5583: 16-bit logits beside weights and labels of others."""
    logits, labels = make(12, V, logits_dtype, device=device)
    weight = (torch.arange(12, device=device) % 3).to(weight_dtype)
    loss = gated_ce(logits.requires_grad_(), labels.int(), token_weight=weight)
    expected = reference.gated_ce(logits.double(), labels, token_weight=weight.double())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-5)
    assert torch.autograd.grad(loss, logits)[0].dtype == logits_dtype


@pytest.mark.parametrize(
    "number",
    [7, 7.0, torch.tensor(7), torch.tensor([7]), torch.tensor(7.0), torch.tensor([[7]]).int()],
    ids=["int", "float", "scalar", "one_element", "float_tensor", "int32"],
)
def test_kinds_of_num_items_in_batch(device: str, number: Any) -> None:
    """transformers #36967, Liger #767: a tensor where a number was thought of, and the reverse."""
    logits, labels = make(12, V, device=device)
    expected = gated_ce(logits, labels, reduction="sum") / 7
    for where in {"cpu", device}:
        given = number.to(where) if isinstance(number, Tensor) else number
        found = gated_ce(logits, labels, num_items_in_batch=given)
        assert found.shape == () and found.device == logits.device
        torch.testing.assert_close(found, expected)


def test_saved_tensor_hooks(device: str) -> None:
    """TRL #2954, torchtune #2456: what is saved is offloaded, and comes back as other tensors."""
    logits, labels = make(12, V, device=device)
    logits.requires_grad_()
    (expected,) = torch.autograd.grad(gated_ce(logits, labels), logits)
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> int:
        packed.append(tensor.detach().cpu().clone())
        return len(packed) - 1

    def unpack(index: int) -> Tensor:
        return packed[index].to(device)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        loss = gated_ce(logits, labels)
    (found,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert packed and same_bits(found, expected)
    assert same_bits(torch.autograd.grad(loss, logits)[0], expected), "in a repeated backward"
