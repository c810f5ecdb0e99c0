"""torch.compile of function transforms and of forward mode: as in eager mode (pytorch #193279)."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from inputs import make
from linear_cases import linear_inputs
from torch import Tensor
from torch import distributed as dist
from torch.autograd import forward_ad
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate

import eaft_ext
from eaft_ext import gated_ce, linear_gated_ce, reference

Function = Callable[[Tensor], Any]


def _in_forward_mode(function: Function) -> Function:
    def derivative(x: Tensor) -> Tensor | None:
        with forward_ad.dual_level():
            loss = function(forward_ad.make_dual(x, torch.ones_like(x)))
            return forward_ad.unpack_dual(loss).tangent

    return derivative


# From a function of one matrix to another one.
TRANSFORMS: dict[str, Callable[[Function], Function]] = {
    "grad": torch.func.grad,
    "grad_and_value": torch.func.grad_and_value,
    "jacrev": torch.func.jacrev,
    "jacfwd": torch.func.jacfwd,
    "hessian": torch.func.hessian,
    "vjp": lambda f: lambda x: torch.func.vjp(f, x)[1](torch.ones_like(x[0, 0])),
    "jvp": lambda f: lambda x: torch.func.jvp(f, (x,), (torch.ones_like(x),)),
    "vmap": lambda f: lambda x: torch.func.vmap(f)(torch.stack([x, 2 * x])),
    "vmap_grad": lambda f: lambda x: torch.func.vmap(torch.func.grad(f))(torch.stack([x, 2 * x])),
    "forward_mode": _in_forward_mode,
}
TRANSFORMED = pytest.mark.parametrize("transform", TRANSFORMS)
OWN_GATE = {"gate": lambda nll, entropy: (-nll).exp() * entropy, "reduction": "sum"}
each_option = pytest.mark.parametrize(
    "options",
    [pytest.param({}, id="default"), pytest.param(OWN_GATE, id="own_gate", marks=pytest.mark.slow)],
)


@pytest.fixture(autouse=True)
def _nothing_is_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _compiled(function: Function, transform: str) -> Function:
    """In one graph, where torch has one: it may break the graph at a level of forward mode."""
    return torch.compile(function, fullgraph=transform != "forward_mode", backend="aot_eager")


def _assert_right(found: Any, truth: Any) -> None:
    torch.testing.assert_close(found, truth, check_dtype=False, rtol=1e-5, atol=1e-5)


@each_option
@TRANSFORMED
def test_of_gated_ce(device: str, transform: str, options: dict[str, Any]) -> None:
    logits, labels = make(5, 33, device=device, ignored=0.2)
    wrap = TRANSFORMS[transform]
    compiled = _compiled(wrap(lambda x: gated_ce(x, labels, **options)), transform)
    truth = wrap(lambda x: reference.gated_ce(x, labels, **options))
    _assert_right(compiled(logits), truth(logits.double()))


@each_option
@TRANSFORMED
def test_of_linear_gated_ce(device: str, transform: str, options: dict[str, Any]) -> None:
    """Of hidden and weight, which both depend on the matrix."""
    hidden, weight, bias, labels = linear_inputs(5, device=device)
    wrap = TRANSFORMS[transform]

    def loss_of(function: Any, dtype: torch.dtype) -> Function:
        w, b = weight.to(dtype), bias.to(dtype)
        return lambda x: function(x, w + x.mean(), labels, b, **options)

    compiled = _compiled(wrap(loss_of(linear_gated_ce, torch.float32)), transform)
    truth = wrap(loss_of(reference.linear_gated_ce, torch.float64))
    _assert_right(compiled(hidden), truth(hidden.double()))


@pytest.mark.parametrize(
    "options", [{"inplace_backward": True}, {"gradient_in_forward": True}], ids=str
)
def test_what_is_for_kernels_changes_nothing(device: str, options: dict[str, Any]) -> None:
    logits, labels = make(5, 33, device=device, ignored=0.2)
    before = logits.clone()
    compiled = _compiled(torch.func.grad(lambda x: gated_ce(x, labels, **options)), "grad")
    truth = torch.func.grad(lambda x: reference.gated_ce(x, labels))
    _assert_right(compiled(logits), truth(logits.double()))
    assert torch.equal(logits, before)


def test_topk(device: str) -> None:
    logits, _ = make(5, 33, device=device)
    compiled = _compiled(torch.func.vmap(lambda row: eaft_ext.topk(row, 7)), "vmap")
    for one, other in zip(compiled(logits), eaft_ext.topk(logits, 7), strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
def test_inductor(device: str) -> None:
    if device == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("torch.compile needs a C++ compiler on the CPU; install g++")
    logits, labels = make(5, 33, device=device, ignored=0.2)
    hidden, weight, _, tokens = linear_inputs(5, device=device)
    for function, its_reference, x, rest in (
        (gated_ce, reference.gated_ce, logits, (labels,)),
        (linear_gated_ce, reference.linear_gated_ce, hidden, (weight, tokens)),
    ):
        compiled = torch.compile(torch.func.grad(function), fullgraph=True)
        wide = [t.double() if t.is_floating_point() else t for t in (x, *rest)]
        _assert_right(compiled(x, *rest), torch.func.grad(its_reference)(*wide))


def test_a_gradient_within_a_step(device: str) -> None:
    """Of both kinds in one graph: what is not transformed takes the kernel, and nothing else."""
    logits, labels = make(5, 33, device=device, ignored=0.2)
    logits.requires_grad_()
    graphs: list[str] = []

    def backend(module: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(module.code)
        return module.forward

    def step(x: Tensor) -> Tensor:
        direction = torch.func.grad(lambda z: gated_ce(z, labels))(x.detach())
        return gated_ce(x + direction, labels)

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    found, expected = (torch.autograd.grad(f(logits), logits) for f in (compiled, step))
    torch.testing.assert_close(found, expected)
    assert len(graphs) == 1
    assert graphs[0].count("eaft_ext.gated_ce_forward(") == 1
    assert "_are_functorch_transforms_active" not in graphs[0]


def test_compiled_anew_for_forward_mode(device: str) -> None:
    """A graph with kernels has no derivative that forward mode could see."""
    logits, labels = make(5, 33, device=device, ignored=0.2)
    compiled = torch.compile(lambda x: gated_ce(x, labels), backend="aot_eager")
    plain = compiled(logits)
    truth = _in_forward_mode(lambda x: reference.gated_ce(x, labels))(logits.double())
    _assert_right(_in_forward_mode(compiled)(logits), truth)
    assert torch.equal(compiled(logits), plain)


LABELS = torch.tensor([3, 0, -100, 7, 2])
WEIGHT = torch.linspace(-1, 1, 20 * 16).view(20, 16)


SHARDS: dict[str, Function] = {
    "logits": lambda x: eaft_ext.vocab_parallel_gated_ce(x, LABELS, group=dist.group.WORLD),
    "hidden": lambda x: eaft_ext.vocab_parallel_linear_gated_ce(
        x, WEIGHT, LABELS, group=dist.group.WORLD
    ),
}


@pytest.mark.usefixtures("group_of_one")
@pytest.mark.parametrize("compiles", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("what", SHARDS)
@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp", "forward_mode"])
def test_shards_refuse_them(transform: str, what: str, compiles: bool) -> None:
    function = TRANSFORMS[transform](SHARDS[what])
    if compiles:
        function = torch.compile(function, backend="aot_eager")
    with pytest.raises(RuntimeError, match=r"torch\.func and forward mode cannot look into"):
        function(make(5, 16)[0])


@pytest.mark.usefixtures("group_of_one")
@pytest.mark.parametrize("what", SHARDS)
def test_dtensors_refuse_forward_mode(what: str) -> None:
    """Where DTensor itself does not: a compiler may drop the derivative."""
    mesh = init_device_mesh("cpu", (1,))
    weight = DTensor.from_local(WEIGHT, mesh, [Replicate()])

    def loss(x: Tensor) -> Tensor:
        placed = DTensor.from_local(x, mesh, [Replicate()])
        if what == "logits":
            return gated_ce(placed, LABELS).to_local()
        return linear_gated_ce(placed, weight, LABELS).to_local()

    derivative = torch.compile(_in_forward_mode(loss), backend="aot_eager")
    with pytest.raises(RuntimeError, match="forward mode"):
        derivative(make(5, 16)[0])
