"""One process of test_megatron.py: ``megatron_worker.py RANK WORLD_SIZE FOLDER``.

All processes share the vocabulary. Every case saves what it found; the tests judge it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import megatron_pretrain as example
import torch
from megatron_on_cpu import run_megatron_on_cpu
from spawned import work
from torch import Tensor, distributed

import eaft_ext
from eaft_ext.integrations.megatron import use_gated_ce, vocab_parallel_cross_entropy

# After megatron_on_cpu, which silences its remarks.
# isort: split
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import Float16Module

V = example.PADDED_VOCAB_SIZE
WORDS = example.VOCAB_SIZE
STEPS = 4
ARGS = [
    *("--num-layers", "2", "--hidden-size", "32", "--seq-length", "16"),
    *("--micro-batch-size", "3", "--num-microbatches", "2", "--lr", "0.01"),
]

Result = dict[str, Any]


class OtherModel(torch.nn.Module):
    """All that is asked of a model."""

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        raise NotImplementedError


def group() -> distributed.ProcessGroup:
    return parallel_state.get_tensor_model_parallel_group()


def shard_of(x: Tensor) -> Tensor:
    """This process's columns."""
    return x.chunk(group().size(), dim=-1)[group().rank()].contiguous()


def gathered(shard: Tensor) -> Tensor:
    """All columns."""
    shards = [torch.empty_like(shard) for _ in range(group().size())]
    distributed.all_gather(shards, shard.contiguous(), group=group())
    return torch.cat(shards, dim=-1)


def random_batches() -> Iterator[example.Batch]:
    """Words, 20 of them from all shards, and masks; the same in every process."""
    generator = torch.Generator().manual_seed(1)
    for keep in (0.9, 0.4) * STEPS:
        window = 13 * torch.randint(20, (3, 17), generator=generator)
        mask = (torch.rand(3, 16, generator=generator) < keep).float()
        text, labels = window[:, :-1].contiguous(), window[:, 1:].contiguous()
        yield {"tokens": text, "labels": labels, "loss_mask": mask}


def build_model(*options: str, **overrides: Any) -> GPTModel:
    """The example's, the same at every call and in every process."""
    torch.manual_seed(0)
    return example.model_provider(example.parse_args([*ARGS, *options]), **overrides)


def run(model: torch.nn.Module, batch: example.Batch, with_labels: bool = True) -> Tensor:
    """Losses, or this process's logits: [b, s] or [b, s, V/tp]."""
    position_ids = torch.arange(16).expand(3, 16)
    labels = batch["labels"] if with_labels else None
    return model(batch["tokens"], position_ids, attention_mask=None, labels=labels)


def message_of(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """What is raised, with its type."""
    try:
        function(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def case_training(*options: str) -> Result:
    """Steps of the example's optimizer: losses of every micro-batch, and what they reported."""
    args = example.parse_args([*ARGS, *options])
    torch.manual_seed(0)
    model, optimizer, gated = example.setup_model_and_optimizer(args, torch.device("cpu"))
    weights = {
        name: (weight.detach().clone(), getattr(weight, "partition_dim", -1))
        for name, weight in model.module.named_parameters()
    }
    losses, stats, masks = [], [], []
    lengths: set[int] = set()
    model.module.decoder.final_layernorm.register_forward_hook(
        lambda _, hidden, __: lengths.add(hidden[0].size(0))
    )

    def forward_step(data_iterator: Iterator[example.Batch], model: torch.nn.Module) -> Any:
        batch = next(data_iterator)
        output, loss_func = example.forward_step(gated, iter([batch]), model)
        losses.append(output.detach().clone())
        stats.append(tuple(gated.stats))
        masks.append(batch["loss_mask"])
        return output, loss_func

    batches = random_batches()
    reports = [
        example.train_step(args, forward_step, batches, model, optimizer) for _ in range(STEPS)
    ]
    return {
        "weights": weights,
        "lengths": sorted(lengths),
        "losses": torch.stack(losses),
        "stats": stats,
        "masks": masks,
        "reports": reports,
        "averages": [example.average(of_step) for of_step in reports],
    }


def case_composition() -> Result:
    """The model's losses, and those of the reference from the logits of all processes."""
    batch = next(random_batches())
    found: Result = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = build_model()
        if dtype == torch.bfloat16:
            model.config.bf16 = True
            model = Float16Module(model.config, model)
            assert model.module.output_layer.weight.dtype == dtype
        # Float16Module returns float32, with the values of its bfloat16.
        logits = gathered(run(model, batch, with_labels=False))
        assert logits.shape == (3, 16, V)
        for name, options in {
            "all words": {},
            "without padding": {"vocab_size": WORDS},
            "squared": {"alpha": 2.0, "k": 5},
            "no gate": {"gate": eaft_ext.NoGate()},
        }.items():
            with use_gated_ce(model, **options) as gated:
                loss = run(model, batch)
                stats = gated.stats
            options = {**options}
            words = logits[..., : options.pop("vocab_size", V)]
            expected, expected_stats = eaft_ext.reference.gated_ce(
                words, batch["labels"], reduction="none", return_stats=True, **options
            )
            found[f"{name} {dtype}"] = (
                torch.stack([loss, *stats[:3]]),
                torch.stack([expected, *expected_stats[:3]]),
            )
        found[f"megatron's {dtype}"] = run(model, batch)
    return found


def case_drop_in() -> Result:
    """The function beside Megatron-Core's own and beside the reference, with gradients."""
    generator = torch.Generator().manual_seed(2)
    logits = 3 * torch.randn(16, 3, V, generator=generator)
    labels = torch.randint(V, (16, 3), generator=generator)
    upstream = torch.randn(16, 3, generator=generator)

    def loss_and_gradient(x: Tensor, losses_of: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        x = x.clone().requires_grad_()
        losses = losses_of(x)
        losses.backward(upstream)
        return losses.detach(), x.grad

    reference = partial(eaft_ext.reference.gated_ce, labels=labels, reduction="none")
    gated = partial(vocab_parallel_cross_entropy, target=labels)
    loss, gradient = loss_and_gradient(logits, reference)
    own = tensor_parallel.vocab_parallel_cross_entropy
    return {
        # Megatron-Core's overwrites float32 logits, which autograd forbids for a leaf.
        "megatron": loss_and_gradient(shard_of(logits), lambda x: own(x.clone(), labels)),
        "no gate": loss_and_gradient(shard_of(logits), partial(gated, gate=eaft_ext.NoGate())),
        "reference": (loss, shard_of(gradient)),
        "gated": loss_and_gradient(shard_of(logits), gated),
        "given group": loss_and_gradient(shard_of(logits), partial(gated, tp_group=group())),
    }


def case_memory() -> Result:
    """What happens to logits, of which some tokens are masked and then spoilt."""
    generator = torch.Generator().manual_seed(3)
    values = shard_of(3 * torch.randn(16, 3, V, generator=generator))
    batch = next(random_batches())
    mask = batch["loss_mask"]
    found: Result = {"mask": mask}
    for inplace in (False, True):
        for spoil in (False, True):
            model = build_model()
            use_gated_ce(model, inplace_backward=inplace)
            leaf = values.clone().requires_grad_()
            logits = leaf * 1
            places: list[int] = []
            logits.register_hook(lambda gradient, places=places: places.append(gradient.data_ptr()))
            loss = model.compute_language_model_loss(batch["labels"], logits)
            after_forward = logits.detach().clone()
            if spoil:
                # Behind autograd's back, which would refuse to go on.
                logits.data[mask.T == 0] = torch.nan
            (loss * mask).sum().backward()
            found[f"{inplace=} {spoil=}"] = {
                "gradient": leaf.grad.clone(),
                "after forward": torch.equal(after_forward, values),
                "after backward": torch.equal(logits.detach(), values),
                "in the logits": places == [logits.data_ptr()],
            }
    return found


def case_removal() -> Result:
    """Losses after calls of use_gated_ce and remove in several orders."""
    batch = next(random_batches())
    model = build_model()
    megatron = run(model, batch)
    found: Result = {"megatron": megatron}
    first = use_gated_ce(model, 5)
    found["5"] = run(model, batch)
    second = use_gated_ce(model, 20)
    found["20"] = run(model, batch)
    first.remove()
    found["20, then 5 removed"] = run(model, batch)
    second.remove()
    found["removed"] = run(model, batch)
    found["clean"] = "compute_language_model_loss" not in vars(model) and second.stats is None
    with use_gated_ce(model, 5):
        found["5 in a block"] = run(model, batch)
    found["after the block"] = run(model, batch)

    # Somebody else's method is not lost.
    model.compute_language_model_loss = lambda labels, logits: torch.tensor(7.0)
    use_gated_ce(model, 5)
    handle = use_gated_ce(model, 20)
    found["20 over another"] = run(model, batch)
    handle.remove()
    found["another"] = run(model, batch)
    return found


def case_models() -> Result:
    """Chunks, wrappers and pipeline stages."""
    batch = next(random_batches())
    model = build_model()
    use_gated_ce(model)
    found: Result = {"plain": run(model, batch)}
    first, last = build_model(post_process=False), build_model()
    gated = use_gated_ce([first, last])
    found["list"] = run(last, batch)
    found["stats"] = gated.stats is not None
    found["stage without a loss"] = run(first, batch, with_labels=False).shape
    use_gated_ce(build_model(post_process=False))
    args = example.parse_args(ARGS)
    torch.manual_seed(0)
    wrapped, _, of_example = example.setup_model_and_optimizer(args, torch.device("cpu"))
    of_example.remove()
    use_gated_ce([wrapped])
    found["wrapped"] = run(wrapped, batch)
    return found


def case_groups() -> Result:
    """Where the group comes from: one of this process alone, with whole logits, or Megatron's."""
    batch = next(random_batches())
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(16, 3, V, generator=generator)
    alone, _ = distributed.new_subgroups(1)
    expected = eaft_ext.reference.gated_ce(logits, batch["labels"].T, reduction="none")
    found: Result = {"expected": expected.T}
    for name, attributes, seen in (
        ("pg_collection", {"pg_collection": SimpleNamespace(tp=alone), "tp_group": None}, logits),
        ("tp_group", {"pg_collection": None, "tp_group": alone}, logits),
        ("parallel_state", {}, shard_of(logits)),
    ):
        model = OtherModel()
        vars(model).update(attributes)
        use_gated_ce(model)
        found[name] = model.compute_language_model_loss(batch["labels"], seen)
    return found


def case_errors() -> Result:
    """Messages."""
    batch = next(random_batches())
    whole = build_model()
    whole.output_layer.gather_output = True  # as parallel_output=False does it
    use_gated_ce(whole)
    fused = build_model()
    fused.fuse_linear_cross_entropy = True
    return {
        "gathered": message_of(run, whole, batch),
        "fused": message_of(use_gated_ce, fused),
        "vocab_size": message_of(use_gated_ce, build_model(), vocab_size=V + 1),
    }


def case_ignored() -> Result:
    """Labels of -100, alone and with a mask."""
    batch = next(random_batches())
    batch["labels"][0, :5] = -100
    model = build_model()
    gated = use_gated_ce(model)
    losses = run(model, batch)
    # As some data sets label what the mask removes.
    negative = batch | {"labels": batch["labels"].masked_fill(batch["labels"] < 0, -1)}
    logits = torch.randn(16, 3, V // distributed.get_world_size())
    loss_func = partial(example.loss_func, batch["loss_mask"])
    return {
        "negative": run(model, negative),
        "drop-in": [
            vocab_parallel_cross_entropy(logits, given["labels"].T) for given in (batch, negative)
        ],
        "mask": batch["loss_mask"],
        "losses": losses,
        "stats": tuple(gated.stats),
        "unmasked": gated.report(loss_func)(losses)[-1],
        "masked": gated.report(loss_func, batch["loss_mask"])(losses)[-1],
    }


def function(rank: int, world_size: int) -> dict[str, Result]:
    run_megatron_on_cpu()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world_size)
    cases = {
        "training": case_training,
        "composition": case_composition,
        "drop-in": case_drop_in,
        "memory": case_memory,
        "removal": case_removal,
        "models": case_models,
        "groups": case_groups,
        "errors": case_errors,
        "ignored": case_ignored,
    }
    if world_size > 1:
        cases["sequence parallel"] = partial(case_training, "--sequence-parallel")
    return {name: case() for name, case in cases.items()}


if __name__ == "__main__":
    work(function)
