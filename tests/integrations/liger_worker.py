"""The process of test_liger.py, in which Triton interprets: ``liger_worker.py 0 1 FOLDER``."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from liger_kernel.transformers import apply_liger_kernel_to_llama
from spawned import work
from trainer_runs import InOrder, arguments, examples, logged
from transformers.models.llama import modeling_llama
from transformers_models import batch, build

from eaft_ext.integrations.trainer import EAFTCallback
from eaft_ext.integrations.transformers import use_linear_gated_ce

FUSED = {
    "rope": False,
    # Triton's interpreter does not run these two.
    "swiglu": False,
    "rms_norm": False,
    "cross_entropy": False,
    "fused_linear_cross_entropy": True,
}
UNFUSED = FUSED | {
    "rope": True,
    "cross_entropy": True,
    "fused_linear_cross_entropy": False,
}


@contextmanager
def own_classes() -> Iterator[None]:
    """Leave the classes of transformers as they were: Liger replaces their methods and names."""
    forward, names = modeling_llama.LlamaForCausalLM.forward, dict(vars(modeling_llama))
    try:
        yield
    finally:
        modeling_llama.LlamaForCausalLM.forward = forward
        vars(modeling_llama).update(names)


def step(model: Any) -> float:
    """The loss of a step."""
    tokens, labels = batch()
    loss = model(tokens, labels=labels).loss
    loss.backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    return float(loss)


def on_instance(liger: dict[str, Any], order: str) -> float:
    model = build("llama").train()
    if order == "before":
        apply_liger_kernel_to_llama(**liger, model=model)
    use_linear_gated_ce(model)
    if order == "after":
        apply_liger_kernel_to_llama(**liger, model=model)
    return unless_refused(model)


def on_class(liger: dict[str, Any], order: str) -> float:
    if order == "before":
        apply_liger_kernel_to_llama(**liger)
    model = build("llama").train()
    use_linear_gated_ce(model)
    if order == "after":
        apply_liger_kernel_to_llama(**liger)
    return unless_refused(model)


def unless_refused(model: Any) -> float:
    """The loss of a step, which changes no weight where it raises."""
    before = copy.deepcopy(model.state_dict())
    try:
        return step(model)
    except (RuntimeError, TypeError):
        after = model.state_dict()
        assert all(torch.equal(before[name], value) for name, value in after.items())
        raise


def trainer(liger: dict[str, Any], order: str) -> list[float]:
    """Of ``use_liger_kernel``; the loss comes by the callback, or before the trainer is made."""
    model = build("llama")
    if order == "after":
        use_linear_gated_ce(model)
    callbacks = [EAFTCallback()] if order == "before" else []
    with tempfile.TemporaryDirectory() as folder:
        options = arguments(Path(folder), use_liger_kernel=True, liger_kernel_config=liger)
        made = InOrder(model, options, train_dataset=examples(), callbacks=callbacks)
        made.train()
    return logged(made, "loss")


def tried(function: Callable[..., Any], *given: Any) -> Any:
    """What it gives, or the sentence that it raises."""
    with own_classes():
        try:
            return function(*given)
        except (RuntimeError, TypeError) as error:
            return f"{type(error).__name__}: {error}"


def main(rank: int, world_size: int) -> dict[str, Any]:
    orders = ("before", "after")
    return {
        "instance": {order: tried(on_instance, FUSED, order) for order in orders},
        "class": {order: tried(on_class, FUSED, order) for order in orders},
        "trainer": {order: tried(trainer, FUSED, order) for order in orders},
        "instance unfused": {order: tried(on_instance, UNFUSED, order) for order in orders},
        "class unfused": {order: tried(on_class, UNFUSED, order) for order in orders},
        "trainer unfused": {order: tried(trainer, UNFUSED, order) for order in orders},
    }


if __name__ == "__main__":
    work(main)
