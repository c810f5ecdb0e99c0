"""What stands in for logits raises on any use but the loss function's."""

# ruff: noqa: E402, without transformers there is nothing to import for.

from __future__ import annotations

import copy
from collections.abc import Callable
from operator import iadd
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

MISSING = "needs transformers: pip install '.[test]'"
pytest.importorskip("transformers", reason=MISSING)

from torch.nn import functional as F
from torch.utils import _pytree
from transformers_models import V, batch, build, close, in_float64, tricky

from eaft_ext.integrations._absent_logits import AbsentLogits
from eaft_ext.integrations.transformers import use_linear_gated_ce


class Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


# What a model may do with its logits, and under which name that is refused.
USES: dict[str, Callable[[Any], Any]] = {
    "logsumexp": lambda x: x.logsumexp(-1).square().mean(),
    "square": lambda x: x.square().mean(),
    "pow": lambda x: (x**2).mean(),
    "softmax": lambda x: torch.softmax(x, -1).mean(),
    "log_softmax": lambda x: F.log_softmax(x, -1).mean(),
    "cross_entropy": lambda x: F.cross_entropy(x, torch.zeros(3)),
    "einsum": lambda x: torch.einsum("bsv->", x),
    "stack": lambda x: torch.stack([x]).sum(),
    "rsub": lambda x: 1 - x,
    "radd": lambda x: torch.zeros(2) + x,
    "add": lambda x: iadd(x, 1),  # in place
    "matmul": lambda x: x @ torch.zeros(3),
    "neg": lambda x: -x,
    "round": lambda x: round(x),
    "divmod": lambda x: divmod(x, 2),
    "gt": lambda x: x > 0,
    "eq": lambda x: x == 0,
    "getitem": lambda x: x[..., 0],
    "setitem": lambda x: x.__setitem__(0, 1.0),
    "len": lambda x: len(x),
    "iter": lambda x: list(iter(x)),
    "contains": lambda x: 0 in x,
    "bool": lambda x: bool(x),
    "float": lambda x: float(x),
    "array": lambda x: np.asarray(x),
    "item": lambda x: x.item(),
    "detach": lambda x: x.detach(),
    "requires_grad": lambda x: x.requires_grad,
    "data": lambda x: x.data,
    "view": lambda x: x.view(-1, V),
    "to(torch.float16)": lambda x: x.to(torch.float16),
    "mul": Squared.apply,
}


def with_use(use: Callable[[Any], Any]) -> Any:
    """A model that uses its logits after its loss function."""

    def trick(model: Any, hidden: Tensor, labels: Any, given: Any) -> Any:
        logits = model.lm_head(hidden)
        loss = None if labels is None else model.loss_function(logits, labels, V, **given)
        used = use(logits)
        return logits, loss if loss is None else loss + 0.1 * used

    return tricky(trick)


@pytest.mark.parametrize("name", USES)
def test_uses(name: str) -> None:
    """Beside unsloth #11277: z-losses and others were those of the loss, a number."""
    model = with_use(USES[name])
    tokens, labels = batch()
    use_linear_gated_ce(model)
    with pytest.raises(TypeError) as error:
        model(tokens, labels=labels)
    assert str(error.value) == (
        "use_linear_gated_ce: Llama changes its logits, or uses them, outside of its loss function "
        f"({name}); give eaft_ext.gated_ce the logits that it returns without labels"
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["logsumexp", "mul"])
def test_uses_in_a_compiled_model(name: str) -> None:
    torch._dynamo.reset()
    model = with_use(USES[name])
    tokens, labels = batch()
    use_linear_gated_ce(model)
    with pytest.raises(TypeError, match=rf"outside of its loss function \({name}\)"):
        torch.compile(model, backend="aot_eager")(tokens, labels=labels)


def test_bamba() -> None:
    """Beside unsloth #11277: a z-loss of its own, which is not the gated loss's."""
    sizes = {"attn_layer_indices": [0], "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1}
    for coefficient in (0.0, 0.1):
        model = build("bamba", num_hidden_layers=1, z_loss_coefficient=coefficient, **sizes)
        tokens, labels = batch()
        expected = in_float64(model, tokens, labels)
        use_linear_gated_ce(model)
        if coefficient == 0:
            close(model(tokens, labels=labels).loss, expected)
        else:
            with pytest.raises(TypeError, match=r"^use_linear_gated_ce: BambaForCausalLM .*sumexp"):
                model(tokens, labels=labels)


def test_what_leaves_logits_as_they_are() -> None:
    def trick(model: Any, hidden: Tensor, labels: Any, given: Any) -> Any:
        logits = model.lm_head(hidden)
        if labels is None:
            return logits, None
        assert logits.shape == (2, 9, V) and logits.size(-1) == V and logits.size() == (2, 9, V)
        assert logits.dtype == torch.float32 and logits.device == hidden.device
        assert not isinstance(logits, Tensor) and "shape=(2, 9, 61)" in repr(logits)
        labels = labels.to(logits.device)
        kept = logits.float().contiguous().to(hidden.device).to(torch.float32).to(hidden.dtype)
        return kept, model.loss_function(kept, labels, V, **given)

    model = tricky(trick)
    tokens, labels = batch()
    expected = in_float64(model, tokens, labels)
    use_linear_gated_ce(model)
    outputs = model(tokens, labels=labels)
    close(outputs.loss, expected)
    assert outputs.logits is None


def test_it_does_not_outlive_its_call_as_a_tensor() -> None:
    """A model that keeps its logits finds what is none."""
    kept: list[Any] = []

    def trick(model: Any, hidden: Tensor, labels: Any, given: Any) -> Any:
        kept.append(model.lm_head(hidden))
        loss = None if labels is None else model.loss_function(kept[-1], labels, V, **given)
        return kept[-1], loss

    model = tricky(trick)
    tokens, labels = batch()
    use_linear_gated_ce(model)
    model(tokens, labels=labels)
    assert isinstance(kept[-1], AbsentLogits)
    with pytest.raises(TypeError, match=r"^use_linear_gated_ce: Llama changes its logits"):
        kept[-1].sum()


def test_copies_of_it() -> None:
    absent = AbsentLogits(torch.zeros(()), torch.Size([2, V]), torch.float32, lambda use: 1 / 0)
    assert copy.copy(absent).shape == (2, V)
    with pytest.raises(ZeroDivisionError):
        copy.copy(absent).mean()


def test_the_loss_in_it_is_found_by_pytrees() -> None:
    """FSDP2 puts its hooks on the tensors in what an output layer returns, and may round them."""
    seen: list[Any] = []

    def hook(module: Any, args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return None
        (leaf,) = _pytree.tree_leaves(output)
        leaf.register_hook(lambda grad: seen.append(grad.item()))
        return _pytree.tree_map(lambda x: x.bfloat16(), output)

    model = build("llama")
    tokens, labels = batch()
    expected = in_float64(model, tokens, labels)
    use_linear_gated_ce(model)
    model.lm_head.register_forward_hook(hook)
    loss = model(tokens, labels=labels).loss
    close(loss, expected)
    loss.backward()
    assert seen == [1.0]
