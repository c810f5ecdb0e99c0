"""ms-swift: the loss type "eaft", of the logits that the model returns.

swift sft --external_plugins "$(eaft-ext plugin ms-swift)" --loss_type eaft ...

divides H by the literal 3.0, as EAFT's authors do in their fork of ms-swift. Other numbers come of
the environment: ``EAFT_K`` (20, or "all"), ``EAFT_ALPHA`` (1.0) and ``EAFT_NORMALIZER`` (3.0, or
"ln k", the paper's). ms-swift has the logits in memory for every loss type.
"""

from __future__ import annotations

import os
from typing import Any

from swift.loss import BaseLoss, loss_map
from torch import Tensor

import eaft_ext
from eaft_ext.integrations._call import next_token_labels

NAME = "eaft"


def _number(name: str, default: float, word: str | None = None) -> float | None:
    """From the environment; None for the word."""
    text = os.environ.get(name, str(default))
    if text == word:
        return None
    try:
        return float(text)
    except ValueError:
        expected = "a number" if word is None else f"a number or {word!r}"
        raise ValueError(f"{name} must be {expected}, got {text!r}") from None


class EAFTLoss(BaseLoss):  # type: ignore[misc]
    """:func:`eaft_ext.gated_ce` as a loss of ms-swift's trainer."""

    def __init__(self, args: Any, trainer: Any) -> None:
        super().__init__(args, trainer)
        if self.is_megatron:
            raise ValueError(
                f"loss_type {NAME!r} is for ms-swift's trainer of transformers; Megatron-SWIFT "
                "takes eaft_ext.integrations.megatron.use_gated_ce in a callback"
            )
        if getattr(args, "enable_dft_loss", False):
            raise ValueError(f"loss_type {NAME!r} and enable_dft_loss are two losses; take one")
        if getattr(args, "label_smoothing_factor", 0):
            raise ValueError(
                f"loss_type {NAME!r} does not smooth labels; leave label_smoothing_factor 0"
            )
        k = _number("EAFT_K", 20, "all")
        if k is not None and k != int(k):
            raise ValueError(f"EAFT_K must be a whole number or 'all', got {k}")
        self.options: dict[str, Any] = {
            "k": None if k is None else int(k),
            "alpha": _number("EAFT_ALPHA", 1.0),
            "normalizer": _number("EAFT_NORMALIZER", 3.0, "ln k"),
        }

    def __call__(
        self,
        outputs: Any,
        labels: Tensor,
        *,
        num_items_in_batch: float | Tensor | None = None,
        loss_scale: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """The loss of logits [b, s, V] and labels [b, s]; ``loss_scale`` weights the tokens."""
        if self.trainer is not None and self.trainer.template.sequence_parallel_size > 1:
            raise ValueError(
                f"loss_type {NAME!r}: under sequence parallelism ms-swift computes plain "
                "cross-entropy before its loss types are called; it is not supported"
            )
        logits = outputs.logits
        labels = next_token_labels(labels, -100).to(logits.device)
        # Shifted already, and flat.
        weight = None if loss_scale is None else loss_scale.view(labels.shape).float()
        loss: Tensor = eaft_ext.gated_ce(
            logits,
            labels,
            token_weight=weight,
            num_items_in_batch=num_items_in_batch,
            **self.options,
        )
        return loss


loss_map[NAME] = EAFTLoss
