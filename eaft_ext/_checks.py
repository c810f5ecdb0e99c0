"""What the public functions ask of their arguments, in one sentence with the offending value."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from eaft_ext._dispatch import is_transformed

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def wants_value_checks() -> bool:
    """Whether to check what costs a synchronisation, or a wait for other processes."""
    return not torch.compiler.is_compiling() and os.environ.get("EAFT_EXT_CHECKS") == "1"


def check_logits(op: str, logits: Tensor, smallest_vocab: int = 1) -> None:
    if not isinstance(logits, Tensor):
        raise TypeError(f"{op}: logits must be a tensor, got {type(logits).__name__}")
    if logits.dtype not in _DTYPES:
        raise TypeError(
            f"{op}: logits must be float32, bfloat16, float16 or float64, got {logits.dtype}"
        )
    if logits.dim() == 0 or logits.size(-1) < smallest_vocab:
        raise ValueError(
            f"{op}: logits must be (..., V) with V of at least {smallest_vocab}, got "
            f"{tuple(logits.shape)}"
        )


def check_labels(op: str, labels: Tensor) -> None:
    if not isinstance(labels, Tensor):
        raise TypeError(f"{op}: labels must be a tensor, got {type(labels).__name__}")
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: labels must be int64 or int32, got {labels.dtype}")


def check_placement(op: str, labels: Tensor, logits: Tensor, name: str = "logits") -> None:
    """Labels belong to logits, or to what ``name`` says, row by row."""
    if hasattr(labels, "device_mesh") and not hasattr(logits, "device_mesh"):
        raise TypeError(f"{op}: labels are a DTensor and {name} are not; labels.to_local() is none")
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"{op}: labels must have the shape of the {name} without the last dimension, got "
            f"{tuple(labels.shape)} for {name} {tuple(logits.shape)}"
        )
    if labels.device != logits.device:
        raise ValueError(f"{op}: labels are on {labels.device} and {name} on {logits.device}")


def check_token_weight(op: str, token_weight: Tensor, where: Tensor, name: str) -> None:
    """A weight for each token, where the logits are, or what ``name`` says."""
    if not isinstance(token_weight, Tensor):
        raise TypeError(f"{op}: token_weight must be a tensor, got {type(token_weight).__name__}")
    if hasattr(token_weight, "device_mesh") and not hasattr(where, "device_mesh"):
        raise TypeError(
            f"{op}: token_weight is a DTensor and {name} are not; token_weight.to_local() is none"
        )
    if token_weight.dtype.is_complex:
        raise TypeError(f"{op}: token_weight must be real, got {token_weight.dtype}")
    if token_weight.device != where.device:
        raise ValueError(
            f"{op}: token_weight is on {token_weight.device} and {name} on {where.device}"
        )


def check_linear(
    op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, smallest_vocab: int = 1
) -> None:
    """What is multiplied: hidden (..., H), weight (V, H) and bias (V)."""
    given = {"hidden": hidden, "weight": weight} | ({} if bias is None else {"bias": bias})
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in _DTYPES:
            raise TypeError(
                f"{op}: {name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}"
            )
        if tensor.device != hidden.device:
            raise ValueError(f"{op}: {name} is on {tensor.device} and hidden on {hidden.device}")
    if hidden.dim() == 0 or hidden.size(-1) == 0:
        raise ValueError(
            f"{op}: hidden must be (..., H) with H of at least 1, got {tuple(hidden.shape)}"
        )
    if weight.dim() != 2 or weight.size(1) != hidden.size(-1) or weight.size(0) < smallest_vocab:
        raise ValueError(
            f"{op}: weight must be (V, H) with V of at least {smallest_vocab} and H = "
            f"{hidden.size(-1)}, that of the hidden, got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{op}: bias must be (V) with V = {weight.size(0)}, that of the weight, got "
            f"{tuple(bias.shape)}"
        )


def check_same_dtype(op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Operands of a product are not converted, but by autocast."""
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise TypeError(
                f"{op}: {name} is {tensor.dtype} and hidden {hidden.dtype}; convert one, or use "
                "torch.autocast"
            )


def check_chunks(
    op: str,
    chunk_size: int | None,
    accumulate_in_float32: bool | None,
    drop_below: float = 0.0,
    z_loss: float = 0.0,
) -> None:
    """How the tokens are divided, their gradients added up, and which are dropped."""
    if isinstance(drop_below, bool) or not isinstance(drop_below, (int, float)):
        raise TypeError(f"{op}: drop_below must be a number, got {drop_below!r}")
    if not 0 <= drop_below < 1:
        raise ValueError(f"{op}: drop_below must be at least 0 and below 1, got {drop_below}")
    if drop_below > 0 and z_loss != 0:
        raise ValueError(
            f"{op}: drop_below={drop_below} drops tokens of which a z_loss learns, got "
            f"z_loss={z_loss}"
        )
    if chunk_size is not None:
        if isinstance(chunk_size, bool) or not isinstance(chunk_size, (int, torch.SymInt)):
            raise TypeError(f"{op}: chunk_size must be an int, got {chunk_size!r}")
        if chunk_size < 1:
            raise ValueError(f"{op}: chunk_size must be at least 1, got {chunk_size}")
    if accumulate_in_float32 is not None and not isinstance(accumulate_in_float32, bool):
        raise TypeError(
            f"{op}: accumulate_in_float32 must be True, False or None, got "
            f"{accumulate_in_float32!r}"
        )


def check_weight_shape(op: str, token_weight: Tensor, labels: Tensor) -> None:
    """A weight for each token."""
    if token_weight.shape != labels.shape:
        raise ValueError(
            f"{op}: token_weight must have the shape of the labels, {tuple(labels.shape)}, got "
            f"{tuple(token_weight.shape)}"
        )


def check_weight_values(
    op: str, token_weight: Tensor | None, labels: Tensor, ignore_index: int
) -> None:
    """Shaped like the labels; and not negative, where it costs no synchronisation to see.

    Those of ignored tokens may be anything.
    """
    if token_weight is None:
        return
    check_weight_shape(op, token_weight, labels)
    at_hand = token_weight.device.type == "cpu" and not torch.compiler.is_compiling()
    # Fake tensors have no values.
    if (
        not (at_hand or wants_value_checks())
        or type(token_weight) is not Tensor
        or is_transformed()
    ):
        return
    for position in ((token_weight < 0) & (labels != ignore_index)).nonzero()[:1].tolist():
        raise ValueError(
            f"{op}: token_weight must be at least 0, got {token_weight[tuple(position)].item()} at "
            f"position {position}"
        )


def check_label_values(
    op: str, labels: Tensor, vocab_size: int, ignore_index: int, always: bool = False
) -> None:
    """The check that the CPU kernels always make; elsewhere only if it is asked for."""
    if not (always or wants_value_checks()):
        return
    outside = ((labels < 0) | (labels >= vocab_size)) & (labels != ignore_index)
    for position in outside.nonzero()[:1].tolist():
        raise ValueError(
            f"{op}: the label at position {position} is {labels[tuple(position)].item()}, outside "
            f"[0, {vocab_size}) and not ignore_index {ignore_index}"
        )
