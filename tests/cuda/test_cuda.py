"""What only a GPU shows: graphs, streams, several devices, memory, sizes beyond 2^32, each plan.

That the kernels compute right is also the matter of every other test with a ``device``, and of
test_kernels_on_host.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from error_model import error_weights
from inputs import IGNORED, make, same_bits, upstream_of
from parity import Outcome, assert_outcome, assert_parity, outcome
from test_kernels_on_host import assert_right
from torch import Tensor

from eaft_ext import EntropyGate, GatedCrossEntropyLoss, NoGate, gated_ce, reference, topk
from eaft_ext.gates import Gate

ops = torch.ops.eaft_ext

# Every test runs on CUDA alone.
pytestmark = [
    pytest.mark.usefixtures("device"),
    pytest.mark.parametrize("device", ["cuda"], indirect=True),
    pytest.mark.operator("gated_ce_forward_with_grad"),
]

MB = 2**20
OPTIONS = (20, "entropy", [1.0], IGNORED)

# Rows, and the bytes of one, for each plan of gated_ce_forward_with_grad.cu on a device with
# clusters, 227 KB of shared memory and 50 MB of L2. Elsewhere they are rows like any others.
PLANS = {
    "two_kernels": (3, 200_028),
    "clusters_of_1": (300, 4_012),
    "clusters_of_2": (150, 80_004),
    "clusters_of_4": (70, 160_020),
    "clusters_of_8": (70, 303_872),
    "clusters_of_8_with_large_spans": (40, 607_748),
    "l2": (24, 880_004),
    "two_kernels_of_long_rows": (24, 2 * MB),
}
each_plan = pytest.mark.parametrize("plan", PLANS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])


def inputs(plan: str, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> tuple[Tensor, Tensor]:
    num_rows, vocab_size = PLANS[plan][0], PLANS[plan][1] // dtype.itemsize
    generator = torch.Generator("cuda").manual_seed(seed)
    logits = torch.randn(num_rows, vocab_size, generator=generator, device="cuda") * 3
    labels = torch.randint(vocab_size, (num_rows,), generator=generator, device="cuda")
    labels[2::5] = IGNORED
    return logits.to(dtype), labels


def fused(
    logits: Tensor, labels: Tensor, *, k: int, gate: Gate, inplace: bool = False, **_: object
) -> Outcome:
    """The outcome of ``gated_ce_forward_with_grad``."""
    asked = (labels, k, gate.name, gate.parameters(), IGNORED)
    if not inplace:
        *stats, _, found = ops.gated_ce_forward_with_grad(upstream_of(labels), logits, *asked)
        return Outcome(*stats, found)
    own = torch.empty_strided(logits.shape, logits.stride(), dtype=logits.dtype, device="cuda")
    own.copy_(logits)
    *stats, _ = ops.gated_ce_forward_with_grad_(upstream_of(labels), own, *asked)
    return Outcome(*stats, own)


def everything(logits: Tensor, labels: Tensor) -> list[Tensor]:
    """The results of all operators, without a host that waits."""
    upstream = torch.linspace(-2, 3, len(labels), device=labels.device)
    stats = ops.gated_ce_forward(logits, labels, *OPTIONS)
    saved = (upstream * stats[3], logits, labels, *stats[4:6], IGNORED)
    gradient = ops.gated_ce_backward(*saved)
    with_grad = ops.gated_ce_forward_with_grad(upstream, logits, labels, *OPTIONS)
    return [*stats, gradient, *with_grad, *ops.topk(logits, 20)]


def assert_same(found: list[Tensor], expected: list[Tensor], what: object = "") -> None:
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(a, b) if a.dtype == torch.int64 else same_bits(a, b), f"{what} {i}"


@pytest.fixture(autouse=True)
def _give_memory_back() -> Iterator[None]:
    """Other processes may be testing on this device, too."""
    yield
    torch.cuda.empty_cache()


def needs_memory(gigabytes: float) -> None:
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes:.1f} GB of free GPU memory, and {free:.1f} are")


# ---- Every plan, and few rows.


@each_dtype
@each_plan
@pytest.mark.parametrize("inplace", [False, True], ids=["out_of_place", "in_place"])
@pytest.mark.usefixtures("poisoned_memory")
def test_plans(plan: str, dtype: torch.dtype, inplace: bool) -> None:
    needs_memory(8)
    logits, labels = inputs(plan, dtype)
    assert_right(logits, labels, [fused], inplace=inplace)


@each_plan
@pytest.mark.parametrize("k", [2, 128])
def test_plans_with_other_gates(plan: str, k: int) -> None:
    needs_memory(8)
    logits, labels = inputs(plan, torch.float16)
    for gate in (NoGate(), EntropyGate(2.0, 3.0)):
        assert_right(logits, labels, [fused], k=k, gate=gate)


@each_plan
def test_plans_of_rows_that_lie_apart(plan: str) -> None:
    """A slice of a longer sequence: rows with gaps, at every alignment; NaN is beside them."""
    needs_memory(8)
    num_rows, vocab_size = PLANS[plan][0], PLANS[plan][1] // 4
    buffer = torch.full((2, num_rows // 2 + 1, vocab_size + 1), math.nan, device="cuda")
    logits = buffer[:, :-1, 1:]
    logits.normal_(0, 3)
    labels = torch.randint(vocab_size, logits.shape[:-1], device="cuda")
    for inplace in (False, True):
        assert_right(logits, labels, [fused], inplace=inplace)


@each_dtype
@pytest.mark.parametrize("num_rows", [1, 3, 64])
@pytest.mark.usefixtures("poisoned_memory")
def test_few_rows(device: str, dtype: torch.dtype, num_rows: int) -> None:
    traps = ("normal", "ascending", "many_ties", "probability_one_minus_1e-6")
    for trap in traps[: 1 if num_rows == 64 else None]:
        assert_parity(*make(num_rows, 151936, dtype, trap=trap, device=device))


@each_dtype
@pytest.mark.parametrize("vocab_size", [262144, 2**20])
def test_large_vocabularies(device: str, dtype: torch.dtype, vocab_size: int) -> None:
    logits, labels = make(3, vocab_size, dtype, device=device)
    assert_parity(logits, labels, k=128)
    assert_right(logits, labels, [fused], k=128)
    assert_topk(logits, 128)


def assert_topk(logits: Tensor, k: int) -> None:
    values, indices = topk(logits, k)
    expected = torch.sort(logits, dim=-1, descending=True, stable=True).indices[..., :k]
    assert torch.equal(indices, expected)
    assert same_bits(values, logits.gather(-1, indices))


@each_plan
@each_dtype
def test_run_after_run(plan: str, dtype: torch.dtype) -> None:
    logits, labels = inputs(plan, dtype)
    first = everything(logits, labels)
    for _ in range(3):
        assert_same(everything(logits, labels), first)


# ---- Rows that are wrong.


@each_plan
@pytest.mark.parametrize("wrong", [-1, "V", 2**31, 2**40, -(2**63), 2**63 - 1])
def test_labels_out_of_range(plan: str, wrong: int | str) -> None:
    """NaN for their token alone, and no wrong access: synchronising would raise it."""
    logits, labels = inputs(plan)
    wrong = logits.size(1) if isinstance(wrong, str) else wrong
    labels[1] = 0
    expected = everything(logits, labels)
    labels[1] = wrong
    found = everything(logits, labels)
    torch.cuda.synchronize()
    others = torch.arange(len(labels), device="cuda") != 1
    assert_same([x[others] for x in found], [x[others] for x in expected])
    assert found[0][1].isnan() and found[6][1].isnan().all() and found[11][1].isnan().all()


@pytest.mark.parametrize("inplace", [False, True], ids=["out_of_place", "in_place"])
def test_checks_on_request(monkeypatch: pytest.MonkeyPatch, inplace: bool) -> None:
    logits, labels = inputs("two_kernels")
    labels[1] = logits.size(1)
    options: dict[str, Any] = {"inplace_backward": inplace, "gradient_in_forward": True}
    assert gated_ce(logits.clone().requires_grad_(), labels, **options).isnan()
    monkeypatch.setenv("EAFT_EXT_CHECKS", "1")
    with pytest.raises(ValueError, match=r"position \[1\] is 100014, outside \[0, 100014\)"):
        gated_ce(logits.clone().requires_grad_(), labels, **options)


# ---- Graphs, streams, devices.


def _captured(function: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph, results


def _forward(logits: Tensor, labels: Tensor) -> list[Tensor]:
    loss, stats = gated_ce(logits, labels, return_stats=True)
    return [loss, stats.nll, stats.entropy, stats.gate]


def _backward(**options: Any) -> Callable[[Tensor, Tensor], list[Tensor]]:
    def run(logits: Tensor, labels: Tensor) -> list[Tensor]:
        own = logits.clone().requires_grad_()
        loss = gated_ce(own, labels, **options)
        # A scaled loss: scale_gradient_ then has something to do.
        return [loss.detach(), *torch.autograd.grad(loss * 0.5, own)]

    return run


STEPS: dict[str, Callable[[Tensor, Tensor], list[Tensor]]] = {
    "forward": _forward,
    "backward": _backward(),
    "backward_in_place": _backward(inplace_backward=True),
    "gradient_in_forward": _backward(gradient_in_forward=True),
    "gradient_in_forward_in_place": _backward(gradient_in_forward=True, inplace_backward=True),
    "topk": lambda logits, labels: [*topk(logits, 20)],
    "every_operator": everything,
}


@each_plan
@pytest.mark.parametrize("step", STEPS)
def test_graphs(plan: str, step: str) -> None:
    """Captured once, replayed on new numbers: the bits of eager calls."""
    needs_memory(4)
    logits, labels = inputs(plan)
    graph, found = _captured(lambda: STEPS[step](logits, labels))
    for seed in (1, 2, 1):
        other_logits, other_labels = inputs(plan, seed=seed)
        logits.copy_(other_logits)
        labels.copy_(other_labels.roll(seed))
        graph.replay()
        assert_same(found, STEPS[step](logits, labels), f"seed {seed}, result")


def test_graphs_of_nothing() -> None:
    """Every label is ignored, in a micro-batch between others."""
    logits, labels = inputs("two_kernels")
    kept = labels.clone()
    graph, (loss, gradient) = _captured(lambda: _backward()(logits, labels))
    for fill in (False, True, False):
        labels.copy_(torch.full_like(kept, IGNORED) if fill else kept)
        graph.replay()
        assert (loss.item() == 0) == fill
        assert gradient.any().item() != fill


@pytest.mark.parametrize(
    "plans", [("two_kernels", "two_kernels"), ("clusters_of_4", "l2")], ids=str
)
def test_two_streams_at_once(plans: tuple[str, str]) -> None:
    """As one after the other: nothing is shared between calls, no workspace either."""
    data = [inputs(plan, seed=seed) for seed, plan in enumerate(plans)]
    expected = [everything(*pair) for pair in data]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    found: list[list[list[Tensor]]] = [[], []]
    for _ in range(8):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found[i].append(everything(*data[i]))
    torch.cuda.synchronize()
    for runs, one in zip(found, expected, strict=True):
        for run in runs:
            assert_same(run, one)


def test_another_device_than_the_current_one() -> None:
    count = torch.cuda.device_count()
    if count < 2:
        pytest.skip(f"needs two CUDA devices, and there is {count}")
    for plan in PLANS:
        logits, labels = inputs(plan)
        with torch.cuda.device(0):
            far_logits, far_labels = logits.to("cuda:1"), labels.to("cuda:1")
            found = everything(far_logits, far_labels)
            assert torch.cuda.current_device() == 0
            own = far_logits.clone().requires_grad_()
            gated_ce(own, far_labels, inplace_backward=True).backward()
            assert torch.cuda.current_device() == 0
        assert all(x.device == far_logits.device for x in found)
        with torch.cuda.device(1):
            assert_same(found, everything(far_logits, far_labels))
        assert_right(far_logits, far_labels, [fused])


@contextmanager
def _no_synchronisation() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@each_plan
@pytest.mark.parametrize("step", STEPS)
def test_nobody_waits_for_the_device(plan: str, step: str) -> None:
    logits, labels = inputs(plan)
    with _no_synchronisation():
        STEPS[step](logits, labels)


def test_nobody_waits_for_a_count_on_the_device() -> None:
    logits, labels = inputs("two_kernels")
    logits.requires_grad_()
    criterion = GatedCrossEntropyLoss(gate=lambda nll, entropy: nll.exp().reciprocal())
    with _no_synchronisation():
        count = (labels != IGNORED).sum()
        for fuse in (False, True):
            loss = gated_ce(logits, labels, num_items_in_batch=count, gradient_in_forward=fuse)
            loss.backward()
        criterion(logits, labels.int()).backward()


def test_waiting_would_be_seen() -> None:
    """What the two tests before rely on."""
    with _no_synchronisation(), pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones(1, device="cuda").item()


# ---- Memory.


@pytest.fixture
def megabytes() -> Callable[[Callable[[], Any]], float]:
    """How much a call adds to the peak, in MB."""

    def measure(call: Callable[[], Any]) -> float:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        del result
        return (torch.cuda.max_memory_allocated() - before) / MB

    return measure


@each_dtype
def test_memory(dtype: torch.dtype, megabytes: Callable[[Callable[[], Any]], float]) -> None:
    """Of 256 MB of logits: nothing but the gradient, and with inplace_backward not that either."""
    slack = 2.0
    logits = torch.randn(256 * MB // dtype.itemsize // 131072, 131072, device="cuda").to(dtype)
    labels = torch.randint(131072, logits.shape[:1], device="cuda")
    gradient = logits.numel() * logits.element_size() / MB

    def step(**options: Any) -> Tensor | None:
        own = logits.detach().requires_grad_()
        gated_ce(own, labels, **options).backward()
        return own.grad

    assert megabytes(lambda: gated_ce(logits, labels, return_stats=True)) <= slack
    assert megabytes(lambda: gated_ce(logits[:5], labels[:5])) <= slack
    assert megabytes(lambda: topk(logits, 20)) <= slack
    assert megabytes(lambda: topk(logits[:5], 128)) <= slack
    for fuse in (False, True):
        found = megabytes(lambda fuse=fuse: step(gradient_in_forward=fuse))  # type: ignore[misc]
        assert abs(found - gradient) <= slack
    assert megabytes(lambda: step(inplace_backward=True)) <= slack
    logits.normal_()
    assert megabytes(lambda: step(inplace_backward=True, gradient_in_forward=True)) <= slack


# ---- More elements than 31 or 32 bits count.


def _assert_rows(
    name: str, found: list[Tensor], logits: Tensor, labels: Tensor, upstream: Tensor
) -> None:
    """Loss and gradient of some rows, given their logits as they were."""
    ref, gt = (
        outcome(reference.gated_ce, x, labels, upstream.to(x.dtype), reduction="none")
        for x in (logits, logits.double())
    )
    weights = error_weights(gt, logits, labels, upstream, reduction="none")
    right = ref._replace(loss=found[0], gradient=found[1])
    assert_outcome(right, ref, gt, weights, f" of {name}")


@pytest.mark.parametrize("limit", [2**31, 2**32], ids=["2^31", "2^32"])
def test_large_tensors(limit: int) -> None:
    """Rows on both sides of the limit, and the last one; then the sums of all rows' gradients."""
    vocab_size = 151936
    num_rows = limit // vocab_size + 70
    needs_memory(num_rows * vocab_size * 2 / 2**30 + 2)
    logits = torch.empty(num_rows, vocab_size, dtype=torch.bfloat16, device="cuda")
    labels = torch.randint(vocab_size, (num_rows,), device="cuda")
    middle = limit // vocab_size
    some = torch.tensor([0, middle - 1, middle, middle + 1, num_rows - 1], device="cuda")
    labels[-1], labels[middle] = vocab_size - 1, 0
    upstream = torch.ones(num_rows, device="cuda")
    for step in ("backward_", "forward_with_grad_"):
        logits.normal_(0, 2)
        kept = logits[some]
        values, indices = topk(logits, 20)
        assert torch.equal(indices[some], topk(kept, 20)[1])
        assert same_bits(values[some], kept.gather(1, indices[some]))
        if step == "backward_":
            loss, _, _, gate, *saved, _ = ops.gated_ce_forward(logits, labels, *OPTIONS)
            ops.gated_ce_backward_(upstream * gate, logits, labels, *saved, IGNORED)
        else:
            loss = ops.gated_ce_forward_with_grad_(upstream, logits, labels, *OPTIONS)[0]
        found = [loss[some], logits[some]]
        _assert_rows(step, found, kept, labels[some], upstream[some])
        # Of a softmax without the label's 1 the sum is 0, up to rounding to bfloat16.
        assert loss.min() > 0
        assert logits.sum(1, dtype=torch.float32).abs().max() <= 1e-2
        least = logits.amin(1, keepdim=True)
        assert least.max() < 0 and torch.equal(least, logits.gather(1, labels.unsqueeze(1)))


@pytest.mark.parametrize("limit", [2**31, 2**32], ids=["2^31", "2^32"])
def test_rows_far_apart(limit: int) -> None:
    needs_memory(limit * 2 / 2**30 + 2)
    buffer = torch.empty(limit + 5000, dtype=torch.bfloat16, device="cuda")
    logits = buffer.as_strided((2, 4099), (limit, 1), 1)
    logits.copy_(make(2, 4099, torch.bfloat16)[0])
    labels = torch.tensor([0, 4098], device="cuda")
    assert_topk(logits, 20)
    near = logits.contiguous()
    assert_right(near, labels, [lambda *_, **options: fused(logits, labels, **options)])
    ops.gated_ce_forward_with_grad_(upstream_of(labels), logits, labels, *OPTIONS)
    torch.testing.assert_close(logits, fused(near, labels, k=20, gate=EntropyGate()).gradient)


# ---- Training.


def test_reduced_overhead() -> None:
    """torch.compile with CUDA graphs of its own: new numbers give what eager calls give."""
    torch._dynamo.reset()
    weight = torch.randn(1000, 16, device="cuda")

    def step(hidden: Tensor, labels: Tensor) -> Tensor:
        logits = torch.tanh(hidden @ weight.T) * 5
        return gated_ce(logits[:, :-1], labels[:, 1:], inplace_backward=True)

    compiled = torch.compile(step, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        hidden = torch.randn(4, 6, 16, device="cuda", requires_grad=True)
        labels = torch.randint(1000, (4, 6), device="cuda")
        torch.compiler.cudagraph_mark_step_begin()
        results = []
        for function in (compiled, step):
            loss = function(hidden, labels)
            results.append((loss.detach(), *torch.autograd.grad(loss, hidden)))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("options", [{}, {"gradient_in_forward": True}], ids=str)
def test_loss_scaling(options: dict[str, Any]) -> None:
    """float16 under a GradScaler, as training does it: the parameters move as in float32."""
    moved = []
    labels = torch.randint(1000, (64,), device="cuda")
    hidden = torch.randn(64, 32, device="cuda")
    for enabled in (True, False):
        torch.manual_seed(0)
        model = torch.nn.Linear(32, 1000, device="cuda")
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        scaler = torch.amp.GradScaler("cuda", enabled=enabled)
        with torch.autocast("cuda", dtype=torch.float16, enabled=enabled):
            loss = gated_ce(model(hidden), labels, **options)
        assert loss.dtype == torch.float32
        before = model.weight.detach().clone()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        moved.append(model.weight.detach() - before)
    assert moved[0].any()
    assert (moved[0] - moved[1]).norm() <= 1e-2 * moved[1].norm()
