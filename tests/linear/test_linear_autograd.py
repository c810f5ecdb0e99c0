"""linear_gated_ce in training: products that are skipped, autocast, compilers, layouts, errors."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from inputs import same_bits
from linear_cases import HIDDEN, V, linear_inputs
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import eaft_ext
from eaft_ext import NoGate, gated_ce, linear_gated_ce, reference

pytestmark = pytest.mark.operator("gated_ce_forward_with_grad")

N = 13


def _leaves(device: str, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor]:
    *inputs, labels = linear_inputs(N, dtype=dtype, device=device)
    return [tensor.requires_grad_() for tensor in inputs], labels


def _close(found: Any, expected: Any) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def _products(function: Callable[[], Any]) -> tuple[int, int]:
    """Products of matrices as large as the vocabulary, and passes over a gradient to scale it."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        function()
    counts = Counter(event.name for event in profiler.events())
    names = ("aten::mm", "aten::addmm", "aten::addmm_")
    return sum(counts[name] for name in names), counts["eaft_ext::scale_gradient_"]


def _own_gate(nll: Tensor, entropy: Tensor) -> Tensor:
    return entropy


PER_TOKEN: dict[str, dict[str, Any]] = {
    "losses": {"reduction": "none"},
    "own_gate": {"gate": _own_gate},
}


@pytest.mark.parametrize("num_chunks", [1, 3])
@pytest.mark.parametrize("needs", ["hidden weight", "hidden", "weight", ""])
def test_what_is_frozen_has_no_product(device: str, needs: str, num_chunks: int) -> None:
    """One for the logits, and one for each gradient; the backward has none."""
    hidden, weight, _, labels = linear_inputs(12, ignored=0, device=device)
    hidden.requires_grad_("hidden" in needs)
    weight.requires_grad_("weight" in needs)
    options: dict[str, Any] = {"chunk_size": 12 // num_chunks}
    wanted = len(needs.split())
    losses: list[Tensor] = []
    products, _ = _products(
        lambda: losses.append(linear_gated_ce(hidden, weight, labels, **options))
    )
    assert products == num_chunks * (1 + wanted)
    if wanted:
        assert _products(losses[0].backward)[0] == 0
        assert (hidden.grad is not None, weight.grad is not None) == (
            "hidden" in needs,
            "weight" in needs,
        )


@pytest.mark.parametrize("case", PER_TOKEN)
@pytest.mark.parametrize("needs", ["hidden weight", "hidden", "weight"])
def test_losses_per_token_take_one_product_more(device: str, needs: str, case: str) -> None:
    hidden, weight, _, labels = linear_inputs(12, ignored=0, device=device)
    hidden.requires_grad_("hidden" in needs)
    weight.requires_grad_("weight" in needs)
    losses: list[Tensor] = []

    def forward() -> None:
        losses.append(
            linear_gated_ce(hidden, weight, labels, chunk_size=6, **PER_TOKEN[case]).sum()
        )

    assert _products(forward)[0] == 2
    assert _products(losses[0].backward)[0] == 2 * (1 + len(needs.split()))


def test_no_gradient_is_asked_for(device: str) -> None:
    (hidden, weight, bias), labels = _leaves(device)
    losses: list[Tensor] = []
    with torch.no_grad():
        products, _ = _products(
            lambda: losses.append(linear_gated_ce(hidden, weight, labels, bias))
        )
    assert products == 1
    assert not losses[0].requires_grad
    _close(losses, [reference.linear_gated_ce(hidden, weight, labels, bias).detach()])
    with torch.inference_mode():
        _close([linear_gated_ce(hidden, weight, labels, bias)], losses)


def test_a_loss_that_is_used_as_it_is_costs_no_pass(device: str) -> None:
    """The gradients are as they were written, and are kept, not copied."""
    (hidden, weight, _), labels = _leaves(device)
    loss = linear_gated_ce(hidden, weight, labels)
    saved = {t.data_ptr() for t in loss.grad_fn.saved_tensors if t.numel()}
    loss.backward()
    assert {hidden.grad.data_ptr(), weight.grad.data_ptr()} <= saved


@pytest.mark.parametrize("factor", [0.5, -3.7])
def test_a_scaled_loss_in_bfloat16(device: str, factor: float) -> None:
    """Rounded twice: once as it is written, once as it is scaled."""
    leaves, labels = _leaves(device, torch.bfloat16)
    hidden, weight, bias = leaves
    plain = torch.autograd.grad(linear_gated_ce(hidden, weight, labels, bias), leaves)
    found = torch.autograd.grad(factor * linear_gated_ce(hidden, weight, labels, bias), leaves)
    for gradient, its in zip(found, plain, strict=True):
        assert same_bits(gradient, its * factor)


def test_float16_waits_for_the_loss_scale(device: str) -> None:
    """A mean over many tokens would round the gradient of each to 0 before it is scaled."""
    leaves, labels = _leaves(device, torch.float16)
    hidden, weight, bias = leaves
    items, scale = 1e8, 2.0**26
    loss = linear_gated_ce(hidden, weight, labels, bias, num_items_in_batch=items)
    found = torch.autograd.grad(scale * loss, leaves)
    wide = [leaf.detach().float().requires_grad_() for leaf in leaves]
    loss = reference.linear_gated_ce(wide[0], wide[1], labels, wide[2], num_items_in_batch=items)
    expected = torch.autograd.grad(scale * loss, wide)
    for gradient, its in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient.float(), its, rtol=5e-3, atol=1e-3 * its.abs().max())


@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast(device: str, reduction: str, parameters: torch.dtype) -> None:
    """As F.linear has it: products in bfloat16, gradients in the parameters' dtype."""
    leaves, labels = _leaves(device, parameters)
    hidden, weight, bias = leaves
    found = []
    for unfused in (False, True):
        with torch.autocast(device, dtype=torch.bfloat16):
            if unfused:
                loss = gated_ce(F.linear(hidden, weight, bias), labels, reduction=reduction)
            else:
                loss = linear_gated_ce(hidden, weight, labels, bias, reduction=reduction)
        found.append([loss.sum().detach(), *torch.autograd.grad(loss.sum(), leaves)])
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=2e-2, atol=1e-2)
    # It is in bfloat16 that the logits are computed.
    exact = linear_gated_ce(*(t.detach().float() for t in (hidden, weight)), labels, bias.float())
    with torch.autocast(device, dtype=torch.bfloat16):
        rounded = linear_gated_ce(hidden, weight, labels, bias)
    assert rounded != exact


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_backward_within_autocast(device: str, reduction: str) -> None:
    """Which has nothing more to convert."""
    leaves, labels = _leaves(device)
    hidden, weight, bias = leaves
    found = []
    for enabled in (False, True):
        loss = linear_gated_ce(hidden, weight, labels, bias, reduction=reduction, chunk_size=4)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=enabled):
            found.append(torch.autograd.grad(loss.sum(), leaves))
    for one, other in zip(*found, strict=True):
        assert same_bits(one, other)


def test_autocast_leaves_float64_alone() -> None:
    leaves, labels = _leaves("cpu", torch.float64)
    hidden, weight, bias = leaves
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_gated_ce(hidden, weight, labels, bias)
        with pytest.raises(TypeError, match=r"weight is torch\.float64 and hidden"):
            linear_gated_ce(hidden.float(), weight, labels)
    assert same_bits(loss, linear_gated_ce(hidden, weight, labels, bias))


COMPILED: dict[str, dict[str, Any]] = {
    "mean": {"chunk_size": 4},
    "num_items": {"num_items_in_batch": 5},
    "frozen": {},
    **PER_TOKEN,
}


@pytest.mark.parametrize("case", COMPILED)
def test_compiled(device: str, case: str) -> None:
    """One graph for all numbers of tokens."""
    torch._dynamo.reset()

    def loss_of(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        loss = linear_gated_ce(2 * hidden, weight, labels, **COMPILED[case])
        return 3 * loss.sum()

    compiled = torch.compile(loss_of, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for num_tokens in (13, 40, 7):
            hidden, weight, _, labels = linear_inputs(num_tokens, device=device)
            leaves = [hidden.requires_grad_()]
            if case != "frozen":
                leaves.append(weight.requires_grad_())
            found = [
                torch.autograd.grad(f(hidden, weight, labels), leaves) for f in (loss_of, compiled)
            ]
            _close(*found)
    torch._dynamo.reset()


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_checkpoint(device: str, reduction: str, use_reentrant: bool) -> None:
    leaves, labels = _leaves(device)

    def loss_of(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        x = torch.tanh(hidden)
        return linear_gated_ce(x, weight, labels, bias, reduction=reduction, chunk_size=4).sum()

    expected = torch.autograd.grad(loss_of(*leaves), leaves)
    checkpoint(loss_of, *leaves, use_reentrant=use_reentrant).backward()
    _close([leaf.grad for leaf in leaves], expected)


class _Model(nn.Module):
    """Embedding and output layer are one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, HIDDEN)
        self.body = nn.Linear(HIDDEN, HIDDEN)
        self.head = nn.Linear(HIDDEN, V, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, labels: Tensor, fused: bool) -> Tensor:
        hidden = torch.tanh(self.body(self.embedding(tokens)))
        if fused:
            return linear_gated_ce(hidden, self.head.weight, labels, chunk_size=5)
        return gated_ce(self.head(hidden), labels)


def test_tied_embeddings_and_accumulation(device: str) -> None:
    """Two micro-batches and an optimizer's step, tokens [b, s]."""
    torch.manual_seed(0)
    model = _Model().to(device)
    others = copy.deepcopy(model)
    assert others.head.weight is others.embedding.weight
    for one, fused in ((model, True), (others, False)):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.5)
        for seed in (1, 2):
            generator = torch.Generator().manual_seed(seed)
            tokens, labels = torch.randint(V, (2, 3, 8), generator=generator).to(device)
            one(tokens, labels, fused).backward()
        optimizer.step()
    _close(list(model.parameters()), list(others.parameters()))


def test_lora_on_the_head(device: str) -> None:
    """The effective weight; the gradients of its factors come through it."""
    hidden, weight, _, labels = linear_inputs(N, device=device)
    torch.manual_seed(1)
    down = torch.randn(2, HIDDEN, device=device, requires_grad=True)
    up = torch.randn(V, 2, device=device, requires_grad=True)
    loss = linear_gated_ce(hidden, weight + up @ down, labels, chunk_size=4)
    found = torch.autograd.grad(loss, (down, up))
    logits = F.linear(hidden, weight) + F.linear(F.linear(hidden, down), up)
    _close(found, torch.autograd.grad(gated_ce(logits, labels), (down, up)))


LAYOUTS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "batch": lambda h, y: (h.view(3, 4, -1), y.view(3, 4)),
    "cut_off": lambda h, y: (h.view(3, 4, -1)[:, :-1], y.view(3, 4)[:, 1:]),
    "sequence_first": lambda h, y: (h.view(3, 4, -1).transpose(0, 1), y.view(3, 4).t()),
    "hidden_first": lambda h, y: (h.t().contiguous().t(), y),
    "expanded": lambda h, y: (h[:1].expand(12, -1), y),
    "one_token": lambda h, y: (h[0], y[0]),
    "int32": lambda h, y: (h, y.int()),
}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device: str, layout: str, reduction: str) -> None:
    """Of the loss's gradient times 2: what is scaled in place is stored in other ways, too."""
    hidden, weight, bias, labels = linear_inputs(12, device=device)
    # A weight that is stored by columns, too.
    weight = weight.t().contiguous().t()
    leaves = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
    x, y = LAYOUTS[layout](hidden, labels)
    found = []
    for function in (linear_gated_ce, reference.linear_gated_ce):
        loss = function(x, weight, y, bias, reduction=reduction)
        assert loss.shape == (y.shape if reduction == "none" else ())
        found.append([loss.detach(), *torch.autograd.grad(2 * loss.sum(), leaves)])
    _close(*found)


def test_batched_gradients(device: str) -> None:
    """Several upstream gradients at once, as for a Jacobian."""
    leaves, labels = _leaves(device)
    hidden, weight, bias = leaves
    loss = linear_gated_ce(hidden, weight, labels, bias)
    factors = torch.tensor([1.0, -2.0, 0.0], device=device)
    batched = torch.autograd.grad(loss, leaves, factors, retain_graph=True, is_grads_batched=True)
    for one, many in zip(torch.autograd.grad(loss, leaves), batched, strict=True):
        torch.testing.assert_close(many, factors.view(3, *[1] * one.dim()) * one)


def test_meta_tensors() -> None:
    """Shapes without memory."""
    hidden, weight, bias, labels = (t.to("meta") for t in linear_inputs())
    loss, stats = linear_gated_ce(hidden, weight, labels, bias, return_stats=True)
    assert loss.is_meta and loss.shape == () and stats.nll.shape == labels.shape


def test_function_transforms(device: str) -> None:
    """By the reference, which they can look into."""
    leaves, labels = _leaves(device)
    hidden, weight, bias = (leaf.detach() for leaf in leaves)

    def loss_of(function: Any) -> Callable[[Tensor], Tensor]:
        return lambda x: function(x, weight, labels, bias, gate=NoGate())

    ours, its = loss_of(linear_gated_ce), loss_of(reference.linear_gated_ce)
    _close([torch.func.grad(ours)(hidden)], [torch.func.grad(its)(hidden)])
    tangent = torch.ones_like(hidden)
    _close(torch.func.jvp(ours, (hidden,), (tangent,)), torch.func.jvp(its, (hidden,), (tangent,)))


def _call(**changes: Any) -> Callable[[], Any]:
    hidden, weight, bias, labels = linear_inputs(N, ignored=0)
    given: dict[str, Any] = {"hidden": hidden, "weight": weight, "labels": labels, "bias": bias}
    return lambda: linear_gated_ce(**(given | changes))


H = HIDDEN
WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "hidden": ({"hidden": [1.0]}, TypeError, "hidden must be a tensor, got list"),
    "integers": (
        {"hidden": torch.ones(N, H, dtype=torch.int64)},
        TypeError,
        "hidden must be float32, bfloat16, float16 or float64, got torch.int64",
    ),
    "scalar": ({"hidden": torch.ones(())}, ValueError, r"hidden must be \(..., H\) .* got \(\)"),
    "weight": (
        {"weight": torch.ones(V, H + 1)},
        ValueError,
        rf"weight must be \(V, H\) .* H = {H}, that of the hidden, got \({V}, {H + 1}\)",
    ),
    "transposed": ({"weight": torch.ones(H, V)}, ValueError, rf"got \({H}, {V}\)"),
    "no_words": ({"weight": torch.ones(0, H), "bias": None}, ValueError, "V of at least 1"),
    "bias": ({"bias": torch.ones(V - 1)}, ValueError, rf"bias must be \(V\) with V = {V}, .* got"),
    "dtypes": (
        {"weight": torch.ones(V, H).bfloat16()},
        TypeError,
        "weight is torch.bfloat16 and hidden torch.float32; convert one, or use torch.autocast",
    ),
    "bias_dtype": ({"bias": torch.ones(V).half()}, TypeError, "bias is torch.float16 and hidden"),
    "device": (
        {"weight": torch.ones(V, H, device="meta")},
        ValueError,
        "weight is on meta and hidden on cpu",
    ),
    "labels": (
        {"labels": torch.zeros(N + 1, dtype=torch.int64)},
        ValueError,
        rf"labels must have the shape of the hidden .* got \({N + 1},\) for hidden \({N}, {H}\)",
    ),
    "label_dtype": ({"labels": torch.zeros(N)}, TypeError, "labels must be int64 or int32"),
    "label": (
        {"labels": torch.tensor([*[1] * 9, V, *[1] * 3])},
        ValueError,
        rf"linear_gated_ce: the label at position \[9\] is {V}, outside \[0, {V}\)",
    ),
    "k": ({"k": 1}, ValueError, "linear_gated_ce: k must be from 2 to 128, or None for all, got 1"),
    "chunk_size": ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1, got 0"),
    "chunk_type": ({"chunk_size": 2.5}, TypeError, "chunk_size must be an int, got 2.5"),
    "accumulate_number": (
        {"accumulate_in_float32": 1.0},
        TypeError,
        "accumulate_in_float32 must be True, False or None, got 1.0",
    ),
    "accumulate": (
        {"accumulate_in_float32": "yes"},
        TypeError,
        "accumulate_in_float32 must be True, False or None, got 'yes'",
    ),
    "reduction": ({"reduction": "batch"}, ValueError, "reduction must be 'mean'"),
    "num_items": (
        {"num_items_in_batch": torch.ones((), device="meta")},
        ValueError,
        "num_items_in_batch is on meta and hidden on cpu",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_said(what: str) -> None:
    changes, error, sentence = WRONG[what]
    with pytest.raises(error, match=sentence):
        _call(**changes)()


def test_a_label_in_a_later_chunk_is_named_by_its_place(device: str) -> None:
    """On CUDA it has a loss of NaN instead, alone."""
    hidden, weight, bias, labels = linear_inputs(12, ignored=0, device=device)
    labels[7] = V
    shaped = hidden.view(3, 4, -1), weight, labels.view(3, 4), bias
    if device == "cpu":
        with pytest.raises(ValueError, match=r"position \[1, 3\] is 50"):
            linear_gated_ce(*shaped, chunk_size=3)
        return
    losses = linear_gated_ce(*shaped, chunk_size=3, reduction="none").flatten()
    assert losses.isnan().nonzero().tolist() == [[7]]


@pytest.mark.cuda
@pytest.mark.parametrize("ignored", [0.0, 0.5])
def test_a_cuda_graph(ignored: float) -> None:
    """Captured without a synchronisation, and replayed on other tokens."""
    hidden, weight, _, labels = linear_inputs(40, ignored=ignored, device="cuda")
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]

    def gradients() -> list[Tensor]:
        loss = linear_gated_ce(hidden, weight, labels, chunk_size=16)
        return [loss, *torch.autograd.grad(loss, leaves)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        gradients()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients()
    others = linear_inputs(40, ignored=ignored, device="cuda", seed=1)
    with torch.no_grad():
        hidden.copy_(others[0])
        labels.copy_(others[3])
    graph.replay()
    _close(captured, gradients())


def test_eaft_ext_has_it() -> None:
    assert eaft_ext.linear_gated_ce is linear_gated_ce
    assert {"linear_gated_ce", "vocab_parallel_linear_gated_ce"} <= set(eaft_ext.__all__)
