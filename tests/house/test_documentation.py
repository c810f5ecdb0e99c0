"""The README and docs/: their Python is run, their options and messages are those of the code.

A block after ``<!-- not run: reason -->`` is compiled only.
"""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pages import BLOCKS, DOCS, PAGES, ROOT, Block

import eaft_ext
from eaft_ext.cli.main import build_parser

MISSING = "needs the demo extra: pip install '.[demo]'"


def _logits() -> dict[str, Any]:
    """What the pages call by these names."""
    generator = torch.Generator().manual_seed(0)
    vocab_size, num_words, hidden_size = 61, 58, 16
    labels = torch.randint(num_words, (2, 9), generator=generator)
    labels[:, -1] = -100
    return {
        "torch": torch,
        "eaft_ext": eaft_ext,
        "num_words": num_words,
        "input_ids": torch.randint(vocab_size, (2, 9), generator=generator),
        "labels": labels,
        "micro_batches": [labels, labels],
        "logits": torch.randn(2, 9, vocab_size, generator=generator).requires_grad_(),
        "hidden": torch.randn(2, 9, hidden_size, generator=generator).requires_grad_(),
        "weight": torch.randn(vocab_size, hidden_size, generator=generator).requires_grad_(),
        "bias": torch.randn(vocab_size, generator=generator).requires_grad_(),
    }


def _model(_: Path) -> dict[str, Any]:
    pytest.importorskip("transformers", reason=MISSING)
    import transformers_models

    return {"model": transformers_models.build("smollm2").train()}


def _trainer(folder: Path) -> dict[str, Any]:
    transformers = pytest.importorskip("transformers", reason=MISSING)
    pytest.importorskip("accelerate", reason=MISSING)
    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=2,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    tokens = _logits()["input_ids"]
    dataset = [{"input_ids": row, "labels": row} for row in (*tokens, *tokens)]
    return {"Trainer": transformers.Trainer, "arguments": arguments, "dataset": dataset}


def _shard(_: Path) -> dict[str, Any]:
    """That of the one process of a group."""
    names = _logits()
    return {"logits_shard": names["logits"], "weight_shard": names["weight"]}


def _megatron(_: Path) -> dict[str, Any]:
    """What a training script of Megatron-LM has, around a model of nothing but its loss."""

    class Model(torch.nn.Module):
        def compute_language_model_loss(self, labels: Any, logits: Any) -> Any:
            raise AssertionError("the gated loss takes its place")

        def forward(self, logits: Any, *_: Any, labels: Any) -> Any:
            return self.compute_language_model_loss(labels, logits)

    def loss_func(loss_mask: Any, losses: Any, model: Any = None) -> Any:
        return (losses * loss_mask).sum(), loss_mask.sum(), {}

    names = _logits()
    model = Model()
    model.tp_group = dist.group.WORLD  # type: ignore[assignment]
    mask = (names["labels"] >= 0).float()
    micro_batch = names["logits"].transpose(0, 1), names["labels"], mask, None, None
    return {
        "model": model,
        "gated": _gated(model),
        "get_batch": lambda _: micro_batch,
        "loss_func": loss_func,
    }


def _gated(model: Any) -> Any:
    from eaft_ext.integrations.megatron import use_gated_ce

    return use_gated_ce(model)


def _sft(folder: Path) -> dict[str, Any]:
    trl = pytest.importorskip("trl", reason=MISSING)
    datasets = pytest.importorskip("datasets", reason=MISSING)
    from small_model import tokenizer_of

    tokens = _logits()["input_ids"]
    rows = [{"input_ids": row.tolist()} for row in (*tokens, *tokens)]
    arguments = trl.SFTConfig(
        str(folder), max_steps=2, report_to=[], save_strategy="no", use_cpu=True, bf16=False
    )
    return {
        "arguments": arguments,
        "dataset": datasets.Dataset.from_list(rows),
        "tokenizer": tokenizer_of(int(tokens.max()) + 1),
    }


# What a block uses that it does not make, and who makes it.
STUBS = {
    "model": _model,
    "Trainer": _trainer,
    "logits_shard": _shard,
    "weight_shard": _shard,
    "get_batch": _megatron,
}
# Pages whose blocks are about other things by the same names.
STUBS_OF_PAGE = {
    "megatron.md": {"model": _megatron, "logits_shard": _shard},
    "trl.md": {"model": _model, "tokenizer": _sft},
}


@pytest.fixture
def one_process() -> Iterator[dict[str, Any]]:
    """The group of a world of one process, and its mesh."""
    if not dist.is_available():
        pytest.skip("this torch has no distributed package")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,), mesh_dim_names=("tp",))
        yield {"tp_group": dist.group.WORLD, "mesh": mesh}
    finally:
        dist.destroy_process_group()


def _names_in(code: str) -> set[str]:
    return {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}


@pytest.mark.parametrize(
    "block", BLOCKS, ids=[f"{block.page.stem}-{block.line}" for block in BLOCKS]
)
def test_a_block_runs(block: Block, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    source = "\n" * block.line + block.code
    code = compile(source, str(block.page), "exec", dont_inherit=True)
    if block.reason:
        return
    used = _names_in(block.code)
    namespace = _logits()
    stubs = STUBS | STUBS_OF_PAGE.get(block.page.name, {})
    if used & {"tp_group", "mesh"} or _megatron in (stubs.get(name) for name in used):
        namespace |= request.getfixturevalue("one_process")
    for stub in {stubs[name] for name in used & stubs.keys()}:
        namespace |= stub(tmp_path)
    exec(code, namespace)
    if "forward_step" in used | namespace.keys():
        losses, report = namespace["forward_step"](None, namespace["model"])
        assert "eaft gate" in report(losses)[2]


def test_blocks_are_not_run_for_a_reason() -> None:
    """A typing error in the comment would be no comment."""
    for page in PAGES:
        comments = re.findall("<!-- *not.*", page.read_text("utf-8"))
        reasons = [block for block in BLOCKS if block.page == page and block.reason]
        assert len(comments) == len(reasons), page


def test_the_readme_is_short_and_has_the_test_command_once() -> None:
    lines = (ROOT / "README.md").read_text("utf-8").splitlines()
    assert len(lines) <= 150
    assert sum(line.startswith("pip install '.[test]' && pytest") for line in lines) == 1


def test_links_of_the_readme_lead_somewhere() -> None:
    """Those between pages are looked after by mkdocs."""
    text = (ROOT / "README.md").read_text("utf-8")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert links
    for link in links:
        path, _, heading = link.partition("#")
        assert (ROOT / path).is_file(), link
        if heading:
            titles = re.findall(r"^#+ (.+)$", (ROOT / path).read_text("utf-8"), re.MULTILINE)
            slugs = [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles]
            assert heading in slugs, link


def test_files_that_the_pages_name_exist() -> None:
    files = {path.name for folder in ("csrc", "eaft_ext", "tests", "benchmarks", "examples", "docs")
             for path in (ROOT / folder).rglob("*.*")}  # fmt: skip
    files |= {path.name for path in ROOT.iterdir()}
    for page in PAGES:
        text = page.read_text("utf-8")
        named = re.findall(r"([\w-]+\.(?:cuh?|cpp|h|py|sh|md))\b", text)
        assert set(named) - files <= {"script.py", "pretrain_gpt.py"}, page


def test_the_page_of_the_command_line_has_all_options() -> None:
    text = (DOCS / "command-line.md").read_text("utf-8")
    (commands,) = (
        action.choices
        for action in build_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    for name, parser in commands.items():
        _, _, section = text.partition(f"\n## {name}\n")
        section = section.partition("\n## ")[0]
        options = {option for action in parser._actions for option in action.option_strings}
        told = set(re.findall(r"--[a-z][a-z-]*", section))
        long = {option for option in options if option.startswith("--")} - {"--help"}
        assert told == long, name


@cache
def _sentences() -> list[str]:
    """All string constants of the package and its build, the fields of f-strings left out."""
    files = [*(ROOT / "eaft_ext").rglob("*.py"), ROOT / "setup.py"]
    return [
        node.value
        for file in files
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]


def test_the_error_messages_are_those_of_the_code() -> None:
    text = (DOCS / "troubleshooting.md").read_text("utf-8")
    messages = re.findall(r"^### `(.+)`$", text, re.MULTILINE)
    assert len(messages) >= 12
    for message in messages:
        for part in message.split("…"):
            part = part.strip()
            assert any(part in sentence for sentence in _sentences()), f"{message}: {part!r}"
