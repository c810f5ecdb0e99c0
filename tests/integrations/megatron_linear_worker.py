"""One process of test_megatron_linear.py: ``megatron_linear_worker.py RANK WORLD_SIZE FOLDER``.

All processes share the vocabulary. Every case saves what it found; the tests judge it.
"""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from typing import Any

import megatron_pretrain as example
import torch
from megatron_on_cpu import LayerNorm, plain_torch_block_spec, run_megatron_on_cpu
from megatron_worker import Result, message_of, random_batches, run
from spawned import work
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from eaft_ext.integrations.megatron import use_gated_ce, use_linear_gated_ce

# After megatron_on_cpu, which silences its remarks.
# isort: split
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
from megatron.core.models.bert.bert_model import BertModel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer import TransformerConfig, multi_token_prediction
from megatron.core.transformer.module import Float16Module

USES = {"logits": use_gated_ce, "hidden": use_linear_gated_ce}


def build_model(
    *,
    tied: bool = False,
    predicted: int | None = None,
    vocab_size: int = example.PADDED_VOCAB_SIZE,
    post_process: bool = True,
    **options: Any,
) -> GPTModel:
    """The same at every call and in every process; ``predicted`` more tokens by MTP."""
    torch.manual_seed(0)
    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        use_cpu_initialization=True,
        masked_softmax_fusion=False,
        mtp_num_layers=predicted,
        mtp_loss_scaling_factor=0.1,
        **options,
    )
    spec = plain_torch_block_spec(2)
    mtp = None
    if predicted is not None:
        mtp = get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False)
        for layer in mtp.layer_specs:
            layer.submodules.enorm = layer.submodules.hnorm = LayerNorm
            layer.submodules.layer_norm = LayerNorm
    return GPTModel(
        config,
        spec,
        vocab_size=vocab_size,
        max_sequence_length=512,
        share_embeddings_and_output_weights=tied,
        mtp_block_spec=mtp,
        post_process=post_process,
    )


def gradients(model: nn.Module) -> dict[str, torch.Tensor | None]:
    return {name: weight.grad for name, weight in model.named_parameters()}


def case_step(
    wrap: Callable[[GPTModel], nn.Module] = lambda model: model, **options: Any
) -> Result:
    """Losses, what the gate did, and every gradient; of the logits and of the hidden states."""
    batch = next(random_batches())
    batch["labels"][0, 3] = -100
    found: Result = {}
    for name, use in USES.items():
        model = build_model(**options)
        wrapped = model if wrap is None else wrap(model)
        chunks = {"chunk_size": 7} if use is use_linear_gated_ce else {}
        gated = use(wrapped, 5, alpha=0.5, vocab_size=example.VOCAB_SIZE, **chunks)
        seen: list[str] = []
        model.output_layer.register_forward_hook(
            lambda _, __, out, seen=seen: seen.append(type(out[0]).__name__)
        )
        losses = run(wrapped, batch)
        (losses * batch["loss_mask"]).sum().backward()
        stats = gated.stats
        assert stats is not None
        found[name] = {
            "losses": losses.detach(),
            "stats": torch.stack(list(stats[:3])),
            "gradients": gradients(model),
            "output": seen,
        }
    return found


def case_mtp(**options: Any) -> Result:
    """As above; from 0.19 on Megatron-Core takes the words predicted from the logits."""
    if not hasattr(multi_token_prediction, "_compute_mtp_acceptance_counts"):
        return case_step(**options)
    model = build_model(**options)
    use_linear_gated_ce(model)
    return {"refused": message_of(run, model, next(random_batches()))}


def case_half() -> Result:
    """bfloat16, in Megatron-Core's wrapper."""

    def wrap(model: GPTModel) -> Float16Module:
        model.config.bf16 = True
        return Float16Module(model.config, model)

    return case_step(wrap)


def case_main_grad(**options: Any) -> Result:
    """What its DistributedDataParallel collects of two micro-batches, with what it would fuse."""
    found: Result = {}
    for name, use, fused in (
        ("logits", use_gated_ce, False),
        ("hidden", use_linear_gated_ce, False),
        ("fused", use_linear_gated_ce, True),
    ):
        model = build_model(**options)
        # Only CUDA has the fused product; the layer would call it.
        model.output_layer.gradient_accumulation_fusion = fused
        gated = use(model)
        wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
        wrapped.zero_grad_buffer()
        batches = random_batches()
        for _ in range(2):
            batch = next(batches)
            (run(wrapped, batch) * batch["loss_mask"]).sum().backward()
        if fused:  # Logits to learn from, in the same step.
            (run(wrapped, batch, with_labels=False) * 0).sum().backward()
        found[name] = {name: weight.main_grad for name, weight in model.named_parameters()}
        gated.remove()
        assert model.output_layer.gradient_accumulation_fusion is fused
    return found


def case_removal() -> Result:
    """Losses after calls and removals in several orders, and logits without labels."""
    batch = next(random_batches())
    model = build_model()
    found: Result = {"megatron": run(model, batch), "logits": run(model, batch, with_labels=False)}
    plain = {name: dict(vars(part)) for name, part in model.named_modules()}
    linear = use_linear_gated_ce(model, 5)
    found["5"] = run(model, batch)
    found["logits, meanwhile"] = run(model, batch, with_labels=False)
    model.eval()
    found["5, evaluated"] = run(model, batch)
    model.train()
    of_logits = use_gated_ce(model, 20)
    linear.remove()
    found["20"] = run(model, batch)
    second = use_linear_gated_ce(model, 20)
    of_logits.remove()
    found["20, linear"] = run(model, batch)
    third = use_linear_gated_ce(model, 5)
    second.remove()
    found["5, again"] = run(model, batch)
    third.remove()
    found["removed"] = run(model, batch)
    found["clean"] = plain == {name: dict(vars(part)) for name, part in model.named_modules()}
    with use_linear_gated_ce(model, 5):
        pass
    found["after the block"] = run(model, batch)
    return found


def case_stages() -> Result:
    """A pipeline stage without an output layer, alone and in a list."""
    batch = next(random_batches())
    first, last = build_model(post_process=False), build_model()
    gated = use_linear_gated_ce([first, last])
    expected = build_model()
    use_gated_ce(expected)
    hidden = run(first, batch, with_labels=False)
    use_linear_gated_ce(build_model(post_process=False))
    return {
        "losses": (run(last, batch), run(expected, batch)),
        "stats": gated.stats is not None,
        "hidden": tuple(hidden.shape),
    }


class Capped(ColumnParallelLinear):
    """An output layer with a soft cap, as Megatron-Bridge makes that of Gemma 2."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        logits, bias = super().forward(*args, **kwargs)
        return torch.tanh(logits), bias


def case_wrapped() -> Result:
    """Removed below somebody else's forwards, after which it does nothing."""
    batch = next(random_batches())
    model = build_model()
    model.output_layer.gradient_accumulation_fusion = True
    with torch.no_grad():
        found: Result = {"megatron": run(model, batch)}
        gated = use_linear_gated_ce(model, 5)
        for module in (model, model.output_layer):
            inner = module.forward
            module.forward = lambda *args, inner=inner, **kwargs: inner(*args, **kwargs)
        found["5"] = run(model, batch)
        gated.remove()
        found["removed"] = run(model, batch)
    found["fusion"] = model.output_layer.gradient_accumulation_fusion
    return found


class Predicting(GPTModel):
    """Without labels it has a loss of labels of its own, as MTP has in Megatron-Core 0.17."""

    def forward(self, input_ids: torch.Tensor, *args: Any, labels: Any = None, **kw: Any) -> Any:
        output = super().forward(input_ids, *args, labels=labels, **kw)
        if labels is not None:
            return output
        return self.compute_language_model_loss(input_ids, output.transpose(0, 1).contiguous())


def case_own_labels() -> Result:
    """The loss that a model has in a call without labels is gated, too."""
    batch = next(random_batches())
    found: Result = {}
    for name, use in USES.items():
        model = build_model()
        model.__class__ = Predicting
        use(model, 5)
        found[name] = run(model, batch, with_labels=False)
    return found


def case_logits_used() -> Result:
    """What a model may do with its logits, or in their place."""
    batch = next(random_batches())

    def hooked(use: Callable[[Any], Any]) -> str:
        model = build_model()
        model.output_layer.register_forward_hook(lambda _, __, out: (use(out[0]), out[1]))
        use_linear_gated_ce(model)
        return message_of(run, model, batch)

    def changed(change: Callable[[GPTModel], Any], when: str) -> str:
        model = build_model()
        if when == "later":
            use_linear_gated_ce(model)
        change(model)
        if when == "later":
            return message_of(run, model, batch)
        return message_of(use_linear_gated_ce, model)

    def cap(model: GPTModel) -> None:
        model.output_layer.__class__ = Capped

    def shard(model: GPTModel) -> None:
        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        fully_shard(model.output_layer, mesh=mesh)

    def replace(model: GPTModel) -> None:
        plain = model.output_layer.forward
        model.output_layer.forward = lambda *args, **kwargs: plain(*args, **kwargs)

    fused = build_model()
    fused.forward = lambda *_, **__: torch.zeros(3, 16)
    use_linear_gated_ce(fused)
    bert = BertModel(
        build_model().config, 0, bert_layer_local_spec, 384, 512, add_binary_head=False
    )
    return {
        "scaled": hooked(lambda logits: logits * 2),
        "cut": hooked(lambda logits: logits[..., :5]),
        "capped in a hook": hooked(torch.tanh),
        "kept": hooked(lambda logits: torch.save(logits, BytesIO())),
        "capped": changed(cap, "earlier"),
        "capped later": changed(cap, "later"),
        "sharded": changed(shard, "earlier"),
        "sharded later": changed(shard, "later"),
        "replaced": changed(replace, "earlier"),
        "own loss": message_of(run, fused, batch),
        "bert": message_of(use_linear_gated_ce, bert),
    }


def case_errors() -> Result:
    """Messages."""
    batch = next(random_batches())
    deferred = build_model()
    deferred.config.defer_embedding_wgrad_compute = True
    other = build_model()
    other.output_layer = nn.Linear(32, 384)
    biased = build_model()
    biased.output_layer.bias, biased.output_layer.skip_bias_add = nn.Parameter(torch.ones(3)), True
    fused = build_model()
    fused.fuse_linear_cross_entropy = True
    good = build_model()
    messages = {
        "deferred": message_of(use_linear_gated_ce, [good, deferred]),
        "other": message_of(use_linear_gated_ce, other),
        "biased": message_of(use_linear_gated_ce, biased),
        "fused": message_of(use_linear_gated_ce, fused),
        "k": message_of(use_linear_gated_ce, good, k=1),
        "chunk_size": message_of(use_linear_gated_ce, good, chunk_size=0),
        "untouched": "compute_language_model_loss" not in vars(good)
        and "forward" not in vars(good),
    }
    use_linear_gated_ce(good)
    logits = torch.randn(16, 3, 384)
    messages["logits"] = message_of(good.compute_language_model_loss, batch["labels"], logits)
    good.output_layer.register_forward_hook(lambda _, __, out: (out[0].float(), out[1]))
    messages["used"] = message_of(run, good, batch)
    return messages


def start(world_size: int) -> None:
    run_megatron_on_cpu()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world_size)


def function(rank: int, world_size: int) -> dict[str, Any]:
    start(world_size)
    found: dict[str, Any] = {
        "plain": case_step(),
        "tied": case_step(tied=True),
        "mtp": case_mtp(predicted=2),
        "mtp, tied": case_mtp(predicted=1, tied=True),
        "half": case_half(),
        "main_grad": case_main_grad(),
        "main_grad, tied": case_main_grad(tied=True),
        "removal": case_removal(),
        "stages": case_stages(),
        "wrapped": case_wrapped(),
        "own labels": case_own_labels(),
        "logits used": case_logits_used(),
        "errors": case_errors(),
    }
    if world_size > 1:
        parts = {"sequence_parallel": True}
        found["sequence parallel"] = case_step(**parts)
        found["sequence parallel, tied"] = case_step(tied=True, **parts)
        found["sequence parallel, mtp"] = case_mtp(predicted=2, **parts)
        found["sequence parallel, main_grad"] = case_main_grad(**parts)
    return found


if __name__ == "__main__":
    work(function)
