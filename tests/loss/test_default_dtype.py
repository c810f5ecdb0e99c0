"""Results owe nothing to ``torch.set_default_dtype`` and ``torch.set_default_device``.

What is public gives the same bits, in the same dtypes, as it gives by default (torchao #2286).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from gate_cases import BUILT_IN
from inputs import dtype_name, make, same_bits
from linear_cases import linear_inputs
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

import eaft_ext
from eaft_ext import GatedCrossEntropyLoss, gated_ce, linear_gated_ce, reference

pytestmark = pytest.mark.usefixtures("group_of_one")

V = 77


def _own_gate(nll: Tensor, entropy: Tensor) -> Tensor:
    """Weights that have no dtype of floats."""
    return entropy > 1


OPTIONS: dict[str, dict[str, Any]] = {
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "number": {"num_items_in_batch": 7.3},
    "integer": {"num_items_in_batch": torch.tensor(7)},
    "float64": {"num_items_in_batch": torch.tensor(7.3, dtype=torch.float64)},
    "normalizer": {"alpha": 0.5, "normalizer": 3.0},
    "own_gate": {"gate": _own_gate},
    "whole_entropy": {"k": None},
    **{str(gate): {"gate": gate} for gate in BUILT_IN},
}


def _in_forward(*tensors: Tensor, inplace: bool = False, **options: Any) -> Any:
    possible = options.get("reduction") != "none"
    return gated_ce(
        *tensors, gradient_in_forward=possible, inplace_backward=inplace and possible, **options
    )


def _module(
    logits: Tensor, labels: Tensor, num_items_in_batch: Any = None, **options: Any
) -> Tensor:
    return GatedCrossEntropyLoss(**options)(logits, labels, num_items_in_batch)


def _placed(tensor: Tensor, placement: Placement) -> DTensor:
    return DTensor.from_local(tensor, init_device_mesh("cpu", (1,)), [placement])


def _of_dtensor(logits: Tensor, labels: Tensor, placement: Placement, **options: Any) -> Tensor:
    return gated_ce(_placed(logits, placement), labels, **options).to_local()


def _in_shards(*tensors: Tensor, **options: Any) -> Any:
    return eaft_ext.vocab_parallel_gated_ce(*tensors, group=dist.group.WORLD, **options)


ON_LOGITS: dict[str, Callable[..., Any]] = {
    "gated_ce": partial(gated_ce, return_stats=True),
    "in_place": partial(gated_ce, inplace_backward=True),
    "in_forward": partial(_in_forward, return_stats=True),
    "in_forward_and_place": partial(_in_forward, inplace=True),
    "module": _module,
    "reference": partial(reference.gated_ce, return_stats=True),
    "dtensor_of_rows": partial(_of_dtensor, placement=Shard(0)),
    "dtensor_of_words": partial(_of_dtensor, placement=Shard(1)),
    "in_shards": partial(_in_shards, return_stats=True),
}


def _linear_of_dtensors(
    hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, **options: Any
) -> Tensor:
    return linear_gated_ce(
        _placed(hidden, Replicate()),
        _placed(weight, Shard(0)),
        labels,
        _placed(bias, Shard(0)),
        **options,
    ).to_local()


def _linear(function: Any, **given: Any) -> Callable[..., Any]:
    def call(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, **options: Any) -> Any:
        return function(hidden, weight, labels, bias, **given, **options)

    return call


def _linear_in_shards(*tensors: Tensor, **options: Any) -> Any:
    return eaft_ext.vocab_parallel_linear_gated_ce(*tensors, group=dist.group.WORLD, **options)


ON_HIDDEN: dict[str, Callable[..., Any]] = {
    "linear": _linear(linear_gated_ce, return_stats=True),
    "linear_in_chunks": _linear(linear_gated_ce, chunk_size=4),
    "linear_sums_in_float32": _linear(linear_gated_ce, chunk_size=4, accumulate_in_float32=True),
    "linear_reference": _linear(reference.linear_gated_ce, return_stats=True),
    "linear_in_shards": _linear(_linear_in_shards, return_stats=True),
    "linear_of_dtensors": _linear_of_dtensors,
}

OF_ROWS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "topk": lambda x, y: eaft_ext.topk(x, 20),
    "reference_topk": lambda x, y: reference.topk(x, 20),
    "topk_entropy": lambda x, y: reference.topk_entropy(x, 20),
    "vocab_entropy": lambda x, y: reference.vocab_entropy(x),
    "cross_entropy": lambda x, y: reference.cross_entropy(x, torch.where(y == 3, V, y)),
    "shard_partial": lambda x, y: reference.shard_partial(x, y, 20, 5),
    "merge_partials": lambda x, y: reference.merge_partials(
        reference.shard_partial(x, y, 20, 0)[None], y
    ),
    "shard_gradient": lambda x, y: reference.shard_gradient(
        x.float().sum(1), x, y, x.float().sum(1), x.float().sum(1), 5
    ),
}


Default = torch.dtype | torch.device


@pytest.fixture(
    params=[
        pytest.param(torch.float16, marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, marks=pytest.mark.slow),
        torch.float64,
        torch.device("meta"),
    ],
    ids=dtype_name,
)
def default(request: pytest.FixtureRequest) -> Default:
    """Another default than float32, or than the CPU."""
    return request.param


@contextmanager
def _by_default(default: Default | None) -> Iterator[None]:
    before = torch.get_default_dtype()
    if isinstance(default, torch.dtype):
        torch.set_default_dtype(default)
    try:
        with default if isinstance(default, torch.device) else nullcontext():
            yield
    finally:
        torch.set_default_dtype(before)


def _flat(results: Any) -> list[Tensor]:
    if results is None:
        return []
    return [results] if isinstance(results, Tensor) else [t for r in results for t in _flat(r)]


def _results(
    call: Callable[..., Any],
    leaves: Sequence[Tensor],
    labels: Tensor,
    default: Default | None = None,
) -> list[Tensor]:
    """Loss and stats, and the gradients of three times the loss."""
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    with _by_default(default):
        loss, *stats = _flat(call(*leaves, labels))
        gradients = torch.autograd.grad(loss, leaves, torch.full_like(loss, 3))
    return [loss.detach(), *stats, *gradients]


def _assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.device == other.device
        if one.is_floating_point():
            assert same_bits(one, other)
        else:
            assert one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("function", ["in_forward", "reference", "gated_ce"])
def test_is_right(default: Default, function: str) -> None:
    """By the reference in float64; the mean of 293 tokens is where a rounded 1 / 293 shows."""
    logits, labels = make(293, V)
    expected = _results(ON_LOGITS["reference"], [logits.double()], labels)
    for one, truth in zip(
        _results(ON_LOGITS[function], [logits], labels, default), expected, strict=True
    ):
        assert one.dtype in (torch.float32, torch.bool)
        torch.testing.assert_close(one.to(truth), truth, rtol=1e-5, atol=1e-8)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("function", ON_LOGITS)
def test_of_logits(default: Default, function: str, dtype: torch.dtype) -> None:
    logits, labels = make(12, V, dtype, ignored=0.2)
    for options in OPTIONS.values():
        call = partial(ON_LOGITS[function], **options)
        found = _results(call, [logits], labels, default)
        _assert_same(found, _results(call, [logits], labels))


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("function", ON_HIDDEN)
def test_of_hidden(default: Default, function: str, dtype: torch.dtype) -> None:
    *leaves, labels = linear_inputs(dtype=dtype)
    for options in OPTIONS.values():
        call = partial(ON_HIDDEN[function], **options)
        found = _results(call, leaves, labels, default)
        _assert_same(found, _results(call, leaves, labels))


@pytest.mark.parametrize("function", OF_ROWS)
def test_of_rows(default: Default, function: str, dtype: torch.dtype) -> None:
    logits, labels = make(12, V, dtype, ignored=0.2)
    expected = OF_ROWS[function](logits, labels)
    with _by_default(default):
        found = OF_ROWS[function](logits, labels)
    _assert_same(_flat(found), _flat(expected))


def test_compiled(default: Default) -> None:
    """All in one graph, which is compiled anew for another default."""
    logits, all_labels = make(12, V, ignored=0.2)
    *leaves, labels = linear_inputs()

    def losses(logits: Tensor, *leaves: Tensor) -> Iterator[tuple[Tensor, Any]]:
        for options in OPTIONS.values():
            yield gated_ce(logits, all_labels, return_stats=True, **options)
            yield ON_HIDDEN["linear"](*leaves, labels, **options)

    def total(*tensors: Tensor) -> list[Any]:
        results = list(losses(*tensors[:-1]))
        return [torch.stack([loss.sum() for loss, _ in results]).sum(), *results]

    torch._dynamo.reset()
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    found = [_results(compiled, [logits, *leaves], labels, one) for one in (None, default, None)]
    _assert_same(found[1], found[0])
    _assert_same(found[2], found[0])
