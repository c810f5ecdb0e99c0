"""One process of vocab_parallel.py: its part of the vocabulary, timed in lockstep with the others.

It is told what to do in JSON, and writes a JSON list with what it found in each case. Before each
call all processes wait for each other, so that none runs beside another's preparations. The leaf
that the gradient is for stands in for the output of a model: :func:`torch.autograd.grad` hands the
gradient on as a model's backward would, where ``.backward()`` would copy it for some and not for
others.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from cases import Batch, Case, Rotation
from contenders import Contender, Function, Runner
from device import Cpu
from measure import WARM_UP, rounded
from memory import CALLS
from progress import describe_error
from timing import FORWARD, TOTAL, time_once, time_side_by_side
from torch import Tensor
from torch import distributed as dist

import eaft_ext

TIMES, MEMORY = "times", "memory"
# Memory that is taken from the end of the forward to the beginning of the backward.
HELD = "held"
OURS = "vocab_parallel_gated_ce"
INPLACE = f"{OURS}_inplace"
NO_GATE = f"{OURS}_no_gate"
MEGATRON = "megatron"
FUSED = "megatron_fused"
# Who computes the same as whom.
SAME = {INPLACE: OURS, MEGATRON: NO_GATE, FUSED: NO_GATE}


@dataclass(frozen=True)
class Request:
    """What a process is told. ``port`` is that of the store, ``names`` the contenders of a case."""

    rank: int
    world_size: int
    port: int
    seconds: float
    measure: str
    cases: list[dict[str, Any]]
    names: list[list[str]]
    repeats: int
    rotates: bool
    answer: str

    def to_json(self) -> str:
        """The command line."""
        return json.dumps(asdict(self))


class ShardRunner(Runner):
    """A contender on this process's logits [s, b, V / world size] and labels [s, b]."""

    def prepare(self, batch: Batch) -> tuple[Tensor, ...]:
        """Logits that require a gradient, labels, and the gradient of their losses."""
        source = batch.workspace if self.contender.overwrites_logits else batch.logits
        num_rows = batch.labels.numel()
        # Megatron's layout, two sequences beside each other.
        labels = batch.labels.view(-1, 2 if num_rows % 2 == 0 else 1)
        logits = source.detach().view(*labels.shape, -1).requires_grad_()
        return logits, labels, torch.linspace(0.5, 1.5, num_rows).view_as(labels)

    def forward(self, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The losses [s, b], after what their backward needs."""
        logits, labels, upstream = arguments
        return logits, upstream, self._function(logits, labels)

    def backward(self, result: tuple[Tensor, ...]) -> Tensor:
        """The gradient of this process's logits."""
        logits, upstream, loss = result
        return torch.autograd.grad(loss, logits, upstream)[0]

    def outcome(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Losses and gradient."""
        result = self.forward(self.prepare(batch))
        return result[-1].detach(), self.backward(result)

    def kept(self, batch: Batch) -> list[str]:
        """The tensors as large as the logits that the graph keeps for the backward."""
        logits, labels, upstream = self.prepare(batch)
        found: dict[int, Tensor] = {}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.numel() >= logits.numel():
                found.setdefault(tensor.data_ptr(), tensor.detach())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self._function(logits, labels)
        unchanged = torch.equal(logits.detach().view_as(batch.logits), batch.logits)
        torch.autograd.grad(loss, logits, upstream)

        def describe(tensor: Tensor) -> str:
            name = str(tensor.dtype).removeprefix("torch.")
            if tensor.data_ptr() != logits.data_ptr():
                return f"{name} beside the logits"
            return "the logits" if unchanged else f"{name} over the logits"

        return [describe(tensor) for tensor in found.values()]


def ours(**options: Any) -> Callable[[], Function]:
    """How to build our loss over all processes."""
    return lambda: partial(
        eaft_ext.vocab_parallel_gated_ce, group=dist.group.WORLD, reduction="none", **options
    )


def megatron() -> Function:
    """Megatron-Core's loss, PyTorch's operations one by one."""
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    function: Function = vocab_parallel_cross_entropy
    return function


def megatron_fused() -> Function:
    """The same with fewer exchanges, compiled; its gradient is always rounded to bfloat16."""
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    return partial(fused_vocab_parallel_cross_entropy, tp_group=dist.group.WORLD)


PEER = "megatron.core"
CONTENDERS = (
    Contender(OURS, "`vocab_parallel_gated_ce`", ours(), ShardRunner),
    Contender(INPLACE, "the same in place", ours(inplace_backward=True), ShardRunner, True),
    Contender(NO_GATE, "the same, no gate", ours(gate=eaft_ext.NoGate()), ShardRunner),
    # Float32 logits are overwritten by it.
    Contender(MEGATRON, "Megatron-Core", megatron, ShardRunner, True, module=PEER),
    Contender(
        FUSED,
        "Megatron-Core, fused",
        megatron_fused,
        ShardRunner,
        True,
        module=PEER,
        compiles=True,
    ),
)


class LockstepCpu(Cpu):
    """The CPU, of which every process uses one core; they begin together."""

    def get_ahead(self) -> None:
        """Wait for the others."""
        dist.barrier()


class ShardRotation(Rotation):
    """Batches of this process's part of the vocabulary; all have the same labels, of the whole."""

    def __init__(self, case: Case, cache_bytes: int) -> None:
        shard = replace(case, vocab_size=case.vocab_size // dist.get_world_size())
        super().__init__(shard, cache_bytes, "cpu", seed=dist.get_rank())
        generator = torch.Generator().manual_seed(dist.get_world_size())
        for batch in self.full_turn():
            batch.labels.random_(case.vocab_size, generator=generator)

    def next(self) -> Batch:
        """Restored when no process is being timed."""
        dist.barrier()
        batch: Batch = super().next()
        return batch


def start(
    contenders: list[Contender], rotation: Rotation, device: Cpu
) -> tuple[list[Runner], dict[str, str]]:
    """The contenders, warmed up, and why a peer is missing; all processes find the same."""
    runners: list[Runner] = []
    failed: dict[str, str] = {}
    for contender in contenders:
        reason = ""
        try:
            runner = contender.make_runner()
            for _ in range(WARM_UP):
                time_once(runner, rotation, device)
        except Exception as error:
            if not contender.module:
                raise
            reason = describe_error(error)
        reasons: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(reasons, reason)
        if reason := next(filter(None, reasons), ""):
            failed[contender.name] = reason
        else:
            runners.append(runner)
    return runners, failed


def agreement(
    runners: list[Runner], rotation: Rotation, dtype: torch.dtype
) -> dict[str, dict[str, float]]:
    """How far losses and gradients are from those that they should equal; raises if too far."""
    found = {}
    by_name = {runner.contender.name: runner for runner in runners}
    for name, other in SAME.items():
        if name not in by_name:
            continue
        loss, gradient = by_name[other].outcome(rotation.full_turn()[0])
        its_loss, its_gradient = by_name[name].outcome(rotation.full_turn()[0])
        rounding = torch.finfo(torch.bfloat16 if name == FUSED else dtype).eps
        what = f"{name} against {other}: "
        for expected, actual, rtol, atol in (
            (loss, its_loss, 2e-5, 2e-5),
            (gradient, its_gradient, max(rounding, 1e-4), 1e-7),
        ):
            torch.testing.assert_close(
                actual, expected, rtol=rtol, atol=atol, msg=lambda text, what=what: what + text
            )
        found[name] = {
            "loss": (its_loss - loss).abs().max().item(),
            "gradient": (its_gradient - gradient).abs().max().item(),
        }
    return found


def measure_times(case: Case, contenders: list[Contender], request: Request) -> dict[str, Any]:
    """Every single time, by contender and phase, and what else is found on the way."""
    if any(contender.compiles for contender in contenders):
        torch.compiler.reset()
    device = LockstepCpu()
    rotation = ShardRotation(case, device.cache_bytes() if request.rotates else 0)
    runners, failed = start(contenders, rotation, device)
    agrees = agreement(runners, rotation, getattr(torch, case.dtype))

    def drop(runner: Runner, reason: str) -> NoReturn:
        raise RuntimeError(f"{runner.contender.name}: {reason}")  # the others wait for this one

    # No time limit: as many rounds in all processes.
    seconds = time_side_by_side(runners, rotation, device, request.repeats, 0.0, drop=drop)
    return {"seconds": rounded(seconds), "failed": failed, "agreement": agrees}


def memory_once(runner: Runner, rotation: Rotation, device: Cpu) -> dict[str, int] | None:
    """Bytes beyond the inputs: peaks of the forward and of both, and what is held in between."""
    arguments = runner.prepare(rotation.next())
    before = device.reset_peak()
    result = runner.forward(arguments)
    forward = device.peak_bytes()
    held = device.reset_peak()
    gradient = runner.backward(result)
    total = max(forward, device.peak_bytes())
    del gradient
    if before is None or held is None:
        return None
    return {FORWARD: forward - before, HELD: held - before, TOTAL: total - before}


def measure_memory(case: Case, contenders: list[Contender], request: Request) -> dict[str, Any]:
    """Medians of each contender's memory, and the large tensors that its graph keeps."""
    if any(contender.compiles for contender in contenders):
        torch.compiler.reset()
    device = Cpu()
    rotation = ShardRotation(case, 0)
    peak_bytes, kept = {}, {}
    for contender in contenders:
        runner = contender.make_runner()
        calls = [memory_once(runner, rotation, device) for _ in range(1 + CALLS)][1:]
        measured = [call for call in calls if call is not None]
        if measured:
            peak_bytes[contender.name] = {
                phase: statistics.median(call[phase] for call in measured) for phase in measured[0]
            }
        kept[contender.name] = runner.kept(rotation.next())
    return {"peak_bytes": peak_bytes, "kept": kept}


MEASURES = {TIMES: measure_times, MEMORY: measure_memory}


def main() -> None:
    """Measure what the command line asks for."""
    request = Request(**json.loads(sys.argv[1]))
    torch.set_num_threads(1)
    limit = timedelta(seconds=request.seconds)
    store = dist.TCPStore("127.0.0.1", request.port, is_master=False, timeout=limit)
    dist.init_process_group(
        "gloo", store=store, rank=request.rank, world_size=request.world_size, timeout=limit
    )
    names = {name for names in request.names for name in names}
    if any(c.module for c in CONTENDERS if c.name in names):
        warnings.filterwarnings("ignore", module=r"megatron\.")  # on what else could be installed
        from megatron.core import parallel_state

        parallel_state.initialize_model_parallel(tensor_model_parallel_size=request.world_size)
    gc.freeze()  # no collection looks through all that was imported
    answers = []
    for fields, chosen in zip(request.cases, request.names, strict=True):
        case = Case(**fields)
        print(f"{request.measure} of {case}", flush=True)
        contenders = [c for c in CONTENDERS if c.name in chosen]
        answers.append(MEASURES[request.measure](case, contenders, request))
    Path(request.answer).write_text(json.dumps(answers))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
