"""The loss over a vocabulary that is divided among processes."""

from eaft_ext.parallel.vocab_parallel import vocab_parallel_gated_ce

__all__ = ["vocab_parallel_gated_ce"]
