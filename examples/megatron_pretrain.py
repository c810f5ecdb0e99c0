"""A small GPT trained with Megatron-Core and the gated loss, under tensor parallelism.

    pip install '.[megatron]'
    python examples/megatron_pretrain.py
    torchrun --nproc-per-node 2 examples/megatron_pretrain.py --sequence-parallel

Megatron-Core's own GPTModel, schedule and optimizer, over NCCL on GPUs and over gloo without. The
tokens are the bytes of a text: the Python language reference that comes with Python, or --text.
Rank 0 prints the loss as Megatron-LM does, and beside it the mean gate, entropy and plain
cross-entropy: in 200 iterations, half a minute on two CPU cores, the latter falls from 5.6 to 2.5
and the gate from 1.0 to 0.75. However many processes share the vocabulary, these are the same.

The two lines that a training script needs for the gated loss are marked with <--.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron_on_cpu import plain_torch_block_spec, run_megatron_on_cpu
from torch import Tensor, distributed

from eaft_ext.integrations.megatron import GatedLoss, use_gated_ce

# After megatron_on_cpu, which silences its remarks.
# isort: split
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig

END_OF_DOCUMENT = 256
VOCAB_SIZE = 257  # the bytes and END_OF_DOCUMENT
PADDED_VOCAB_SIZE = 384  # a multiple of 128, to be divided among ranks, as Megatron-LM does it

Batch = dict[str, Tensor]
ForwardStep = Callable[[Iterator[Batch], torch.nn.Module], tuple[Tensor, Callable[[Tensor], Any]]]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The options, named as Megatron-LM names them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, help="a text to train on")
    sizes = {"num-layers": 2, "hidden-size": 128, "num-attention-heads": 4, "seq-length": 128}
    batch = {"micro-batch-size": 4, "num-microbatches": 2, "seed": 1234}
    length = {"train-iters": 200, "log-interval": 20}
    for name, default in (sizes | batch | length).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--sequence-parallel", action="store_true")
    parser.add_argument(
        "--tensor-model-parallel-size", type=int, help="by default all; data parallel over the rest"
    )
    parser.add_argument("--k", type=int, default=20, help="top k of the entropy")
    parser.add_argument("--alpha", type=float, default=1.0, help="exponent of the gate")
    return parser.parse_args(argv)


def initialize(args: argparse.Namespace) -> torch.device:
    """Processes, groups and seeds; gives the device of this process."""
    on_gpu = torch.cuda.is_available()
    backend = "nccl" if on_gpu else "gloo"
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    else:
        run_megatron_on_cpu()
    if "RANK" in os.environ:  # by torchrun
        distributed.init_process_group(backend)
    else:
        store = distributed.HashStore()
        distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    tensor_parallel_size = args.tensor_model_parallel_size or distributed.get_world_size()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor_parallel_size)
    torch.manual_seed(args.seed)
    if on_gpu:
        tensor_parallel.model_parallel_cuda_manual_seed(args.seed)
    return torch.device("cuda" if on_gpu else "cpu")


def model_provider(
    args: argparse.Namespace, pre_process: bool = True, post_process: bool = True
) -> GPTModel:
    """The model, in float32 and without dropout, the same whatever shares it."""
    tensor_parallel_size = parallel_state.get_tensor_model_parallel_world_size()
    config = TransformerConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        num_attention_heads=args.num_attention_heads,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=tensor_parallel_size,
        sequence_parallel=args.sequence_parallel and tensor_parallel_size > 1,
        use_cpu_initialization=True,  # all ranks draw the whole weights and take their part
        masked_softmax_fusion=False,
        finalize_model_grads_func=finalize_model_grads,
    )
    return GPTModel(
        config,
        plain_torch_block_spec(args.num_layers),
        vocab_size=PADDED_VOCAB_SIZE,
        max_sequence_length=args.seq_length,
        pre_process=pre_process,
        post_process=post_process,
    )


def read_tokens(path: Path | None) -> Tensor:
    """Bytes, END_OF_DOCUMENT after every document."""
    if path is None:
        from pydoc_data.topics import topics

        documents = [document.encode() for document in topics.values()]
    else:
        documents = [path.read_bytes()]
    return torch.tensor([token for text in documents for token in (*text, END_OF_DOCUMENT)])


def batches(args: argparse.Namespace, device: torch.device) -> Iterator[Batch]:
    """Random windows: the same for all ranks of a model, others for each of its copies."""
    tokens = read_tokens(args.text)
    replica = parallel_state.get_data_parallel_rank()
    generator = torch.Generator().manual_seed(args.seed + replica)
    while True:
        starts = torch.randint(
            len(tokens) - args.seq_length, (args.micro_batch_size, 1), generator=generator
        )
        window = tokens[starts + torch.arange(args.seq_length + 1)].to(device)
        text, labels = window[:, :-1].contiguous(), window[:, 1:].contiguous()
        # What comes after the end of a document has nothing to do with it.
        loss_mask = (text != END_OF_DOCUMENT).float()
        yield {"tokens": text, "labels": labels, "loss_mask": loss_mask}


def loss_func(loss_mask: Tensor, output_tensor: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Megatron-LM's: the sum of the losses, the number of tokens, and what goes to the log."""
    loss_mask = loss_mask.view(-1)
    loss = torch.sum(output_tensor.view(-1).float() * loss_mask)
    num_tokens = loss_mask.sum().to(torch.int)
    report = {"lm loss": torch.cat([loss.detach().view(1), num_tokens.view(1)])}
    return loss, num_tokens, report


def forward_step(
    gated: GatedLoss, data_iterator: Iterator[Batch], model: torch.nn.Module
) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """Megatron-LM's: the losses of a micro-batch, and the function that sums them up."""
    batch = next(data_iterator)
    position_ids = torch.arange(batch["tokens"].size(1), device=batch["tokens"].device)
    loss_mask = batch["loss_mask"]
    output_tensor = model(
        batch["tokens"],
        position_ids.expand_as(batch["tokens"]),
        attention_mask=None,
        labels=batch["labels"],
    )
    return output_tensor, gated.report(partial(loss_func, loss_mask), loss_mask)  # <--


def average(reports: list[dict[str, Tensor]]) -> dict[str, float]:
    """Over the tokens of all micro-batches and data parallel ranks, as Megatron-LM does it."""
    means = {}
    for name in reports[0]:
        total = torch.stack([report[name] for report in reports]).sum(0)
        distributed.all_reduce(total, group=parallel_state.get_data_parallel_group())
        means[name] = (total[0] / total[1]).item()
    return means


def setup_model_and_optimizer(
    args: argparse.Namespace, device: torch.device
) -> tuple[DistributedDataParallel, MegatronOptimizer, GatedLoss]:
    """The model with the gated loss, wrapped, and its optimizer."""
    model = model_provider(args).to(device)
    gated = use_gated_ce(model, args.k, alpha=args.alpha, vocab_size=VOCAB_SIZE)  # <--
    model = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    # Megatron-Core clips gradients on GPUs alone.
    optimizer = get_megatron_optimizer(OptimizerConfig(lr=args.lr, clip_grad=0.0), [model])
    return model, optimizer, gated


def train_step(
    args: argparse.Namespace,
    forward_step_func: ForwardStep,
    data_iterator: Iterator[Batch],
    model: DistributedDataParallel,
    optimizer: MegatronOptimizer,
) -> list[dict[str, Tensor]]:
    """Megatron-LM's: a step of the optimizer; gives what the micro-batches reported."""
    model.zero_grad_buffer()
    optimizer.zero_grad()
    reports: list[dict[str, Tensor]] = get_forward_backward_func()(
        forward_step_func=forward_step_func,
        data_iterator=data_iterator,
        model=model,
        num_microbatches=args.num_microbatches,
        seq_length=args.seq_length,
        micro_batch_size=args.micro_batch_size,
    )
    optimizer.step()
    return reports


def train(args: argparse.Namespace, device: torch.device) -> None:
    """The training loop, with a line for the log every few iterations."""
    model, optimizer, gated = setup_model_and_optimizer(args, device)
    data_iterator = batches(args, device)
    samples = args.micro_batch_size * parallel_state.get_data_parallel_world_size()
    reports: list[dict[str, Tensor]] = []
    since = time.perf_counter()
    for iteration in range(1, args.train_iters + 1):
        reports += train_step(args, partial(forward_step, gated), data_iterator, model, optimizer)
        if iteration % args.log_interval == 0 or iteration == 1:
            means = average(reports)
            speed = len(reports) * samples * args.seq_length / (time.perf_counter() - since)
            if distributed.get_rank() == 0:
                parts = [f"{name}: {mean:.3f}" for name, mean in means.items()]
                parts = [f"iteration {iteration:4}", *parts, f"tokens/s: {speed:,.0f}"]
                print(*parts, sep=" | ", flush=True)
            reports.clear()
            since = time.perf_counter()


def main() -> None:
    """Train, and leave in order."""
    args = parse_args()
    train(args, initialize(args))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
