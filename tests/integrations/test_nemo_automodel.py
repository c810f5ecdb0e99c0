"""NeMo-Automodel's losses with the class of docs/other-stacks.md; its training is not run."""

# ruff: noqa: E402, without NeMo-Automodel there is nothing to import for.

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import BLOCKS, on_page

MISSING = "needs NeMo-Automodel, in an environment of its own: pip install nemo-automodel"
pytest.importorskip("nemo_automodel", reason=MISSING)

from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy
from nemo_automodel.components.loss.utils import calculate_loss

import eaft_ext
from eaft_ext import reference

Loss = on_page("other-stacks.md", "EAFTLoss")


def inputs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(61, (2, 9), generator=generator)
    labels[:, :3] = -100
    logits = 3 * torch.randn(2, 9, 61, generator=generator)
    return {"logits": logits.requires_grad_(), "labels": labels}


@pytest.mark.parametrize("count", [None, 0, 40])
@pytest.mark.parametrize("weighted", [False, True])
def test_as_its_own_loss_is_called(count: int | None, weighted: bool) -> None:
    given = inputs()
    more: dict[str, Any] = {}
    if weighted:
        more["loss_weights"] = torch.rand(2, 9, generator=torch.Generator().manual_seed(1))
    if count == 0:
        given["labels"][:] = -100
    found = calculate_loss(Loss(), **given, num_label_tokens=count, **more)
    found.backward()
    logits = given["logits"].detach().requires_grad_()
    weight = more.get("loss_weights")
    total = reference.gated_ce(logits, given["labels"], reduction="sum", token_weight=weight)
    expected = total / (count or 1)
    expected.backward()
    torch.testing.assert_close((found, given["logits"].grad), (expected, logits.grad))


def test_all_that_its_own_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the gate is one it is that loss, with the mask, the weights and the division."""
    given = inputs()
    mask = (torch.arange(18).reshape(2, 9) % 4 != 0).int()
    given |= {"mask": mask, "num_label_tokens": 7, "loss_weights": torch.rand(2, 9)}
    plain = MaskedCrossEntropy()(**given | {"labels": given["labels"].clone()})
    monkeypatch.setattr(eaft_ext, "gated_ce", partial(eaft_ext.gated_ce, gate=eaft_ext.NoGate()))
    torch.testing.assert_close(Loss()(**given), plain)
    ungated = MaskedCrossEntropy.forward
    assert list(Loss.forward.__code__.co_varnames[:6]) == list(ungated.__code__.co_varnames[:6])


def test_it_stays_where_a_model_has_no_logits_to_keep() -> None:
    recipe = pytest.importorskip("nemo_automodel.recipes.llm.train_ft", reason=MISSING)
    loss = Loss()
    assert recipe._maybe_downgrade_loss_fn(loss, torch.nn.Linear(2, 2), False) is loss
    assert recipe._supports_loss_weights(loss)
    of_no_kind = torch.nn.CrossEntropyLoss()
    found = recipe._maybe_downgrade_loss_fn(of_no_kind, torch.nn.Linear(2, 2), False)
    assert type(found) is MaskedCrossEntropy


def test_a_configuration_names_it(tmp_path: Path) -> None:
    """By the file that has it."""
    loader = pytest.importorskip("nemo_automodel.components.config.loader", reason=MISSING)
    (block,) = (b for b in BLOCKS if "class EAFTLoss(" in b.code)
    file = tmp_path / "own_loss.py"
    file.write_text(f"import eaft_ext\n{block.code}")
    loss = loader.ConfigNode({"loss_fn": {"_target_": f"{file}:EAFTLoss"}}).loss_fn.instantiate()
    given = inputs()
    assert loss(**given) == Loss()(**given)
