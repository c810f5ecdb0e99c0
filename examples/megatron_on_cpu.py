"""What Megatron-Core needs where there is no GPU, no Transformer Engine and no Apex.

Megatron-Core is written for CUDA and says so in many places, but nothing that a small GPT does
depends on it. Nothing here is of use in real training.
"""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

# Megatron-Core remarks at length on what is not installed; import this module before it.
warnings.filterwarnings("ignore", module=r"megatron\.")
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")


class _CpuInPlaceOfCuda(TorchFunctionMode):
    """Gives CPU tensors to those who ask for ``device="cuda"`` or call ``.cuda()``."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


def run_megatron_on_cpu() -> None:
    """Let Megatron-Core run in this process without a GPU, from now on and without dropout."""
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.current_stream = lambda device=None: torch.cpu.current_stream()
    # Random numbers are for dropout alone; the weights are drawn on the CPU anyway.
    CudaRNGStatesTracker.fork = lambda self, name="": contextlib.nullcontext()
    _CpuInPlaceOfCuda().__enter__()


class LayerNorm(torch.nn.LayerNorm):
    """PyTorch's, also under sequence parallelism, for which Megatron-Core's asks for Apex."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps)
        for parameter in self.parameters():
            # Of each rank's part of the sequence: Megatron-Core then adds up the gradients.
            parameter.sequence_parallel = config.sequence_parallel


def plain_torch_block_spec(num_layers: int) -> Any:
    """Megatron-Core's own transformer layers, with nothing in them that needs more than PyTorch."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    layer = get_gpt_layer_local_spec()
    layer.submodules.input_layernorm = LayerNorm
    layer.submodules.pre_mlp_layernorm = LayerNorm
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=LayerNorm)
