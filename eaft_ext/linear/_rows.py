"""The loss of some rows of logits, and its gradient in the logits' own memory; no autograd."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from eaft_ext import reference
from eaft_ext._options import TokenLoss
from eaft_ext._registration import called, ops
from eaft_ext.parallel._shard import Gather


class RowsOfBackward(NamedTuple):
    """What a backward is told of each row, (rows)."""

    upstream: Tensor
    gate: Tensor
    row_max: Tensor
    log_sum: Tensor


@dataclass(frozen=True)
class Rows:
    """How logits (rows, V) and labels (rows) become losses, with a gate that the kernels know.

    With ``gather`` the columns are a shard of the vocabulary, from the word ``vocab_start`` on;
    ``total`` are the words of all shards. Without ``by_kernel`` it is all plain PyTorch, with a few
    float32 copies of the logits.
    """

    of_token: TokenLoss
    by_kernel: bool
    vocab_start: int
    total: int
    gather: Gather | None

    def losses(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """loss, nll, entropy, gate, row_max and log_sum, each (rows), and (num_extra, rows)."""
        if not self.by_kernel:
            return self._reference_losses(logits, labels)
        k, *gate = self.of_token.kernel_arguments()
        family = self.of_token.family()
        if self.gather is None:
            whole: tuple[Tensor, ...] = called(
                ops.gated_ce_forward,
                logits,
                labels,
                k,
                *gate,
                False,
                family,
                self.of_token.num_extra,
            )
            return whole
        start = self.vocab_start
        ignore_index, tells_entropy = self.of_token.ignore_index, self.of_token.tells_entropy
        partial = called(
            ops.gated_ce_partial,
            logits,
            labels,
            k,
            start,
            None,
            ignore_index,
            family,
            tells_entropy,
        )
        merged: tuple[Tensor, ...] = called(
            ops.gated_ce_merge,
            logits,
            labels,
            self.gather(partial),
            k,
            *gate,
            start,
            None,
            False,
            family,
            self.total,
            self.of_token.num_extra,
        )
        return merged

    def gradient_(self, given: RowsOfBackward, logits: Tensor, labels: Tensor) -> None:
        """Write the gradient over the logits."""
        of_token = self.of_token
        upstream, gate_weight, row_max, log_sum = given
        weight = upstream * gate_weight
        if self.by_kernel:
            start = None if self.gather is None else self.vocab_start
            shard = (of_token.ignore_index, start, None)
            family = of_token.family()
            called(
                ops.gated_ce_backward_,
                weight,
                logits,
                labels,
                row_max,
                log_sum,
                *shard,
                upstream,
                family,
                self.total,
            )
            return
        ignored = labels == of_token.ignore_index
        of_all = reference.weight_of_all(of_token.z_loss, upstream, weight, row_max, log_sum)
        weight = torch.where(ignored, 0.0, weight)
        logits[:] = reference.shard_gradient(
            weight * (1 - of_token.label_smoothing),
            logits,
            labels,
            row_max,
            log_sum,
            self.vocab_start,
            of_all=torch.where(ignored, 0.0, of_all),
            uniform=of_token.uniform(weight, self.total),
            softcap=of_token.softcap,
            logit_scale=of_token.logit_scale,
        )

    def losses_and_gradient_(
        self, upstream: Tensor, logits: Tensor, labels: Tensor
    ) -> tuple[Tensor, ...]:
        """loss, nll, entropy, gate, extra; over the logits the gradient, of what has upstream."""
        if self.by_kernel and self.gather is None:
            at_once: tuple[Tensor, ...] = called(
                ops.gated_ce_forward_with_grad_,
                upstream,
                logits,
                labels,
                *self.of_token.kernel_arguments(),
                self.of_token.family(),
                self.of_token.num_extra,
            )
            return at_once
        loss, nll, entropy, gate_weight, row_max, log_sum, extra = self.losses(logits, labels)
        self.gradient_(RowsOfBackward(upstream, gate_weight, row_max, log_sum), logits, labels)
        return loss, nll, entropy, gate_weight, extra

    def _reference_losses(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """As a shard, the only one where there is no other."""
        of_token = self.of_token
        ignored = labels == of_token.ignore_index
        partial = of_token.shard_partial(of_token.map_logits(logits), labels, self.vocab_start)
        partials = partial.unsqueeze(0) if self.gather is None else self.gather(partial)
        merged = of_token.merge_partials(partials, labels)
        nll, entropy, row_max, log_sum = merged[:4]
        weight = of_token.gate_weights(self.total, nll, entropy, ~ignored)
        cross = of_token.smoothed(merged, partials, ignored, self.total)
        loss = reference.weigh(cross, weight)
        if of_token.z_loss != 0:
            lse = torch.where(ignored, 0.0, row_max + log_sum)
            loss = loss + of_token.z_loss * lse**2
        extra = of_token.extra(merged, ignored)
        others = torch.stack(extra) if extra else nll.new_empty(0, *nll.shape)
        return loss, nll, entropy, weight, row_max, log_sum, others
