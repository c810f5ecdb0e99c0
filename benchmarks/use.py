"""What a user does first, on a device: the commands, and a short fine-tuning run.

    python benchmarks/use.py                 on the current GPU
    python benchmarks/use.py --device cpu    tries this script out

The model is small and random: nothing is fetched. ``eaft-ext demo`` (both of its losses) and
``inspect`` need matplotlib and rich, and say so where they are missing. The fine-tuning run
trains two copies of the model in bfloat16 autocast, one on eager EAFT of all logits and one on
``use_linear_gated_ce``: their losses must stay together and fall. Ends with 1 if something fails.
"""

import argparse
import copy
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness.machine import ROOT

from eaft_ext.cli.bench import eager_eaft
from eaft_ext.cli.main import main as command

sys.path.append(str(ROOT / "tests"))

STEPS = 20
# Of a loss of some nats: two ways through bfloat16 drift apart as they train.
TOLERANCE = 0.05


def run_command(folder: Path, *words: str) -> None:
    """Run a command on the model; anything but success is an error."""
    model = ["--model", str(folder)] if words[0] in ("demo", "inspect") else []
    status = command([*words, *model])
    if status != 0:
        raise RuntimeError(f"eaft-ext {words[0]} ended with {status}")


def fine_tune(folder: Path, device: str) -> None:
    """Train on both losses side by side."""
    import transformers

    from eaft_ext.integrations.transformers import use_linear_gated_ce

    eager = transformers.AutoModelForCausalLM.from_pretrained(folder).to(device).train()
    fused = copy.deepcopy(eager)
    gated = use_linear_gated_ce(fused)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, eager.config.vocab_size, (8, 64), generator=generator).to(device)
    labels = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=-100)

    def eager_loss() -> torch.Tensor:
        logits = eager(tokens).logits
        return eager_eaft(logits.flatten(0, 1), labels.flatten())

    def fused_loss() -> torch.Tensor:
        loss: torch.Tensor = fused(tokens, labels=tokens).loss
        return loss

    losses = [train(eager, eager_loss, device), train(fused, fused_loss, device)]
    apart = max(abs(one - other) for one, other in zip(*losses, strict=True))
    print(f"{STEPS} steps, eager / fused: {losses[0][0]:.4f} / {losses[1][0]:.4f} at first,")
    print(f"{losses[0][-1]:.4f} / {losses[1][-1]:.4f} at last, at most {apart:.4f} apart")
    assert gated.stats is not None, "the model was called with labels"
    if not apart <= TOLERANCE:
        raise RuntimeError(f"the losses are {apart} apart, more than {TOLERANCE}")
    if not losses[1][-1] < losses[1][0] - 10 * TOLERANCE:
        raise RuntimeError("the loss does not fall")


def train(model: Any, loss_of: Callable[[], torch.Tensor], device: str) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(STEPS):
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args().device
    from demo_tiny_model import save_tiny_model

    failed = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        save_tiny_model(folder)
        on = ("--device", device)
        on_text = (*on, "--sequence-length", "64")
        short = (*on_text, "--steps", "4", "--output", f"{scratch}/demo")
        small = (*on, "--tokens", "256", "--rounds", "3")
        for name, run in (
            ("demo", lambda: run_command(folder, "demo", *short)),
            ("demo --fused-linear", lambda: run_command(folder, "demo", *short, "--fused-linear")),
            ("inspect", lambda: run_command(folder, "inspect", *on_text, "--tokens", "500")),
            ("bench", lambda: run_command(folder, "bench", *small)),
            ("fine-tuning", lambda: fine_tune(folder, device)),
        ):
            print(f"== {name}", flush=True)
            try:
                run()
            except (Exception, SystemExit):
                traceback.print_exc()
                failed.append(name)
    print(f"failed: {', '.join(failed)}" if failed else "all passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
