"""The landscape of a training as an image, in the logs that take one."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.integration_utils import (
    TensorBoardCallback,
    WandbCallback,
    rewrite_logs,
)

from eaft_ext._conflicts import CONFLICT_ENTROPY, CONFLICT_PROBABILITY
from eaft_ext._landscape import CELLS, FAINTEST

PIXELS = 6
"""Of a cell, each way."""

GROUND, FULL, BOUND = (250, 250, 247), (27, 79, 138), (194, 37, 92)
"""Red, green and blue of a cell without tokens, of the one with most, and of the corner's edges."""


def check_pillow() -> None:
    """Raise ImportError where loggers could not write an image, before anything is trained."""
    if importlib.util.find_spec("PIL") is None:
        raise ImportError(
            "EAFTCallback: landscape=True needs Pillow, with which loggers write images: pip "
            "install pillow"
        )


def draw(cells: Tensor) -> Tensor:
    """Return the plane as an image, uint8 [height, width, 3].

    Probability goes to the right, entropy upwards. A cell is as dark as the logarithm of its count
    in ``cells`` [CELLS, CELLS], which is that of ``eaft_ext._landscape.counts``. Lines bound the
    confident conflicts, p < 0.1 and H < 0.3 ln k; they lie outside of them.
    """
    found = cells.float().log1p()
    part = found / found.max().clamp(min=1e-6)
    part = torch.where(found > 0, FAINTEST + (1 - FAINTEST) * part, 0.0).flip(0)
    part = part.repeat_interleave(PIXELS, 0).repeat_interleave(PIXELS, 1).unsqueeze(-1)
    ground, full, bound = torch.tensor((GROUND, FULL, BOUND), device=cells.device).unbind()
    image = (ground + part * (full - ground)).round().to(torch.uint8)
    right = round(CONFLICT_PROBABILITY * CELLS) * PIXELS
    top = (CELLS - round(CONFLICT_ENTROPY * CELLS)) * PIXELS - 1
    image[top:, right] = bound.to(image.dtype)
    image[top, : right + 1] = bound.to(image.dtype)
    return image


def log_image(callbacks: Iterable[Any], name: str, cells: Tensor, step: int) -> bool:
    """Give the image to those callbacks of a trainer that log images; return whether one did.

    They name it as they name the numbers that are logged with it. To be called where they log, in
    the main process, before the trainer's own logs of the step.
    """
    image = draw(cells).numpy()
    (tag,) = rewrite_logs({name: None})
    is_logged = False
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            callback.tb_writer.add_image(tag, image, step, dataformats="HWC")
            is_logged = True
        elif isinstance(callback, WandbCallback) and callback._wandb.run is not None:
            caption = f"p(y) to the right, H / ln k upwards, {int(cells.sum())} tokens"
            shown = callback._wandb.Image(image, caption=caption)
            # The trainer's own logs, which come next, are of the same row.
            callback._wandb.log({tag: shown}, commit=False)
            is_logged = True
    return is_logged


def warn_of_no_logger() -> None:
    """Where the landscape was asked for, and nothing shows it."""
    warnings.warn(
        "EAFTCallback: landscape=True, but the trainer logs to nothing that takes an image; "
        'report_to="tensorboard" or "wandb" does',
        stacklevel=2,
    )
