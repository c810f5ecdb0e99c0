"""LLaMA-Factory: its training with our loss for its ``use_eaft_loss`` and ``use_dft_loss``.

python -m eaft_ext.integrations.llamafactory config.yaml

does what ``llamafactory-cli train config.yaml`` does, with the same keys and the same definition of
the loss (H divided by the literal 3.0, k = 20), without the logits.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

from llamafactory.extras.misc import get_device_count, is_env_enabled
from llamafactory.train import tuner
from llamafactory.train.sft import workflow

import eaft_ext
from eaft_ext.integrations.trainer import EAFTCallback

__all__ = ["GatedTrainer", "callback_of", "main", "train"]

NORMALIZER = 3.0
"""What LLaMA-Factory divides the entropy by."""
_NAME = "eaft_ext.integrations.llamafactory"
_UNUSED = "with {} it is another trainer that trains, which would not take this loss"

_OwnTrainer: Any = workflow.CustomSeq2SeqTrainer
_own_arguments: Any = tuner.get_train_args


def callback_of(finetuning_args: Any) -> EAFTCallback | None:
    """What stands for the loss that LLaMA-Factory's arguments ask for; None if it is another."""
    if finetuning_args.use_dft_loss:
        return EAFTCallback(gate=eaft_ext.ProbabilityGate())
    if finetuning_args.use_eaft_loss:
        return EAFTCallback(alpha=finetuning_args.eaft_alpha, normalizer=NORMALIZER)
    return None


class GatedTrainer(_OwnTrainer):  # type: ignore[misc]
    """LLaMA-Factory's trainer with the loss of :class:`EAFTCallback`, also where it evaluates."""

    def __init__(self, finetuning_args: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(finetuning_args, *args, **kwargs)
        self._gated = callback_of(finetuning_args)
        if self._gated is None:
            return
        # The model's loss, then, which takes num_items_in_batch as theirs did.
        self.compute_loss_func = None
        self.model_accepts_loss_kwargs = True
        self.add_callback(self._gated)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Of the loss that it trains on."""
        if self._gated is None or self._gated.gated is not None:
            return super().evaluate(*args, **kwargs)
        with self._gated.installed(self.model, self.args):
            return super().evaluate(*args, **kwargs)


def _checked(arguments: Any) -> Any:
    """LLaMA-Factory's arguments; raise for a training that would not take the loss."""
    parsed = _own_arguments(arguments)
    finetuning = parsed[3]
    if callback_of(finetuning) is None:
        raise ValueError(
            f"{_NAME}: neither use_eaft_loss nor use_dft_loss is set; llamafactory-cli trains "
            "without them"
        )
    if finetuning.use_asft_loss:
        raise ValueError(f"{_NAME}: use_asft_loss is another loss; take one")
    if finetuning.stage != "sft":
        raise ValueError(f"{_NAME}: the loss is for stage sft, got {finetuning.stage}")
    if getattr(finetuning, "use_hyper_parallel", False):
        raise ValueError(f"{_NAME}: {_UNUSED.format('use_hyper_parallel')}")
    return parsed


def train(arguments: dict[str, Any] | list[str] | None = None) -> None:
    """Train in this process: ``run_exp`` of LLaMA-Factory, with the same arguments.

    Raises:
        ValueError: where the arguments ask for another loss, or for another trainer than
            LLaMA-Factory's own for supervised fine-tuning.
    """
    for other in ("USE_MCA", "USE_RAY", "USE_V1"):
        if is_env_enabled(other):
            raise ValueError(f"{_NAME}: {_UNUSED.format(other)}")
    arguments = tuner.read_args(arguments)
    workflow.CustomSeq2SeqTrainer = GatedTrainer
    tuner.get_train_args = _checked
    try:
        tuner.run_exp(arguments)
    finally:
        workflow.CustomSeq2SeqTrainer = _OwnTrainer
        tuner.get_train_args = _own_arguments


def _is_launched() -> bool:
    return "LOCAL_RANK" in os.environ


def main() -> None:
    """Train; on several GPUs, or with FORCE_TORCHRUN, in a process for each."""
    count = get_device_count()
    several = count > 1 and not is_env_enabled("USE_KT")
    if _is_launched() or not (is_env_enabled("FORCE_TORCHRUN") or several):
        train()
        return
    environment = os.environ
    if "RDZV_ID" in environment or (
        int(environment.get("NNODES", "1")) > 1 and "MASTER_ADDR" not in environment
    ):
        raise ValueError(
            f"{_NAME}: several nodes need MASTER_ADDR and MASTER_PORT, or your own torchrun "
            f"-m {_NAME} config.yaml, which knows RDZV_ID, too"
        )
    launch = [
        *("--nnodes", environment.get("NNODES", "1")),
        *("--node-rank", environment.get("NODE_RANK", "0")),
        *("--nproc-per-node", environment.get("NPROC_PER_NODE", str(max(count, 1)))),
    ]
    if "MASTER_ADDR" in environment or "MASTER_PORT" in environment:
        launch += ["--master-addr", environment.get("MASTER_ADDR", "127.0.0.1")]
        launch += ["--master-port", environment.get("MASTER_PORT", "29500")]
    else:
        launch += ["--standalone"]
    module = ["-m", "eaft_ext.integrations.llamafactory", *sys.argv[1:]]
    command = [sys.executable, "-m", "torch.distributed.run", *launch, *module]
    optimised = {}
    if is_env_enabled("OPTIM_TORCH", "1"):  # as LLaMA-Factory has it
        optimised["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
        optimised["TORCH_NCCL_AVOID_RECORD_STREAMS"] = "1"
    sys.exit(subprocess.run(command, env={**environment, **optimised}).returncode)


if __name__ == "__main__":
    main()
