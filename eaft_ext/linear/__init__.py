"""The loss from hidden states and the output layer's weight, without ever holding all logits."""

from eaft_ext.linear.loss import linear_gated_ce
from eaft_ext.linear.vocab_parallel import vocab_parallel_linear_gated_ce

__all__ = ["linear_gated_ce", "vocab_parallel_linear_gated_ce"]
