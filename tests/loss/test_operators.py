"""torch.library's own checks of every operator: schema, fake tensors, autograd, dispatch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from inputs import make, upstream_of
from linear_cases import linear_inputs
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import eaft_ext

ops = torch.ops.eaft_ext

V = 37


def _vocabulary_first(device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    logits, labels = make(6, V, dtype, device=device)
    return logits.t().contiguous().t(), labels


def _six_dimensions(device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    logits, labels = make(32, V, dtype, device=device)
    mixed = logits.view(2, 2, 2, 2, 2, V).permute(4, 3, 2, 1, 0, 5)
    return mixed, labels.view(2, 2, 2, 2, 2)


# Logits and labels of many kinds. The fake tensors must have the strides of the real ones.
SAMPLES: dict[str, Callable[[str, torch.dtype], tuple[Tensor, Tensor]]] = {
    "plain": lambda device, dtype: make(5, V, dtype, device=device),
    "many_rows": lambda device, dtype: make(12, V, dtype, device=device, ignored=0.3),
    "int32_labels": lambda device, dtype: (
        make(5, V, dtype, device=device)[0],
        make(5, V, dtype, device=device)[1].int(),
    ),
    "all_ignored": lambda device, dtype: make(5, V, dtype, device=device, ignored=1.0),
    "no_rows": lambda device, dtype: make(0, V, dtype, device=device),
    "one_row": lambda device, dtype: tuple(x[0] for x in make(1, V, dtype, device=device)),
    "one_logit": lambda device, dtype: make(5, 1, dtype, device=device),
    "cut_off": lambda device, dtype: (
        make(12, V, dtype, device=device)[0].view(3, 4, V)[:, :-1],
        make(9, V, dtype, device=device)[1].view(3, 3),
    ),
    "sequence_first": lambda device, dtype: (
        make(12, V, dtype, device=device)[0].view(4, 3, V).transpose(0, 1),
        make(12, V, dtype, device=device)[1].view(3, 4),
    ),
    "padded": lambda device, dtype: (
        make(5, V + 3, dtype, device=device)[0][:, :V],
        make(5, V, dtype, device=device)[1],
    ),
    "vocabulary_first": _vocabulary_first,
    "six_dimensions": _six_dimensions,
    "one_logit_of_several": lambda device, dtype: (
        make(5, 3, dtype, device=device)[0][:, 1:2],
        torch.zeros(5, dtype=torch.int64, device=device),
    ),
    "expanded": lambda device, dtype: (
        make(1, V, dtype, device=device)[0].expand(5, V),
        make(5, V, dtype, device=device)[1],
    ),
    "sliding_window": lambda device, dtype: (
        make(1, V + 4, dtype, device=device)[0][0].unfold(0, V, 1),
        make(5, V, dtype, device=device)[1],
    ),
}
OVERWRITABLE = [
    name
    for name in SAMPLES
    if name not in ("vocabulary_first", "six_dimensions", "expanded", "sliding_window")
]

FORWARD_OPTIONS = (4, "entropy", [2.0], -100)


def _arguments(op: str, logits: Tensor, labels: Tensor) -> tuple[Any, ...]:
    """What an operator is called with, on these logits."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    upstream = upstream_of(labels, dtype)
    if op == "gated_ce_forward":
        return logits, labels, *FORWARD_OPTIONS
    if op.startswith("gated_ce_backward"):
        forward = ops.gated_ce_forward(logits.detach(), labels, *FORWARD_OPTIONS)
        *_, gate, row_max, log_sum, _ = forward
        return upstream * gate, logits, labels, row_max, log_sum, -100
    if op.startswith("gated_ce_forward_with_grad"):
        return upstream, logits, labels, *FORWARD_OPTIONS
    if op in SHARD_OPERATORS:
        return _arguments_of_a_shard(op, logits, labels, vocab_start=0, vocab_size=None)
    if op == "scale_gradient_":
        return logits, torch.tensor(0.5, device=logits.device)
    assert op == "topk"
    return logits, min(4, logits.size(-1))


def _partials(logits: Tensor, labels: Tensor, k: int = 4, *options: Any) -> Tensor:
    """Of two shards with these words, the second one's from V on."""
    return torch.stack(
        [
            ops.gated_ce_partial(logits.detach(), labels, k, start, None, -100, *options)
            for start in (0, V)
        ]
    )


def _arguments_of_a_shard(
    op: str, logits: Tensor, labels: Tensor, vocab_start: int, vocab_size: int | None
) -> tuple[Any, ...]:
    """The same of an operator on a shard of the vocabulary; another shard has words from V on."""
    if op == "gated_ce_partial":
        return logits, labels, 4, vocab_start, vocab_size, -100
    if op == "gated_ce_merge":
        partials = _partials(logits, labels)
        return logits, labels, partials, *FORWARD_OPTIONS, vocab_start, vocab_size
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    weight = upstream_of(labels, dtype)
    row_max, log_sum = torch.full_like(weight, 9.0), torch.ones_like(weight)
    return weight, logits, labels, row_max, log_sum, -100, vocab_start, vocab_size


FAMILY = [5.0, 0.5, 0.1, 1e-2]


def _with_family(op: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same call, of a soft cap, a logit scale and a z-loss."""
    if op == "gated_ce_merge":
        logits, labels, _, *options = arguments
        return logits, labels, _partials(logits, labels, 4, FAMILY), *options, False, FAMILY
    if op == "gated_ce_forward":
        return *arguments, False, FAMILY
    if op.startswith("gated_ce_backward"):
        weight, *_ = arguments
        shard = () if len(arguments) == 8 else (None, None)
        return *arguments, *shard, weight / 2, FAMILY
    return *arguments, FAMILY


SHARD_OPERATORS = ["gated_ce_partial", "gated_ce_merge"]
DIFFERENTIABLE = ["gated_ce_forward", "gated_ce_merge", "gated_ce_backward", "topk"]
OPERATORS = [*DIFFERENTIABLE, "gated_ce_partial", "gated_ce_forward_with_grad"]
LINEAR_OPERATORS = [
    "linear_gated_ce_forward",
    "linear_gated_ce_backward",
    "linear_gated_ce_forward_with_grad",
]
IN_PLACE_OPERATORS = ["gated_ce_backward_", "gated_ce_forward_with_grad_", "scale_gradient_"]


def test_every_operator_is_here() -> None:
    names = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("eaft_ext::")
    }
    assert names == {*OPERATORS, *IN_PLACE_OPERATORS, *LINEAR_OPERATORS}


CHECKS = ["test_schema", "test_autograd_registration", "test_faketensor"]


def _check(op: str, arguments: tuple[Any, ...]) -> None:
    checks = [*CHECKS, "test_aot_dispatch_dynamic"]
    if op == "gated_ce_partial" and ops.gated_ce_partial(*arguments).isnan().any():
        checks = CHECKS  # the other one compares, and takes NaN for different from NaN
    torch.library.opcheck(getattr(ops, op).default, arguments, test_utils=checks)


@pytest.mark.parametrize("sample", ["plain", "cut_off"])
@pytest.mark.parametrize("op", [*OPERATORS, *IN_PLACE_OPERATORS])
def test_opcheck(device: str, dtype: torch.dtype, op: str, sample: str) -> None:
    logits, labels = SAMPLES[sample](device, dtype)
    _check(op, _arguments(op, logits, labels))


@pytest.mark.slow
@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("op", OPERATORS)
def test_opcheck_of_layouts(device: str, op: str, sample: str) -> None:
    logits, labels = SAMPLES[sample](device, torch.bfloat16)
    _check(op, _arguments(op, logits, labels))


@pytest.mark.slow
@pytest.mark.parametrize("sample", OVERWRITABLE)
@pytest.mark.parametrize("op", IN_PLACE_OPERATORS)
def test_opcheck_of_layouts_in_place(device: str, op: str, sample: str) -> None:
    logits, labels = SAMPLES[sample](device, torch.bfloat16)
    _check(op, _arguments(op, logits, labels))


@pytest.mark.parametrize("inplace_backward", [False, True])
@pytest.mark.parametrize("sample", ["plain", "cut_off", "sequence_first", "all_ignored"])
def test_opcheck_with_gradient(device: str, sample: str, inplace_backward: bool) -> None:
    logits, labels = SAMPLES[sample](device, torch.float32)
    arguments = (logits.detach().clone().requires_grad_(), labels, *FORWARD_OPTIONS)
    _check("gated_ce_forward", (*arguments, inplace_backward))


SHARDS = {
    "first": (0, None),
    "middle": (7, None),
    "padded": (7, 7 + V // 2),
    "all_padding": (V, V),
}


def _no_columns(device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    _, labels = make(5, V, device=device, ignored=1.0)
    return torch.empty(5, 0, dtype=dtype, device=device), labels


# What is laid out with the vocabulary first cannot be overwritten; test_layouts.py has the error.
OF_SHARDS = [
    (op, sample)
    for op in (*SHARD_OPERATORS, "gated_ce_backward", "gated_ce_backward_")
    for sample in ("plain", "cut_off", "vocabulary_first", "no_rows", "no_columns")
    if (op, sample) != ("gated_ce_backward_", "vocabulary_first")
]


@pytest.mark.parametrize("shard", SHARDS.values(), ids=SHARDS.keys())
@pytest.mark.parametrize(
    ("op", "sample"),
    [
        pytest.param(*both, id="-".join(both), marks=() if "plain" in both else pytest.mark.slow)
        for both in OF_SHARDS
    ],
)
@pytest.mark.operator("gated_ce_merge")
def test_opcheck_of_a_shard(
    device: str, op: str, sample: str, shard: tuple[int, int | None]
) -> None:
    build = _no_columns if sample == "no_columns" else SAMPLES[sample]
    arguments = _arguments_of_a_shard(op, *build(device, torch.bfloat16), *shard)
    _check(op, arguments)
    if op != "gated_ce_backward_":
        _assert_fake_is_like_real(op, arguments)


@pytest.mark.parametrize("inplace_backward", [False, True])
@pytest.mark.parametrize("shard", SHARDS.values(), ids=SHARDS.keys())
@pytest.mark.parametrize(
    "sample",
    [
        "plain",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("cut_off", "sequence_first", "all_ignored")
        ),
    ],
)
@pytest.mark.operator("gated_ce_merge")
def test_opcheck_of_merge_with_gradient(
    device: str, sample: str, shard: tuple[int, int | None], inplace_backward: bool
) -> None:
    logits, labels = SAMPLES[sample](device, torch.float32)
    logits = logits.detach().clone().requires_grad_()
    arguments = _arguments_of_a_shard("gated_ce_merge", logits, labels, *shard)
    _check("gated_ce_merge", (*arguments, inplace_backward))


@pytest.mark.parametrize(
    "op", [op for op in [*OPERATORS, *IN_PLACE_OPERATORS] if op not in ("topk", "scale_gradient_")]
)
def test_opcheck_of_the_family(device: str, dtype: torch.dtype, op: str) -> None:
    logits, labels = SAMPLES["plain"](device, dtype)
    arguments = _with_family(op, _arguments(op, logits, labels))
    if op in ("gated_ce_forward", "gated_ce_merge"):
        arguments[0].requires_grad_()
    _check(op, arguments)


OF_STATS = [
    "gated_ce_forward",
    "gated_ce_merge",
    "gated_ce_forward_with_grad",
    "gated_ce_forward_with_grad_",
]


@pytest.mark.parametrize("num_extra", [0, 2, 3])
@pytest.mark.parametrize("k", [0, 4], ids=["all_logits", "top_4"])
@pytest.mark.parametrize("op", OF_STATS)
def test_opcheck_of_more_stats(device: str, op: str, k: int, num_extra: int) -> None:
    """Of the entropy of all logits, as the gate's and beside it; and what shards tell of it."""
    logits, labels = SAMPLES["plain"](device, torch.float32)
    options = (k, *FORWARD_OPTIONS[1:])
    arguments: tuple[Any, ...]
    if op.startswith("gated_ce_forward_with_grad"):
        arguments = (upstream_of(labels), logits, labels, *options, [], num_extra)
    elif op == "gated_ce_forward":
        arguments = (logits.requires_grad_(), labels, *options, False, [], num_extra)
    else:
        tells_entropy = num_extra == 3
        told = (logits, labels, k, 0, None, -100, [], tells_entropy)
        _check("gated_ce_partial", told)
        _assert_fake_is_like_real("gated_ce_partial", told)
        partials = _partials(logits, labels, k, [], tells_entropy)
        others = (0, None, False, [], None, num_extra)
        arguments = (logits.requires_grad_(), labels, partials, *options, *others)
    _check(op, arguments)
    if not op.endswith("_"):
        _assert_fake_is_like_real(op, arguments)


def test_opcheck_of_topk_with_gradient(device: str) -> None:
    logits, _ = SAMPLES["plain"](device, torch.float32)
    _check("topk", (logits.requires_grad_(), 4))


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("op", OPERATORS)
def test_fake_outputs_have_the_real_ones_strides(device: str, op: str, sample: str) -> None:
    """A compiler lays out memory by the fake ones."""
    logits, labels = SAMPLES[sample](device, torch.float32)
    _assert_fake_is_like_real(op, _arguments(op, logits, labels))


def _assert_fake_is_like_real(op: str, arguments: tuple[Any, ...]) -> None:
    real = getattr(ops, op)(*arguments)
    with FakeTensorMode() as mode:
        fake_arguments = [
            mode.from_tensor(argument) if isinstance(argument, Tensor) else argument
            for argument in arguments
        ]
        fake = getattr(ops, op)(*fake_arguments)
    as_tuple = [(x,) if isinstance(x, Tensor) else tuple(x) for x in (real, fake)]
    for a, b in zip(*as_tuple, strict=True):
        assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
        # The stride of a dimension of one element, or of a tensor of none, is nobody's concern.
        steps = [
            [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]
            for x in (a, b)
        ]
        assert a.numel() == 0 or steps[0] == steps[1]


def test_meta_tensors() -> None:
    """Shapes without memory, as when a model is laid out before it is loaded."""
    logits = torch.empty(2, 3, V, dtype=torch.bfloat16, device="meta", requires_grad=True)
    labels = torch.empty(2, 3, dtype=torch.int64, device="meta")
    loss, stats = eaft_ext.gated_ce(logits, labels, reduction="none", return_stats=True)
    assert loss.shape == (2, 3) and loss.dtype == torch.float32 and loss.is_meta
    assert stats.entropy.shape == (2, 3)
    loss.sum().backward()
    assert logits.grad is not None and logits.grad.shape == logits.shape
    partial = ops.gated_ce_partial(logits.detach(), labels, 4, V, None, -100)
    assert partial.shape == (2, 3, 7) and partial.dtype == torch.float32 and partial.is_meta
    *merged, extra = ops.gated_ce_merge(logits, labels, partial[None], 4, "none", [], -100, V, None)
    assert extra.shape == (0, 2, 3) and extra.dtype == torch.float32
    assert all(value.shape == (2, 3) and value.dtype == torch.float32 for value in merged)
    values, indices = eaft_ext.topk(logits, 4)
    assert values.shape == indices.shape == (2, 3, 4)
    assert values.dtype == torch.bfloat16 and indices.dtype == torch.int64


def _arguments_of_a_product(
    op: str, dtype: torch.dtype, device: str, wanted: list[bool], **inputs: Any
) -> tuple[Any, ...]:
    """For the linear loss; ``wanted`` are the gradients of hidden, weight and bias."""
    by_columns = inputs.pop("by_columns", False)
    k, num_extra = inputs.pop("k", FORWARD_OPTIONS[0]), inputs.pop("num_extra", 0)
    hidden, weight, bias, labels = linear_inputs(dtype=dtype, device=device, **inputs)
    gate = FORWARD_OPTIONS[1:]
    chunking, shard = (4, None, 0.0), (0, None, len(weight), None, 1, False)
    options = (k, *gate, [], num_extra, True, *chunking, *shard)
    if by_columns:
        weight = weight.t().contiguous().t()
    given = (hidden, weight, bias if wanted[2] else None, labels)
    if op == "linear_gated_ce_backward":
        _, nll, _, *stats, _ = ops.linear_gated_ce_forward(*given, *options)
        return stats[0] * 2, nll, *stats, wanted, *given, *options
    for tensor, wants in zip(given[:3], wanted, strict=True):
        if tensor is not None:
            tensor.requires_grad_(wants)
    if op == "linear_gated_ce_forward":
        return *given, *options
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    divisor = torch.tensor(2.0, dtype=wide, device=device)
    return *given, divisor, None, wanted, *options


ALL_WANTED = [True, True, True]


@pytest.mark.operator("gated_ce_forward_with_grad")
@pytest.mark.parametrize("op", LINEAR_OPERATORS)
def test_opcheck_of_a_product(device: str, dtype: torch.dtype, op: str) -> None:
    arguments = _arguments_of_a_product(op, dtype, device, ALL_WANTED)
    _check(op, arguments)
    _assert_fake_is_like_real(op, arguments)


@pytest.mark.operator("gated_ce_forward_with_grad")
@pytest.mark.parametrize(
    "inputs",
    [
        {"num_tokens": 0},
        {"ignored": 1.1},
        {"ignored": 0},
        {"by_columns": True},
        {"k": 0, "num_extra": 2},
        {"k": 0, "num_extra": 3},
        {"num_extra": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("wanted", [ALL_WANTED, [True, False, False], [False, True, False]])
@pytest.mark.parametrize("op", LINEAR_OPERATORS)
def test_opcheck_of_some_products(
    device: str, op: str, wanted: list[bool], inputs: dict[str, Any]
) -> None:
    arguments = _arguments_of_a_product(op, torch.float32, device, wanted, **dict(inputs))
    _check(op, arguments)
    _assert_fake_is_like_real(op, arguments)
