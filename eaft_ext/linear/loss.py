"""``linear_gated_ce``: output layer and loss in one, chunk by chunk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

from torch import Tensor

from eaft_ext import reference
from eaft_ext._checks import (
    check_chunks,
    check_labels,
    check_linear,
    check_placement,
    check_same_dtype,
    check_weight_values,
)
from eaft_ext._dispatch import is_dtensor, is_transformed
from eaft_ext._options import Keywords, ReturnStats, checked, with_keywords
from eaft_ext.linear._reduced_loss import Chunking, Product, reduced_loss
from eaft_ext.reference import TokenStats

if TYPE_CHECKING:
    from typing_extensions import Unpack


@overload
def linear_gated_ce(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = ...,
    k: int | None = ...,
    *,
    chunk_size: int | None = ...,
    accumulate_in_float32: bool | None = ...,
    drop_below: float = ...,
    return_stats: Literal[False] = ...,
    **options: Unpack[Keywords],
) -> Tensor: ...
@overload
def linear_gated_ce(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = ...,
    k: int | None = ...,
    *,
    chunk_size: int | None = ...,
    accumulate_in_float32: bool | None = ...,
    drop_below: float = ...,
    return_stats: Literal[True, "full"],
    **options: Unpack[Keywords],
) -> tuple[Tensor, TokenStats]: ...
@with_keywords
def linear_gated_ce(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    k: int | None = 20,
    *,
    chunk_size: int | None = None,
    accumulate_in_float32: bool | None = None,
    drop_below: float = 0.0,
    return_stats: ReturnStats = False,
    **options: Unpack[Keywords],
) -> Tensor | tuple[Tensor, TokenStats]:
    r"""Token-gated cross-entropy of ``hidden @ weight.T + bias``, a chunk of tokens at a time.

    The loss of :func:`eaft_ext.gated_ce` (EAFT, arXiv 2601.02151), and the gradients of hidden,
    weight and bias, while the logits of one chunk are in memory. A "mean" or "sum" computes the
    gradients together with the loss: three products of (tokens, H, V), like a plain output layer.
    Losses per token, gates of your own and float16 keep a few numbers for each token and compute
    the logits once more in the backward, a fourth product. What needs no gradient has no product,
    and a token whose gate or upstream gradient is 0 has a part in the first one alone::

        x     = hidden @ weight.T + bias                       logits of a chunk
        loss  = g * nll                                        as gated_ce has it
        dx    = u * g * (softmax(x) - onehot(y))               in the memory of the logits
        dhidden = dx @ weight     dweight = sum over chunks of dx.T @ hidden     dbias = sum of dx

    Args:
        hidden: (..., H), float32, bfloat16 or float16, or float64 on the CPU: what the output layer
            is given.
        weight: (V, H), of the same dtype: the output layer's, also if it is tied to the embedding;
            with LoRA on it, the effective weight. Under autocast all are converted as
            ``F.linear`` converts them. One that FSDP2 has sharded, a DTensor, is gathered for the
            call, and its gradient is the mean over the processes. With a DTensor as hidden, weight
            and bias may be divided by vocabulary on a dimension of its mesh, and the hidden by rows
            on others; results are DTensors.
        labels: (...), int64 or int32, on the same device, shifted for next-token prediction.
            Tokens with ``ignore_index`` are left out before the product; to count them takes a
            synchronisation on CUDA. While a CUDA graph is captured they are not left out, and their
            hidden must be finite.
        bias: (V), or None.
        k: how many of the largest logits the entropy is taken over, from 2 to 128, or None: all.
        chunk_size: tokens whose logits are held at a time. By default so many that they take at
            most 64 MiB on the CPU and 640 MiB elsewhere, but at least 128 and at most 4096.
        accumulate_in_float32: add up the gradients that chunks have for a 16-bit weight in float32,
            4 V H bytes, so that it is rounded once and not once per chunk. On the CPU that product
            is then computed in float32, too. None: if the bytes are at most an eighth of those
            above.
        drop_below: leave out of the gradients, too, tokens that teach next to nothing: in each
            chunk those with the smallest ``s = |u| g (1 - p(y))``, as many as have together at most
            this share of the sum of all s; from 0, none, to below 1, and not beside a z_loss. Their
            dhidden is 0, and ``|dweight - exact| <= sqrt(2) sum of their s |hidden|``, in the
            Frobenius norm, times the logit_scale. Loss and stats are of all tokens. In a backward
            that computes the logits again, the tokens of all chunks are one. While a CUDA graph is
            captured, and under ``torch.func``, none is left out.

    Other arguments are those of :func:`eaft_ext.gated_ce`.

    Returns:
        The loss, float32 (float64 for float64), and with ``return_stats`` a pair of the loss and
        :class:`TokenStats`, both shaped like the labels. Gradients have the dtypes of their
        tensors.

    Raises:
        TypeError, ValueError: as :func:`eaft_ext.gated_ce` does; for dtypes, shapes and devices
            that do not fit together, or a chunk_size below 1.
        RuntimeError: from a second derivative; :mod:`eaft_ext.reference` has one.

    A loss that has its gradients holds them until its backward: evaluate under ``torch.no_grad``.
    One that is scaled before its backward has them scaled in place, and rounded a second time.
    Under ``torch.func`` and in forward mode it is :func:`eaft_ext.reference.linear_gated_ce`, which
    holds all logits. Where several processes have a part of the weight each, see
    :func:`eaft_ext.vocab_parallel_linear_gated_ce`.
    """
    op = "linear_gated_ce"
    chunking = Chunking(chunk_size, accumulate_in_float32, drop_below)
    if is_dtensor(hidden):
        from eaft_ext.linear.dtensor import linear_gated_ce_of_dtensor

        loss, stats = linear_gated_ce_of_dtensor(
            op, Product(hidden, weight, bias), labels, k, options, chunking, return_stats
        )
        return (loss, stats) if return_stats else loss
    check_linear(op, hidden, weight, bias)
    check_labels(op, labels)
    of_token, reduce = checked(op, k, hidden, "hidden", return_stats=return_stats, **options)
    check_placement(op, labels, hidden, "hidden")
    check_weight_values(op, reduce.token_weight, labels, of_token.ignore_index)
    labels, reduce = reduce.without_muted(labels, of_token)
    check_chunks(op, *chunking, of_token.z_loss)
    if is_dtensor(weight) or is_dtensor(bias):
        from eaft_ext.linear.dtensor import gathered

        weight = gathered(hidden, weight)
        bias = None if bias is None else gathered(hidden, bias)
    if is_transformed(hidden, weight, bias):
        result: Tensor | tuple[Tensor, TokenStats] = reference.linear_gated_ce(
            hidden,
            weight,
            labels,
            bias,
            of_token.k,
            gate=of_token.gate,
            ignore_index=of_token.ignore_index,
            reduction=reduce.reduction,
            num_items_in_batch=reduce.num_items_in_batch,
            **of_token.reference_options(),
            token_weight=reduce.token_weight,
            return_stats=return_stats,
        )
        return result
    product = Product(hidden, weight, bias).in_autocast_dtype()
    check_same_dtype(op, *product)
    loss, stats = reduced_loss(product, labels, of_token, reduce, chunking)
    return (loss, stats) if return_stats else loss
