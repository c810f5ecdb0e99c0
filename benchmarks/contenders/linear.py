"""What is compared where the output layer is part of the loss; each gives both its gradients."""

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import eaft_ext
from eaft_ext.cli.bench import eager_eaft, eager_eaft_sum
from eaft_ext.linear._chunks import default_chunk_size

from . import peers
from .cases import IGNORED, Case, LinearBatch, LinearCase
from .contender import GPU, BareRunner, Build, Contender, Function, GradientRunner, imported, plain
from .logits import CONTENDERS

PRODUCTS = "products"
OURS = "linear_gated_ce"
FLOAT32 = f"{OURS}_float32"
NO_GATE = f"{OURS}_no_gate"
HALF, TENTH = f"{OURS}_half_muted", f"{OURS}_tenth_left"
UNFUSED = "gated_ce_of_linear"
UNFUSED_INPLACE = f"{UNFUSED}_inplace"
EAGER = "eager"
CHUNKED = "chunked_eager"
COMPILED = "chunked_compiled"
LIGER = "liger_linear"
CUT = "cut_cross_entropy"
# Who computes the same as whom.
SAME = {
    **dict.fromkeys((OURS, FLOAT32, UNFUSED, UNFUSED_INPLACE, EAGER, COMPILED), CHUNKED),
    **dict.fromkeys((LIGER, CUT), NO_GATE),
}


class LinearRunner(GradientRunner):
    """A contender on hidden, weight and labels."""

    parts = ("loss", "hidden_gradient", "weight_gradient")

    def leaves(self, batch: LinearBatch) -> tuple[list[Tensor], Tensor, None]:
        return [batch.hidden, batch.weight], batch.labels, None


class ProductsRunner(BareRunner):
    """The products that no loss of a whole batch can do without, and nothing between them."""

    def prepare(self, batch: LinearBatch) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return batch.hidden, batch.weight


def products(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of the whole batch, and what would be the gradients if they were their own."""
    logits = torch.mm(hidden, weight.t())
    return torch.mm(logits, weight), torch.mm(logits.t(), hidden)


def of_logits(loss: Function) -> Build:
    return plain(lambda hidden, weight, labels: loss(F.linear(hidden, weight), labels))


def chunk_tokens(case: Case, device: str) -> int:
    """How many tokens ours has in a chunk if none is ignored."""
    row_bytes = case.logits_bytes // case.num_rows
    return default_chunk_size(case.num_rows, row_bytes, torch.device(device))


def chunked(of_chunk: Function) -> Function:
    """A loss as training frameworks chunk it, in chunks as long as ours.

    ``of_chunk`` gives the sum of the losses of some tokens. The logits of a chunk are dropped after
    its forward, and computed anew for its backward.
    """

    def function(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        row_bytes = len(weight) * hidden.element_size()
        size = default_chunk_size(len(hidden), row_bytes, hidden.device)
        total = torch.zeros((), device=hidden.device)
        for rows, targets in zip(hidden.split(size), labels.split(size), strict=True):
            total = total + checkpoint(
                of_chunk, rows, weight, targets, use_reentrant=False, preserve_rng_state=False
            )
        return total / (labels != IGNORED).sum()

    return function


def linear_eaft_sum(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return eager_eaft_sum(F.linear(hidden, weight), labels)


def compiled() -> Function:
    return chunked(torch.compile(linear_eaft_sum, dynamic=False))


def _loss(name: str, title: str, build: Build, **more: Any) -> Contender:
    return Contender(name, title, build, LinearRunner, **more)


def _peer(module: str, *names: Any, **more: Any) -> Contender:
    return _loss(*names, devices=GPU, module=module, **more)


def _ours(**options: Any) -> Build:
    return plain(partial(eaft_ext.linear_gated_ce, **options))


def muting(percent: int) -> Build:
    """Ours, with a hard gate that mutes so many of the tokens of the first batch of a shape."""

    def build() -> Function:
        gates: dict[torch.Size, eaft_ext.HardGate] = {}

        def function(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
            if hidden.shape not in gates:
                given = (hidden.detach(), weight.detach(), labels)
                _, stats = eaft_ext.linear_gated_ce(*given, return_stats=True)
                at = stats.entropy[stats.valid].quantile(percent / 100) / math.log(20)
                gates[hidden.shape] = eaft_ext.HardGate(float(at))
            return eaft_ext.linear_gated_ce(hidden, weight, labels, gate=gates[hidden.shape])

        return function

    return build


INPLACE = partial(eaft_ext.gated_ce, inplace_backward=True)
IN_FLOAT32 = _ours(accumulate_in_float32=True)
# Its logits stay on chip, and are computed anew in the backward; it leaves out blocks of the
# gradient in which everything would be rounded away.
CUT_LOSS = imported("cut_cross_entropy:linear_cross_entropy")
BFLOAT16 = ("bfloat16",)
LINEAR_CONTENDERS = (
    Contender(PRODUCTS, "three bare products", plain(products), ProductsRunner),
    _loss(OURS, "`linear_gated_ce`", _ours()),
    _loss(FLOAT32, "the same, summed in float32", IN_FLOAT32, dtypes=BFLOAT16),
    # On a GPU, as its peers.
    _loss(NO_GATE, "the same, no gate", _ours(gate=eaft_ext.NoGate()), devices=GPU),
    _loss(HALF, "the same, half of the tokens muted", muting(50), devices=GPU),
    _loss(TENTH, "the same, 90 % of the tokens muted", muting(90), devices=GPU),
    _loss(UNFUSED, "`gated_ce` of all logits", of_logits(eaft_ext.gated_ce)),
    _loss(UNFUSED_INPLACE, "the same, in place", of_logits(INPLACE)),
    _loss(EAGER, "eager EAFT of all logits", of_logits(eager_eaft)),
    _loss(CHUNKED, "eager EAFT in chunks", plain(chunked(linear_eaft_sum))),
    _loss(COMPILED, "compiled EAFT in chunks", compiled, devices=GPU, compiles=True),
    _peer("liger_kernel", LIGER, "Liger-Kernel, no gate", peers.liger_linear),
    _peer(CUT, CUT, "cut-cross-entropy, no gate", CUT_LOSS, dtypes=BFLOAT16),
)


def contenders_of(case: Case) -> tuple[Contender, ...]:
    return LINEAR_CONTENDERS if isinstance(case, LinearCase) else CONTENDERS
