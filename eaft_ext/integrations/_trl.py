"""TRL's own output layers, which replace a model's forward, and what its trainer takes of them.

Since TRL 1.15 ``SFTTrainer`` calls the model with ``fused_lm_head=True`` and computes, of what it
gets, ``-log_probs.sum() / num_tokens`` and the means of ``entropy`` and ``is_top1``. Before, with
``loss_type="chunked_nll"``, the forward calls a function of its module for the loss and the sums of
the metrics. Averages over processes, a router's loss and the metrics are TRL's own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import Tensor, nn

from eaft_ext.integrations._output_layer import active
from eaft_ext.integrations._patches import forward_slot
from eaft_ext.reference import TokenStats

FUSED = "fused_lm_head"
"""The argument by which TRL asks for it."""
_CHUNKED = "_chunked_cross_entropy_loss"
"""What TRL calls the function before 1.15."""
_CALLBACK = "eaft_ext.integrations.trainer.EAFTCallback"


def fused_forward(op: str, model: nn.Module, arguments: Any) -> Callable[..., Any] | None:
    """TRL's forward, if the model has it. Raise unless its trainer takes of it what is known here.

    ``arguments`` are the trainer's; None: it is not known who trains.
    """
    forward = _found(model)
    name = type(model).__name__
    if any(base.__name__ == "SFTConfig" for base in type(arguments).__mro__):
        _check_sft(op, arguments, forward)
        return forward
    if forward is None:
        return None
    if arguments is None:
        raise TypeError(
            f"{op}: TRL has replaced the forward of {name}; give its SFTTrainer {_CALLBACK} among "
            "its callbacks instead"
        )
    raise TypeError(
        f"{op}: of TRL's trainers only SFTTrainer is supported, got arguments of "
        f"{type(arguments).__name__}"
    )


def _check_sft(op: str, arguments: Any, forward: Callable[..., Any] | None) -> None:
    if arguments.loss_type not in ("nll", "chunked_nll"):
        raise ValueError(
            f"{op}: SFTTrainer with loss_type={arguments.loss_type!r} computes a loss of its own; "
            f"leave it out and give {_CALLBACK} the gate, such as ProbabilityGate() for 'dft'"
        )
    if forward is None:
        raise ValueError(
            f"{op}: before TRL 1.15, SFTTrainer with loss_type='nll' computes its metrics from "
            "logits; write loss_type='chunked_nll', which TRL has since 1.5"
        )


def _found(model: nn.Module) -> Callable[..., Any] | None:
    """Below whatever has wrapped it since."""
    function = vars(model).get(forward_slot(model))
    while function is not None:
        function = getattr(function, "__func__", function)
        code = getattr(function, "__code__", None)
        module = getattr(function, "__globals__", {}).get("__name__", "")
        is_of_trl = module.startswith("trl.") and code is not None
        names = (*code.co_varnames, *code.co_names) if is_of_trl and code else ()
        if FUSED in names or _CHUNKED in names:
            found: Callable[..., Any] = function
            return found
        function = getattr(function, "__wrapped__", None)
    return None


def is_chunked(forward: Callable[..., Any] | None) -> bool:
    """Whether it is the forward of TRL before 1.15."""
    return forward is not None and _CHUNKED in forward.__code__.co_names


def hook_chunks(forward: Callable[..., Any]) -> None:
    """Have TRL's function ask, once, whether the forward that calls it is one with our loss."""
    scope = forward.__globals__
    own = scope[_CHUNKED]
    if hasattr(own, "asks_eaft_ext"):
        return

    @wraps(own)
    def chunked(hidden: Tensor, weight: Tensor, chunk_size: int, **given: Any) -> tuple[Any, ...]:
        call: Any = active.call
        if call is None or not call.takes_chunks:
            result: tuple[Any, ...] = own(hidden, weight, chunk_size, **given)
            return result
        loss, stats = call.of_hidden(
            hidden,
            weight.to(hidden.dtype),
            given.get("lm_head_bias"),
            given.get("final_logit_softcapping"),
            given.get("logit_scale", 1.0),
        )
        return loss, stats.correct.sum().float(), stats.vocab_entropy.sum(), stats.valid.sum()

    chunked.asks_eaft_ext = True  # type: ignore[attr-defined]
    scope[_CHUNKED] = chunked


def fused_output(
    forward: Callable[..., Any], total: Tensor, stats: TokenStats, aux_loss: Tensor | None
) -> Any:
    """What TRL's forward would return, for a loss of which ``total`` is the sum over tokens.

    ``log_probs`` is one number, whose sum is that of the negative losses: their gradients are then
    computed together with them.
    """
    output = forward.__globals__["FusedCausalLMOutput"]
    return output(
        loss=total / stats.valid.sum().clamp(min=1),
        log_probs=-total,
        entropy=stats.vocab_entropy,
        is_top1=stats.correct,
        label_mask=stats.valid,
        aux_loss=aux_loss,
    )
