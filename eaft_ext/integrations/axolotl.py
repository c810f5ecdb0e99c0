"""axolotl: the loss of its ``use_eaft``, without the logits.

plugins:
  - eaft_ext.integrations.axolotl.EAFTPlugin
use_eaft: true

takes axolotl's own keys ``eaft_alpha`` and ``eaft_k`` and its definition of the loss, in which H is
divided by nothing; ``eaft_normalizer`` is for another. Gradient accumulation divides by the tokens
of all micro-batches, as axolotl's own EAFT does. It has no entry point: axolotl would load it in
every run, also for those who did not ask for it.
"""

from __future__ import annotations

from typing import Any, Literal

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from eaft_ext.integrations.trainer import EAFTCallback

__all__ = ["EAFTArgs", "EAFTPlugin"]

NORMALIZER = 1.0
"""What axolotl divides the entropy by."""


class EAFTArgs(BaseModel):
    """Keys that axolotl does not have."""

    eaft_normalizer: float | Literal["ln k"] | None = None
    """What H is divided by: a number, or "ln k", the paper's; axolotl's own is 1."""


class EAFTPlugin(BasePlugin):  # type: ignore[misc]
    """Gives axolotl's trainer :class:`eaft_ext.integrations.trainer.EAFTCallback`.

    Raises:
        ValueError: without ``use_eaft``, or for a trainer of preferences or rewards; at the start
            of training as ``use_linear_gated_ce`` does.
    """

    def get_input_args(self) -> str:
        """The path of the model of its keys."""
        return f"{EAFTArgs.__module__}.{EAFTArgs.__name__}"

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Put the loss in the place of axolotl's."""
        if not cfg.use_eaft:
            raise ValueError(
                "EAFTPlugin: use_eaft is not set, and plain cross-entropy would be trained on; "
                "write use_eaft: true, or take the plugin out"
            )
        if cfg.rl or cfg.reward_model or cfg.process_reward_model:
            kind = cfg.rl or "a reward model"
            raise ValueError(f"EAFTPlugin: the loss is that of fine-tuning, and not of {kind}")
        if (cfg.context_parallel_size or 1) > 1:
            raise ValueError(
                "EAFTPlugin: with context_parallel_size axolotl divides the labels before they are "
                "shifted; it is not supported"
            )
        metrics = cfg.eval_causal_lm_metrics
        if cfg.do_causal_lm_eval and (metrics is None or "perplexity" in metrics):
            raise ValueError(
                "EAFTPlugin: do_causal_lm_eval computes the perplexity from the model's loss, "
                "which is gated; leave perplexity out of eval_causal_lm_metrics"
            )
        normalizer = NORMALIZER if cfg.eaft_normalizer is None else cfg.eaft_normalizer
        callback = EAFTCallback(
            k=20 if cfg.eaft_k is None else cfg.eaft_k,
            alpha=1.0 if cfg.eaft_alpha is None else cfg.eaft_alpha,
            normalizer=None if normalizer == "ln k" else normalizer,
        )
        # The model's loss, then, which takes num_items_in_batch as axolotl's did.
        trainer.compute_loss_func = None
        trainer.model_accepts_loss_kwargs = True
        trainer.add_callback(callback)
