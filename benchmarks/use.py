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
import runpy
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import torch
from harness.machine import ROOT

from eaft_ext.cli.bench import eager_eaft
from eaft_ext.cli.main import main as command

STEPS = 20
# Of a loss of some nats: two ways through bfloat16 drift apart as they train.
TOLERANCE = 0.05


def run_command(words: list[str]) -> None:
    """Anything but success is an error."""
    if status := command(words):
        raise RuntimeError(f"eaft-ext {words[0]} ended with {status}")


def fine_tune(folder: str, device: str) -> None:
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
        return eager_eaft(eager(tokens).logits.flatten(0, 1), labels.flatten())

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
    """Run all; 1 if something failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args().device
    (tiny_model,) = (ROOT / "tests").rglob("demo_tiny_model.py")
    failed = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = f"{scratch}/model"
        runpy.run_path(str(tiny_model))["save_tiny_model"](folder)
        on = ["--device", device]
        on_text = [*on, "--model", folder, "--sequence-length", "64"]
        demo = ["demo", *on_text, "--steps", "4", "--output", f"{scratch}/demo"]
        runs: dict[str, Callable[[], None]] = {
            "demo": lambda: run_command(demo),
            "demo --fused-linear": lambda: run_command([*demo, "--fused-linear"]),
            "inspect": lambda: run_command(["inspect", *on_text, "--tokens", "500"]),
            "bench": lambda: run_command(["bench", *on, "--tokens", "256", "--rounds", "3"]),
            "fine-tuning": lambda: fine_tune(folder, device),
        }
        for name, run in runs.items():
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
