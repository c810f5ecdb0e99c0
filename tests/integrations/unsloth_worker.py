"""The process of test_unsloth.py, which patches much: ``unsloth_worker.py 0 1 FOLDER``."""

# ruff: noqa: I001, Unsloth wants to be imported before what it patches.

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import unsloth
import datasets
import torch
import trl
from small_model import V, save_model, tokenizer_of
from spawned import work
from transformers_models import shifted

from eaft_ext import reference
from eaft_ext.integrations.trainer import EAFTCallback
from eaft_ext.integrations.transformers import use_linear_gated_ce

TOKENS = torch.randint(3, V, (4, 9), generator=torch.Generator().manual_seed(0))


def loaded(folder: Path, has_adapter: bool) -> Any:
    """The small model, by Unsloth's own class."""
    of_unsloth = unsloth.FastLanguageModel
    model, _ = of_unsloth.from_pretrained(
        str(folder / "model"),
        max_seq_length=64,
        load_in_4bit=False,
        full_finetuning=not has_adapter,
        dtype=torch.float32,
    )
    if has_adapter:
        model = of_unsloth.get_peft_model(model, r=4, target_modules=["q_proj"], lora_alpha=4)
    return model.train()


def step(folder: Path, has_adapter: bool) -> tuple[float, float]:
    """The loss of a step, and what it should be."""
    model = loaded(folder, has_adapter)
    with torch.no_grad():
        expected = reference.gated_ce(model(TOKENS).logits, shifted(TOKENS))
    use_linear_gated_ce(model)
    loss = model(TOKENS, labels=TOKENS).loss
    loss.backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    return loss.item(), expected.item()


def sft(folder: Path, by_callback: bool) -> str:
    """What Unsloth's own version of TRL's trainer is told."""
    model = loaded(folder, False)
    if not by_callback:
        use_linear_gated_ce(model)
    arguments = trl.SFTConfig(
        str(folder / "out"), max_steps=2, report_to=[], save_strategy="no", use_cpu=True, bf16=False
    )
    trainer = trl.SFTTrainer(
        model,
        args=arguments,
        train_dataset=datasets.Dataset.from_list([{"input_ids": row.tolist()} for row in TOKENS]),
        processing_class=tokenizer_of(V),
        callbacks=[EAFTCallback()] if by_callback else [],
    )
    try:
        trainer.train()
    except (RuntimeError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return "it was not refused"


def main(rank: int, world_size: int) -> dict[str, Any]:
    def run(function: Callable[[Path, bool], Any], option: bool) -> Any:
        with tempfile.TemporaryDirectory() as name:
            save_model(Path(name) / "model")
            return function(Path(name), option)

    return {f.__name__: {o: run(f, o) for o in (False, True)} for f in (step, sft)}


if __name__ == "__main__":
    work(main)
