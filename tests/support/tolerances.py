"""How far an operator may be from the truth. The only table, and the only two rules.

``gt`` is the reference in float64 on the same, already rounded, inputs; ``ref`` is the reference in
the dtype under test. The key of the table is the dtype of the output: float32 for losses and stats
of 16-bit logits, the logits' dtype for gradients.

1. Each element: ``|op - gt| <= |ref - gt| + ATOL``, or what no computation can avoid where that is
   more than ATOL.
2. The largest error: at most twice the reference's, three times for gradients. Not in float64,
   where the reference is the truth and has no error to compare with.
"""

from __future__ import annotations

import torch
from torch import Tensor

ATOL = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 1e-3,
    torch.bfloat16: 1e-2,
}

LOSS_FACTOR = 2.0
GRADIENT_FACTOR = 3.0

# The rules need a floor where the reference errs little by luck: an error that no computation in
# float32 can avoid, a few roundings (exponential, sum, logarithm, product)
# - of the result, relative to it;
# - of what it is computed from. A softmax sum S and a probability p next to 1 are known to an
#   epsilon of float32, and so are ln S and p - 1, however small they are. error_model.py has what
#   becomes of that.
FLOOR_IN_EPSILONS = 4.0


def of_long_sum(number: int) -> float:
    """How many times the floor a sum may err by that is made one term after another.

    The roundings of ``number`` terms are of both signs, and grow together with its square root.
    """
    return max(1.0, number**0.5 / FLOOR_IN_EPSILONS)


def assert_within(
    name: str,
    op: Tensor,
    ref: Tensor,
    gt: Tensor,
    factor: float,
    weight: Tensor | float = 1.0,
    roundings: int = 0,
    terms: Tensor | None = None,
) -> None:
    """Hold ``op`` to both rules; the second one for every row of a matrix, or for a whole vector.

    NaN and infinities must be the truth's, in the same places.

    Args:
        weight: the epsilons by which a result is uncertain besides those of itself: of each
            element, of each row of a matrix, or of all.
        roundings: of numbers that the result is proportional to, which the reference does not
            round.
        terms: of a sum of numbers that are rounded to the dtype, as it is: that of their absolute
            values.
    """
    assert op.shape == ref.shape == gt.shape, f"{name}: {op.shape}, {ref.shape}, {gt.shape}"
    assert op.dtype == ref.dtype, f"{name}: {op.dtype}, and the reference gives {ref.dtype}"
    if op.numel() == 0:
        return
    atol, epsilon = ATOL[op.dtype], torch.finfo(op.dtype).eps
    is_double = op.dtype == torch.float64
    op, ref, gt = op.double(), ref.double(), gt.double()
    assert torch.equal(op.isnan(), gt.isnan()), f"{name}: NaN in other places than in the truth"
    infinite = gt.isinf()
    assert torch.equal(op[infinite], gt[infinite]), f"{name}: infinities other than the truth's"

    finite = gt.isfinite()
    truth = torch.where(finite, gt, 0.0)
    op_error = torch.where(finite, (op - gt).abs(), 0.0)
    ref_error = torch.where(finite, (ref - gt).abs(), 0.0)

    computed_in = torch.finfo(torch.float64 if is_double else torch.float32).eps
    weight = torch.as_tensor(weight, dtype=torch.float64, device=op.device)
    if 0 < weight.dim() < op.dim():
        weight = weight.unsqueeze(-1)
    weight = weight.expand_as(op)
    unavoidable = FLOOR_IN_EPSILONS * computed_in * (truth.abs() + weight)
    rounded_sum = epsilon / 2 * (terms + truth.abs()) if terms is not None else 0.0
    more = (unavoidable + rounded_sum).clamp(min=atol) + roundings * epsilon * truth.abs()
    excess = op_error - ref_error - more
    assert excess.max() <= 0, (
        f"{name}: off by {op_error.flatten()[excess.argmax()]:.3g} where the reference is off by "
        f"{ref_error.flatten()[excess.argmax()]:.3g}, and {more.flatten()[excess.argmax()]:.3g} "
        "more are allowed"
    )
    if is_double:
        return
    largest = truth.abs().amax(-1)
    floor = FLOOR_IN_EPSILONS * (epsilon * largest + computed_in * weight.amax(-1))
    allowed = torch.maximum(factor * ref_error.amax(-1), floor)
    error = op_error.amax(-1)
    worst = (error - allowed).argmax()
    assert (error <= allowed).all(), (
        f"{name}: the largest error is {error.flatten()[worst]:.3g}, the reference's is "
        f"{ref_error.amax(-1).flatten()[worst]:.3g} and {allowed.flatten()[worst]:.3g} is allowed "
        f"(row {worst})"
    )
