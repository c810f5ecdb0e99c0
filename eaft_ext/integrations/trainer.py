"""The ``Trainer`` of transformers, and TRL's ``SFTTrainer``: the gated loss while they train.

Trainer(model, arguments, train_dataset=dataset, callbacks=[EAFTCallback()])
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn
from transformers import Trainer, TrainerCallback

import eaft_ext
from eaft_ext._conflicts import confident_conflicts
from eaft_ext._landscape import CELLS, counts
from eaft_ext._options import LossKeywords, token_loss, with_keywords
from eaft_ext.integrations._call import next_token_labels
from eaft_ext.integrations._landscape_image import check_pillow, log_image, warn_of_no_logger
from eaft_ext.integrations.transformers import LinearGatedLoss, for_trainer
from eaft_ext.reference import TokenStats

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["EAFTCallback", "gated_loss_func"]

LossFunction = Callable[..., Tensor]
PREFIX = "eaft_"
IGNORED = -100
_NAMES = ("gate", "entropy", "nll", "token_accuracy", "confident_conflicts")


@with_keywords
def gated_loss_func(k: int | None = 20, **options: Unpack[LossKeywords]) -> LossFunction:
    """The gated loss as ``Trainer``'s ``compute_loss_func``, of logits that the model returns.

    For a causal language model that :class:`EAFTCallback` refuses; the logits are in memory. A loss
    that the model adds to its own, such as a router's, is not in it: ``Trainer`` takes what the
    function returns. Not for models whose labels are not shifted, as those of an encoder and a
    decoder or of masked words::

        loss = sum_t g_t * -ln softmax(x_t)_{y_(t+1)}  /  num_items_in_batch

    Args:
        k, options: those of :func:`eaft_ext.gated_ce`.

    Returns:
        A function of ``(outputs, labels, num_items_in_batch=None)``. Labels [b, s] are those of the
        data set, and are shifted here; without ``num_items_in_batch`` the sum is divided by the
        number of tokens that are not ignored.

    Raises:
        TypeError, ValueError: as :func:`eaft_ext.gated_ce` does; for an ``ignore_index`` that is
            not the trainers', -100; in a call, for the outputs of an encoder and a decoder, and for
            labels that are not one for each position.
    """
    op = "gated_loss_func"
    _check_ignore_index(op, token_loss(op, k, **options).ignore_index)

    def loss_func(
        outputs: Any, labels: Tensor, num_items_in_batch: float | Tensor | None = None
    ) -> Tensor:
        is_dict = isinstance(outputs, dict)
        if is_dict and "encoder_last_hidden_state" in outputs:
            raise TypeError(
                f"{op}: the model has an encoder; labels of its decoder are not shifted"
            )
        logits = outputs["logits"] if is_dict else outputs[0]
        if logits.shape[:-1] != labels.shape:
            raise ValueError(
                f"{op}: labels must be one for each position, got {tuple(labels.shape)} for logits "
                f"{tuple(logits.shape)}"
            )
        labels = next_token_labels(labels, IGNORED).to(logits.device)
        if isinstance(num_items_in_batch, Tensor):
            if num_items_in_batch.numel() > 1:
                raise ValueError(
                    f"{op}: nn.DataParallel is not supported; launch with torchrun, or show it one "
                    "GPU"
                )
            if num_items_in_batch.device.type != "cpu":
                num_items_in_batch = num_items_in_batch.to(logits.device)
        loss: Tensor = eaft_ext.gated_ce(
            logits, labels, k, num_items_in_batch=num_items_in_batch, **options
        )
        return loss

    return loss_func


def _check_ignore_index(op: str, ignore_index: int) -> None:
    if ignore_index != IGNORED:
        raise ValueError(
            f"{op}: ignore_index must be {IGNORED}, by which trainers pad and count, got "
            f"{ignore_index}"
        )


class EAFTCallback(TrainerCallback):
    """The gated loss of a ``Trainer`` or an ``SFTTrainer`` (TRL from 1.15), while it trains.

    At the start of training the model is given the loss of
    :func:`eaft_ext.integrations.transformers.use_linear_gated_ce`, and at the end its own again::

        Trainer(model, arguments, train_dataset=dataset, callbacks=[EAFTCallback()])
        SFTTrainer(model, train_dataset=dataset, callbacks=[EAFTCallback(k=20)])
        trainer.add_callback(EAFTCallback())

    The trainer logs, beside its loss, means over the tokens that were not ignored since the last
    log, and of evaluations while it trains: ``eaft_gate``; ``eaft_entropy``, that of the gate, and
    ``eaft_nll``, the plain cross-entropy, both in nats; ``eaft_token_accuracy``; and
    ``eaft_confident_conflicts``, the share of tokens with p(y) < 0.1 and H < 0.3 ln k. They are of
    all processes, and cost one read of the host for each log. TRL's own metrics keep its meaning.
    With ``landscape=True`` TensorBoard and W&B are also given ``eaft_landscape``: the same tokens
    in the plane of p(y), to the right, and H / ln k, upwards, a small image, darker where there are
    more of them, in which lines bound the confident conflicts.

    Args:
        k, options: those of :func:`eaft_ext.integrations.transformers.use_linear_gated_ce`.
        logs: False: nothing is added to what the trainer logs.
        landscape: True: an image with each of these logs, where the logger takes images.

    Raises:
        ImportError: for ``landscape=True`` without Pillow.
        TypeError, ValueError: as ``use_linear_gated_ce`` does, at the start of training: also for
            ``label_smoothing_factor``, with which the trainer computes a loss of its own, for
            another ``loss_type`` of TRL than "nll", and for its other trainers.
        RuntimeError: in the first step, if the trainer computes another loss all the same, such as
            that of a ``compute_loss_func``.

    An evaluation before or after the training is of the model's own loss. Where training ends by an
    exception, the model keeps the gated loss until :meth:`remove`.
    """

    @with_keywords
    def __init__(
        self,
        k: int | None = 20,
        *,
        logs: bool = True,
        landscape: bool = False,
        chunk_size: int | None = None,
        accumulate_in_float32: bool | None = None,
        drop_below: float = 0.0,
        logits_in_evaluation: bool = True,
        watch_steps: bool = True,
        **options: Unpack[LossKeywords],
    ) -> None:
        for option, value in (("logs", logs), ("landscape", landscape)):
            if not isinstance(value, bool):
                raise TypeError(f"EAFTCallback: {option} must be True or False, got {value!r}")
        if landscape and not logs:
            raise ValueError("EAFTCallback: landscape=True is of what logs=False leaves out")
        if landscape:
            check_pillow()
        _check_ignore_index("EAFTCallback", token_loss("EAFTCallback", k, **options).ignore_index)
        self.logs = logs
        self.landscape = landscape
        self.options: dict[str, Any] = {
            "k": k,
            "chunk_size": chunk_size,
            "accumulate_in_float32": accumulate_in_float32,
            "drop_below": drop_below,
            "logits_in_evaluation": logits_in_evaluation,
            "watch_steps": watch_steps,
            **options,
        }
        self.gated: LinearGatedLoss | None = None
        """What undoes it and has the stats of the last call; None while nothing is trained."""
        self._sums: dict[bool, Tensor | None] = {}
        self._counted: TokenStats | None = None
        self._has_warned = False
        _extend_logs()

    def remove(self) -> None:
        """Give the model its own loss again."""
        if self.gated is not None:
            self.gated.remove()
        self.gated = None
        self._sums = {}
        self._counted = None

    @contextmanager
    def installed(self, model: nn.Module, arguments: Any) -> Iterator[LinearGatedLoss]:
        """The same for a block, as an evaluation outside of a training."""
        self._install(model, arguments)
        assert self.gated is not None, "it was installed"
        try:
            yield self.gated
        finally:
            self.remove()

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any
    ) -> None:
        """Install the loss."""
        if model is None:
            raise TypeError("EAFTCallback: the trainer has no model")
        self._install(model, args)

    def _install(self, model: nn.Module, args: Any) -> None:
        smoothing = getattr(args, "label_smoothing_factor", 0)
        if smoothing:
            raise ValueError(
                f"EAFTCallback: with label_smoothing_factor={smoothing} the trainer computes a "
                f"loss of its own, from logits; leave it 0 and write "
                f"EAFTCallback(label_smoothing={smoothing})"
            )
        earlier = self.gated
        self.gated = for_trainer(model, args, **self.options)
        if earlier is not None:  # of another model, whose training ended by an exception
            earlier.remove()
        self._sums = {}
        self._counted = None

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Give the model its own loss again."""
        self.remove()

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Count the tokens of a micro-batch."""
        self._count(is_evaluation=False)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Count those of the last one of a step."""
        self._count(is_evaluation=False)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Count those of an evaluation."""
        self._count(is_evaluation=True)

    def on_predict(self, args: Any, state: Any, control: Any, metrics: Any, **_: Any) -> None:
        """A prediction is not logged: its tokens are those of no evaluation."""
        self._sums.pop(True, None)

    def _count(self, is_evaluation: bool) -> None:
        stats = None if self.gated is None else self.gated.stats
        if not self.logs or stats is None or stats is self._counted:
            return
        self._counted = stats
        assert self.gated is not None and stats.correct is not None, "they were asked for"
        k = self.gated.num_logits
        conflicts = confident_conflicts(stats.nll, stats.entropy, k)
        of_token = (stats.valid, stats.gate, stats.entropy, stats.nll, stats.correct, conflicts)
        dtype = torch.float32 if stats.nll.device.type == "mps" else torch.float64
        # Stats are 0 where ignored; those of a conflict are not.
        sums = torch.stack([torch.where(stats.valid, s, 0).sum(dtype=dtype) for s in of_token])
        if self.landscape:
            cells = counts(stats.nll, stats.entropy, k, stats.valid)
            sums = torch.cat([sums, cells.flatten().to(dtype)])
        before = self._sums.get(is_evaluation)
        self._sums[is_evaluation] = sums if before is None else before + sums

    def take_means(self, is_evaluation: bool) -> dict[str, float]:
        """The means since the last call, of all processes, which have to call this together."""
        return self._take(is_evaluation)[0]

    def _take(self, is_evaluation: bool) -> tuple[dict[str, float], Tensor | None]:
        """The means, and with ``landscape`` the tokens in each cell, on the host."""
        sums = self._sums.pop(is_evaluation, None)
        if sums is None:
            return {}, None
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(sums)
        sums = sums.cpu()
        count, *totals = sums[: 1 + len(_NAMES)].tolist()
        if count == 0:
            return {}, None
        means = {PREFIX + name: total / count for name, total in zip(_NAMES, totals, strict=True)}
        cells = sums[1 + len(_NAMES) :].view(CELLS, CELLS) if self.landscape else None
        return means, cells

    def _add_to_logs(self, trainer: Trainer, logs: dict[str, float]) -> None:
        """To the trainer's own logs, which all processes make: of some steps, of an evaluation."""
        if "loss" in logs and "learning_rate" in logs:
            prefix, is_evaluation = "", False
        else:
            runtime = next((name for name in logs if name.endswith("_runtime")), None)
            if runtime is None or "total_flos" in logs:  # which the summary of a training has
                return
            prefix, is_evaluation = runtime.removesuffix("runtime"), True
        means, cells = self._take(is_evaluation)
        logs.update({prefix + name: mean for name, mean in means.items()})
        if cells is None or not trainer.state.is_world_process_zero:
            return
        name = f"{prefix}{PREFIX}landscape"
        is_logged = log_image(
            trainer.callback_handler.callbacks, name, cells, trainer.state.global_step
        )
        if not is_logged and not self._has_warned:
            warn_of_no_logger()
            self._has_warned = True


@cache
def _extend_logs() -> None:
    """Once: a callback sees what is logged after TensorBoard and others have, and too late."""
    log = Trainer.log

    @wraps(log)
    def extended(self: Trainer, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EAFTCallback):
                callback._add_to_logs(self, logs)
        log(self, logs, *args, **kwargs)

    Trainer.log = extended  # type: ignore[method-assign]
