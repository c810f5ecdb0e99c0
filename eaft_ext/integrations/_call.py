"""A forward with labels of a model of transformers: its loss, in the place of its logits."""

from __future__ import annotations

from typing import Any, Literal, NoReturn, cast

import torch
from torch import Tensor, nn

import eaft_ext
from eaft_ext.integrations import _output_layer
from eaft_ext.integrations._absent_logits import AbsentLogits, LogitMap
from eaft_ext.integrations._patches import forward_slot, patch_of
from eaft_ext.integrations._training_steps import defined_as
from eaft_ext.integrations._trl import is_chunked
from eaft_ext.reference import TokenStats

OP = "use_linear_gated_ce"
LOSS = "_loss_function"
"""Where the setter of transformers' loss_function puts one."""


class Call:
    """A forward with labels: its loss is computed where its logits would be."""

    def __init__(
        self,
        owner: Any,
        model: nn.Module,
        labels: Any,
        given: dict[str, Any],
        keeps_logits: bool = False,
        return_stats: Literal[True, "full"] = True,
    ) -> None:
        self.owner = owner
        self.model = model
        self.name = type(model).__name__
        self.labels = labels
        self.given = given
        self.keeps_logits = keeps_logits
        self.return_stats = return_stats
        self.takes_chunks = is_chunked(owner.trl_forward)
        self.layers: list[nn.Module] = []
        self.loss: Tensor | None = None
        self.map = owner.model_map if owner.given_map == LogitMap() else owner.given_map
        self.product: tuple[Tensor, nn.Linear] | None = None
        self.stats: TokenStats | None = None
        self.version: int | None = None
        self.is_taken = False

    def look_up_layers(self) -> None:
        """Find the output layer that the model has now."""
        self.layers = _output_layer.layers_of(self.model)
        # A compiler has guards on what it looks at here, and traces anew when that has changed.
        is_ready = all(_output_layer.is_ready(layer) for layer in self.layers)
        if not (torch.compiler.is_compiling() and is_ready):
            self._check_layers()

    @torch.compiler.disable(reason=f"{OP} has to look at an output layer that was replaced")
    def _check_layers(self) -> None:
        for layer in self.layers:
            _output_layer.check(OP, layer, self.name)
            _output_layer.install(layer, self.owner)

    def options_and_labels(self, like: Tensor) -> tuple[dict[str, Any], Tensor]:
        """What the losses take, for a hidden state or logits: labels (...) for (..., H or V)."""
        options = dict(self.owner.options)
        if self.given.get("ignore_index") is not None:
            options["ignore_index"] = self.given["ignore_index"]
        num_items = self.given.get("num_items_in_batch")
        if isinstance(num_items, Tensor) and num_items.device.type != "cpu":
            num_items = num_items.to(like.device)
        options["num_items_in_batch"] = num_items
        labels = self.given.get("shift_labels")
        if labels is None:
            labels = next_token_labels(self.labels, options["ignore_index"])
        if labels.numel() != like.shape[:-1].numel():
            has_less = self.given.get("logits_to_keep") is not None
            hint = "; logits_to_keep does not go with labels" if has_less else ""
            raise ValueError(
                f"{OP}: labels must be one for each position, got {tuple(labels.shape)} where the "
                f"output layer has {tuple(like.shape[:-1])}{hint}"
            )
        return options, labels.to(like.device).reshape(like.shape[:-1])

    def is_for(self, layer: nn.Module) -> bool:
        """Whether the loss is computed in the call of this layer."""
        return not (self.is_taken or self.keeps_logits) and any(layer is one for one in self.layers)

    def absent_logits(self, layer: nn.Linear, input: Tensor) -> AbsentLogits:
        """Compute the loss, for the hidden state that the output layer was given."""
        hidden = input
        if hasattr(layer.weight, "device_mesh"):
            raise TypeError(
                f"{OP}: the output layer of {self.name} is divided by tensor parallelism; give "
                "eaft_ext.gated_ce the logits, which it takes divided as they are"
            )
        if self.loss is not None:
            self.refuse("a second call of its output layer")
        self.version = _version_of(self.labels)
        self.product = (hidden, layer)
        self.loss = self.compute()
        shape = torch.Size((*hidden.shape[:-1], layer.weight.size(0)))
        return AbsentLogits(self.loss, shape, layer.weight.dtype, self.refuse)

    def compute(self) -> Tensor:
        """The loss, of logits of which the model makes what is in ``map``."""
        assert self.product is not None, "the output layer was called"
        hidden, layer = self.product
        options, labels = self.options_and_labels(hidden)
        options |= self.map._asdict()
        self.owner.note_vocab(layer.weight.size(0))
        loss, self.stats = eaft_ext.linear_gated_ce(
            hidden, layer.weight, labels, layer.bias, return_stats=self.return_stats, **options
        )
        return loss

    def of_hidden(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        softcap: float | None,
        logit_scale: float,
    ) -> tuple[Tensor, TokenStats]:
        """The loss where the output layer is not called, as in TRL before 1.15."""
        model_map = LogitMap(softcap, logit_scale)
        if self.owner.given_map != LogitMap():
            self.owner.check_given(self.name, model_map)
        options, labels = self.options_and_labels(hidden)
        if self.owner.given_map == LogitMap():
            options |= model_map._asdict()
        self.owner.note_vocab(weight.size(0))
        loss, stats = eaft_ext.linear_gated_ce(
            hidden, weight, labels, bias, return_stats="full", **options
        )
        self.is_taken = True
        self.owner.stats = stats
        self.owner.steps.asked()
        return loss, stats

    def take(self, logits: Any, labels: Tensor | None, given: dict[str, Any]) -> Tensor:
        """The loss, for what the model gives its loss function."""
        if self.is_taken:
            self.refuse("a second call of its loss function")
        self.is_taken = True
        is_moved = isinstance(labels, Tensor) and labels.device != self.labels.device
        is_shifted = given.get("shift_labels") is self.given.get("shift_labels")
        is_same = labels is self.labels and self.version in (None, _version_of(self.labels))
        if not is_shifted or not (is_same or is_moved):
            raise TypeError(f"{OP}: {self.name} changes the labels before its loss")
        for name in ("ignore_index", "num_items_in_batch"):
            value, own = given.get(name), self.given.get(name)
            if value is not own and (isinstance(value, Tensor) or value not in (None, own)):
                raise TypeError(
                    f"{OP}: {self.name} gives its loss function {name}={value}, and its forward "
                    f"was given {own}"
                )
        if self.keeps_logits:
            loss: Tensor = self.owner.of_logits(self, logits)
            return loss
        if self.loss is None or not isinstance(logits, AbsentLogits):
            raise TypeError(f"{OP}: {self.name} does not call its output layer for its logits")
        if self.owner.given_map != LogitMap():
            self.owner.check_given(self.name, logits.map)
        elif not self.map.is_close(logits.map):
            # It does what its configuration did not tell; from the next call on it is expected.
            logits.loss = self.loss.new_empty(0)  # the gradients that it holds are free again
            self.map = self.owner.model_map = logits.map
            self.loss = self.compute()
        self.owner.stats = self.stats
        self.owner.steps.asked()
        # Not what the logits have in its place: FSDP2 may have rounded that to an output dtype. To
        # a copy the model may add a router's loss, in place.
        return self.loss.clone()

    def refuse(self, use: str) -> NoReturn:
        """For a use of the logits that are not there, such as "mul"."""
        raise TypeError(
            f"{OP}: {self.name} changes its logits, or uses them, outside of its loss function "
            f"({use}){self._replaced()}; give eaft_ext.gated_ce the logits that it returns "
            "without labels"
        )

    def _replaced(self) -> str:
        """What of the model has come from elsewhere, for a sentence that says what it does."""
        parts = ""
        forward = patch_of(self.model, forward_slot(self.model))
        below = None if forward is None else getattr(forward.replaced, "__func__", forward.replaced)
        if below not in (None, type(self.model).forward):
            parts += f"; its forward is {defined_as(below)}"
        if patch_of(self.model, LOSS) is None:
            parts += f"; its loss function is {defined_as(cast('Any', self.model).loss_function)}"
        return parts

    def without_logits(self, outputs: Any) -> Any:
        """What the forward gives, a dict with attributes or a tuple, less what were the logits."""
        if not self.is_taken:
            raise TypeError(
                f"{OP}: {self.name} did not call its loss_function with the logits of its output "
                f"layer, as models of transformers do{self._replaced()}"
            )
        if self.keeps_logits:
            return outputs
        if isinstance(outputs, tuple):
            return tuple(output for output in outputs if not isinstance(output, AbsentLogits))
        # A new one: to set an entry to None would leave what it was under its name.
        return type(outputs)(
            **{
                name: output
                for name, output in outputs.items()
                if not isinstance(output, AbsentLogits)
            }
        )


def next_token_labels(labels: Tensor, ignore_index: int) -> Tensor:
    """Labels [b, s] of the next token at each position: not the hidden state is shifted.

    That would have to be copied to lose a position.
    """
    return nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]


def _version_of(labels: Any) -> int | None:
    """How often they were written to, where this is counted."""
    if torch.compiler.is_compiling() or not isinstance(labels, Tensor) or labels.is_inference():
        return None
    return labels._version
