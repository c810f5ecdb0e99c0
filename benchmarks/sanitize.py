"""Every operator on small inputs, for compute-sanitizer to watch; the results are checked too.

    compute-sanitizer --tool racecheck python benchmarks/sanitize.py

The rows are short, so that it takes seconds, but for one vocabulary that few rows share out among
many blocks. The truth is the reference in float64 on the CPU.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from contenders.cases import IGNORED
from torch import Tensor

import eaft_ext
from eaft_ext import reference

ops = torch.ops.eaft_ext

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Rows, vocabulary: even and odd, below and above a block's width, many rows and few.
SHAPES = ((5, 7), (70, 128), (9, 1000), (4, 4099), (3, 20_001))
# From 17 rows on, a row is kept in a cluster's shared memory on a GPU that has clusters.
LONG_SHAPES = ((2, 151_936), (1, 50_257), (20, 20_001), (17, 151_936))
# Tokens, hidden, vocabulary, and tokens in a chunk, of which the last is shorter. Vocabularies are
# multiples of 8: otherwise rows of logits end in padding, which matrix products may load, not use.
LINEAR_SHAPES = ((9, 16, 1000, 2), (70, 8, 136, 32))
GRADIENTS = ("gradient of hidden", "gradient of weight", "gradient of bias")
KS = (2, 20, 128)
# Of the largest value, for losses and for gradients, whose last bit is the logits' own.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}

# Operator, which of its results, and the result.
Found = Iterator[tuple[str, str, Tensor]]


def inputs(num_rows: int, vocab_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels of which one in four is ignored, and upstream gradients, on the CPU."""
    generator = torch.Generator().manual_seed(num_rows * vocab_size)
    logits = 3 * torch.randn(num_rows, vocab_size, generator=generator)
    labels = torch.randint(vocab_size, (num_rows,), generator=generator)
    labels[3::4] = IGNORED
    upstream = torch.randn(num_rows, generator=generator)
    return logits.to(dtype), labels, upstream


def on_device(logits: Tensor, device: str, misaligned: bool) -> Tensor:
    """A copy on the device; misaligned rows begin one element into memory of one more."""
    if not misaligned:
        return logits.to(device, copy=True)
    return torch.nn.functional.pad(logits, (1, 0), value=torch.nan).to(device)[:, 1:]


def results(logits: Tensor, labels: Tensor, upstream: Tensor, k: int) -> Found:
    """What the operators of the loss give; those that work in place get copies."""
    gate = eaft_ext.EntropyGate()
    options = (labels, k, gate.name, gate.parameters(), IGNORED)

    def copy() -> Tensor:
        # With the strides of the original, as misaligned, and no element longer.
        offset = logits.storage_offset()
        length = offset + (logits.size(0) - 1) * logits.stride(0) + logits.size(1)
        memory = torch.full((length,), torch.nan, dtype=logits.dtype, device=logits.device)
        return memory.as_strided(logits.shape, logits.stride(), offset).copy_(logits)

    loss, _, entropy, weight, row_max, log_sum, _ = ops.gated_ce_forward(logits, *options)
    yield "gated_ce_forward", "loss", loss
    yield "gated_ce_forward", "entropy", entropy
    # Of all logits: without a selection, beside one, and with a gradient.
    for k_of_gate in (0, k):
        asked = (logits, labels, k_of_gate, *options[2:], False, [], 3)
        yield "gated_ce_forward", "vocab_entropy", ops.gated_ce_forward(*asked)[-1][2]
    exact = (upstream, logits, labels, 0, *options[2:], [], 3)
    yield (
        "gated_ce_forward_with_grad",
        "vocab_entropy",
        (ops.gated_ce_forward_with_grad(*exact)[-2][2]),
    )
    stats = (labels, row_max, log_sum, IGNORED)
    yield "gated_ce_backward", "gradient", ops.gated_ce_backward(upstream * weight, logits, *stats)
    overwritten = copy()
    ops.gated_ce_backward_(upstream * weight, overwritten, *stats)
    yield "gated_ce_backward_", "gradient", overwritten
    yield from results_of_shards(logits, labels, upstream, k)
    loss, _, entropy, _, _, gradient = ops.gated_ce_forward_with_grad(upstream, logits, *options)
    yield "gated_ce_forward_with_grad", "loss", loss
    yield "gated_ce_forward_with_grad", "entropy", entropy
    yield "gated_ce_forward_with_grad", "gradient", gradient
    for factor in (1.0, 0.5):  # the first is said to touch nothing
        ops.scale_gradient_(gradient, torch.tensor(factor, device=gradient.device))
        yield "scale_gradient_", "gradient" if factor == 1 else "half of the gradient", gradient
    overwritten = copy()
    loss, *_ = ops.gated_ce_forward_with_grad_(upstream, overwritten, *options)
    yield "gated_ce_forward_with_grad_", "loss", loss
    yield "gated_ce_forward_with_grad_", "gradient", overwritten


def results_of_shards(logits: Tensor, labels: Tensor, upstream: Tensor, k: int) -> Found:
    gate = eaft_ext.EntropyGate()
    width = max(1, logits.size(1) // 3)
    parts = logits.tensor_split((width, 2 * width), 1)
    shards = list(zip((0, width, 2 * width), parts, strict=True))
    partials = [ops.gated_ce_partial(x, labels, k, start, None, IGNORED) for start, x in shards]
    merged = (torch.stack(partials), k, gate.name, gate.parameters(), IGNORED, 0, None)
    loss, _, entropy, weight, row_max, log_sum, _ = ops.gated_ce_merge(logits, labels, *merged)
    yield "gated_ce_partial", "loss", loss
    yield "gated_ce_merge", "entropy", entropy
    stats = (labels, row_max, log_sum, IGNORED)
    gradients = [
        ops.gated_ce_backward(upstream * weight, x, *stats, start, None) for start, x in shards
    ]
    yield "gated_ce_backward", "gradient", torch.cat(gradients, 1)


def linear_results(
    leaves: Sequence[Tensor], labels: Tensor, upstream: Tensor, k: int, chunk_size: int
) -> Found:
    hidden, weight, bias = leaves
    arguments = (hidden, weight, labels, bias, k)
    loss, stats = eaft_ext.linear_gated_ce(
        *arguments, reduction="none", chunk_size=chunk_size, return_stats=True
    )
    yield "linear_gated_ce_forward", "loss", loss
    yield "linear_gated_ce_forward", "entropy", stats.entropy
    gradients = torch.autograd.grad(loss, leaves, upstream)
    for name, gradient in zip(GRADIENTS, gradients, strict=True):
        yield "linear_gated_ce_backward", name, gradient
    total = eaft_ext.linear_gated_ce(*arguments, reduction="sum", chunk_size=chunk_size)
    yield "linear_gated_ce_forward_with_grad", "sum", total
    for name, gradient in zip(GRADIENTS, torch.autograd.grad(total, leaves), strict=True):
        yield "linear_gated_ce_forward_with_grad", f"{name}, of the sum", gradient


def count_wrong(
    found: Iterable[tuple[str, str, Tensor]],
    expected: Mapping[str, Tensor],
    tolerance: float,
    case: str,
) -> int:
    """How many results are off, NaN included; each is told of."""
    wrong = 0
    for op, what, result in found:
        right = expected[what]
        difference = (result.detach().cpu().double() - right).abs().max()
        error = float(difference / right.abs().max().clamp(min=1e-30))
        if not error <= tolerance:
            print(f"wrong: {what} of {op} at {case}: off by {error:.3g} of the largest")
            wrong += 1
    return wrong


def check_losses(device: str, num_rows: int, vocab_size: int, dtype: torch.dtype, k: int) -> int:
    """Run all operators of the loss on a shape; how many results were wrong."""
    logits, labels, upstream = inputs(num_rows, vocab_size, dtype)
    leaf = logits.double().requires_grad_()
    loss, stats = reference.gated_ce(leaf, labels, k, reduction="none", return_stats="full")
    (gradient,) = torch.autograd.grad(loss, leaf, upstream.double())
    expected = {"loss": loss.detach(), "entropy": stats.entropy, "gradient": gradient}
    expected["half of the gradient"] = gradient / 2
    assert stats.vocab_entropy is not None, "it was asked for"
    expected["vocab_entropy"] = stats.vocab_entropy
    wrong = 0
    for misaligned in (False, True):
        arguments = (on_device(logits, device, misaligned), labels.to(device), upstream.to(device))
        case = f"{num_rows} x {vocab_size} {dtype}, k = {k}, misaligned: {misaligned}"
        wrong += count_wrong(results(*arguments, k), expected, TOLERANCE[dtype], case)
    return wrong


def check_topk(device: str, num_rows: int, vocab_size: int, dtype: torch.dtype, k: int) -> int:
    """The same for the values and indices of topk, which are exact."""
    logits, _, _ = inputs(num_rows, vocab_size, dtype)
    k = min(k, vocab_size)
    right = logits.topk(k).values
    for misaligned in (False, True):
        values, indices = ops.topk(on_device(logits, device, misaligned), k)
        found = logits.gather(1, indices.cpu())
        if not (torch.equal(values.cpu(), right) and torch.equal(found, right)):
            print(f"wrong: topk at {num_rows} x {vocab_size} {dtype}, k = {k}")
            return 1
    return 0


def check_linear(
    device: str, num_tokens: int, hidden_size: int, vocab_size: int, chunk_size: int, k: int
) -> int:
    """The same for the operators of the linear loss, in float32: dtypes are for those inside."""
    weight, _, _ = inputs(vocab_size, hidden_size, torch.float32)
    hidden, _, _ = inputs(num_tokens, hidden_size, torch.float32)
    bias, labels, upstream = inputs(num_tokens, vocab_size, torch.float32)
    leaves = [hidden, weight / hidden_size**0.5, bias[0]]
    wide = [leaf.double().requires_grad_() for leaf in leaves]
    loss, stats = reference.linear_gated_ce(
        *wide[:2], labels, wide[2], k, reduction="none", return_stats=True
    )
    expected = {"loss": loss.detach(), "entropy": stats.entropy, "sum": loss.detach().sum()}
    weighted = torch.autograd.grad(loss, wide, upstream.double(), retain_graph=True)
    expected |= zip(GRADIENTS, weighted, strict=True)
    of_sum = torch.autograd.grad(loss.sum(), wide)
    expected |= {f"{n}, of the sum": g for n, g in zip(GRADIENTS, of_sum, strict=True)}
    placed = [leaf.to(device, copy=True).requires_grad_() for leaf in leaves]
    found = linear_results(placed, labels.to(device), upstream.to(device), k, chunk_size)
    case = f"{num_tokens} x {hidden_size} x {vocab_size}, k = {k}"
    return count_wrong(found, expected, TOLERANCE[torch.float32], case)


def main() -> int:
    """Run all; 1 if a result was wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cpu tries this script out")
    device = parser.parse_args().device
    cases = [(*shape, dtype, k) for shape in SHAPES for dtype in DTYPES for k in KS]
    cases += [(*shape, dtype, KS[1]) for shape in LONG_SHAPES for dtype in DTYPES]
    wrong = sum(check(device, *case) for case in cases for check in (check_losses, check_topk))
    wrong += sum(check_linear(device, *sizes, KS[1]) for sizes in LINEAR_SHAPES)
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{len(cases) + len(LINEAR_SHAPES)} cases, {wrong} wrong results")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
