"""Every type of model that transformers lists: the gated loss of its logits, or a true refusal.

``pytest --slow --sweep --sweep-table table.md`` runs all of them and writes what became of each.
"""

# ruff: noqa: E402, without transformers there is nothing to import for.

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eaft_ext

MISSING = "needs transformers: pip install '.[test]'"
transformers = pytest.importorskip("transformers", reason=MISSING)
if not hasattr(transformers.PretrainedConfig, "sub_configs_defaults"):
    pytest.skip(
        "needs a transformers whose configurations tell of those within them: "
        "pip install 'transformers>=5.24'",
        allow_module_level=True,
    )

from sweep_models import Case, batch, build, cases
from sweep_refusals import causal_of, check_refusal, forward, trace
from transformers_models import gradients, shifted

from eaft_ext.integrations.transformers import use_linear_gated_ce

PREFIX = "use_linear_gated_ce: "
CASES = {case.name: case for case in cases()}
# Of different structures, in every run; the others with --slow.
QUICK = {
    "causal-bamba",
    "causal-bart",
    "causal-deepseek_v3",
    "causal-gemma3n_text",
    "causal-gpt2",
    "causal-minicpm3",
    "causal-qwen3_moe",
    "causal-rwkv",
    "image-text-qwen2_vl",
}
# So many of types and variants with transformers 5.24, less some: that the sweep does not rot.
AT_LEAST = {"eager equal": 270, "compiled equal": 210}


@dataclass
class Row:
    """What became of a model."""

    model: str = ""
    eager: str = "not run"
    compiled: str = "not run"


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[dict[str, Row]]:
    """Rows by the names of cases; at the end they are written, and how many there are of each."""
    rows: dict[str, Row] = {}
    yield rows
    path = request.config.getoption("--sweep-table")
    if path:
        Path(path).write_text(_markdown(rows))


def _counts(rows: dict[str, Row]) -> Counter[str]:
    outcomes = [f"eager {row.eager}" for row in rows.values()]
    outcomes += [f"compiled {row.compiled}" for row in rows.values()]
    return Counter(outcome.partition(":")[0] for outcome in outcomes)


def _markdown(rows: dict[str, Row]) -> str:
    lines = [f"- {outcome}: {count}" for outcome, count in sorted(_counts(rows).items())]
    lines += ["", "| type | model | eager | compiled |", "|---|---|---|---|"]
    for name, row in rows.items():
        cells = (name, row.model, row.eager, row.compiled)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


# Values


@dataclass
class Ready:
    """A model that runs with labels, or what came of it before that."""

    case: Case
    model: Any
    dtype: torch.dtype
    error: Exception | None = None

    def batch(self, length: int = 9) -> tuple[dict[str, Tensor], Tensor]:
        given, labels = batch(self.case, length)
        in_dtype = {
            name: value.to(self.dtype) if value.is_floating_point() else value
            for name, value in given.items()
        }
        return in_dtype, labels


def ready(case: Case) -> Ready:
    """In float64 if its own forward and backward run in that, or else in float32."""
    for dtype in (torch.float64, torch.float32):
        found = Ready(case, build(case).to(dtype), dtype)
        given, labels = found.batch()
        try:
            forward(found.model, given, labels=labels).loss.backward()
        except Exception as error:
            found.error = error
        else:
            found.model.zero_grad()
            return found
    return found


class Refused(Exception):
    """With the sentence, less the name of the function."""


def patched(model: Any, **options: Any) -> Any:
    try:
        return use_linear_gated_ce(model, **options)
    except (TypeError, ValueError) as error:
        raise _refusal(error) from error


def _refusal(error: Exception) -> Exception:
    is_one = isinstance(error, (TypeError, ValueError)) and str(error).startswith(PREFIX)
    return Refused(str(error).removeprefix(PREFIX)) if is_one else error


def of_patched(model: Any, given: dict[str, Tensor], labels: Tensor) -> Any:
    try:
        return forward(model, given, labels=labels)
    except Exception as error:
        raise _refusal(error) from error


def expected_losses(model: Any, given: Any, labels: Tensor, gate: Any) -> tuple[Tensor, Tensor]:
    """What the loss is to be with a gate, and the model's own.

    Its own is the cross-entropy of its logits, and what it adds to that, such as a router's.
    """
    of_next = shifted(labels)
    gated = eaft_ext.gated_ce(forward(model, given).logits, of_next, gate=gate)
    outputs = forward(model, given, labels=labels)
    logits = outputs.logits.float().flatten(0, 1)
    added = outputs.loss - nn.functional.cross_entropy(logits, of_next.flatten())
    return (gated if abs(added.item()) < 1e-5 else gated + added), outputs.loss


def assert_near(found: Tensor, expected: Tensor, what: str, scale: float = 0.0) -> None:
    error = (found.double() - expected.double()).abs().max().item() if found.numel() else 0.0
    bound = 1e-5 * max(scale, expected.abs().max().item() if expected.numel() else 0.0)
    assert error <= bound, f"{what}: off by {error:.3g}, where {bound:.3g} is rounding"


def assert_same_gradients(found: dict[str, Any], expected: dict[str, Any]) -> None:
    scale = max(value.abs().max().item() for value in expected.values() if value is not None)
    assert scale > 0
    for name, value in expected.items():
        one = found[name]
        if value is None or one is None:
            value = next((some for some in (value, one) if some is not None), None)
            assert value is None or not value.any(), f"{name}: one has no gradient"
        else:
            assert_near(one, value, f"gradient of {name}", scale)


def check_values(one: Ready, gate: Any, length: int) -> None:
    given, labels = one.batch(length)
    with patched(one.model, gate=gate):
        outputs = of_patched(one.model, given, labels)
        its_gradients = gradients(one.model, outputs.loss)
    expected, own = expected_losses(one.model, given, labels, gate)
    assert_near(outputs.loss, expected, "loss")
    if isinstance(gate, eaft_ext.NoGate):
        assert_near(outputs.loss, own, "own loss")
    else:
        assert abs(expected - own) > 1e-2 * own, "gates that are all 1 show nothing"
    assert_same_gradients(its_gradients, gradients(one.model, expected))
    assert outputs.logits is None


def check_evaluation(one: Ready) -> None:
    """Without gradients the logits are there, and so is the loss of models that change them."""
    given, labels = one.batch()
    causal = causal_of(one.model.eval())
    with torch.no_grad():
        with patched(one.model):
            outputs = of_patched(one.model, given, labels)
        causal.loss_function = _gated_ce
        expected = forward(one.model, given, labels=labels)
        del causal._loss_function
    assert_near(outputs.loss, expected.loss, "loss in evaluation")
    assert_near(outputs.logits, expected.logits, "logits in evaluation")


def _gated_ce(
    logits: Tensor, labels: Any = None, *_: Any, shift_labels: Any = None, **__: Any
) -> Any:
    """As a loss function of transformers, of what a model makes of its logits and labels."""
    return eaft_ext.gated_ce(logits, shifted(labels) if shift_labels is None else shift_labels)


def eager(case: Case, row: Row) -> str:
    """What becomes of a model; an AssertionError where that is wrong."""
    try:
        one = ready(case)
    except Exception as error:
        return f"not built: {_reason(error)}"
    row.model = type(one.model).__name__
    try:
        patched(one.model).remove()
    except Refused as refusal:
        check_refusal(trace(one.model, *one.batch()), str(refusal))
        return f"refused: {refusal}"
    if one.error is not None:
        return f"not built: its own forward raises {_reason(one.error)}"
    try:
        for gate, length in ((None, 9), (None, 12), (eaft_ext.NoGate(), 9)):
            check_values(one, gate, length)
    except Refused as refusal:
        check_refusal(trace(one.model, *one.batch()), str(refusal))
        outcome = f"refused: {refusal}"
    else:
        outcome = "equal"
    try:
        check_evaluation(one)
    except Refused:
        assert outcome != "equal", "refused in evaluation alone"
    return outcome


def _reason(error: Exception) -> str:
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {line[:160]}"


def outcome_of(
    run: Callable[[Case, Row], str], name: str, table: dict[str, Row], column: str
) -> None:
    """Of a type and its variants; a row for each."""
    failures = []
    case = CASES[name]
    for one in (case, *case.variants()):
        row = table.get(one.name, Row())
        try:
            outcome = run(one, row)
        except Exception as error:
            outcome = f"different: {_reason(error)}"
            failures.append(error)
        if one is case or not outcome.startswith("not built"):
            setattr(row, column, outcome)
            table[one.name] = row
    if failures:
        raise failures[0]
    outcome = getattr(table[name], column)
    if outcome.startswith("not"):
        pytest.skip(outcome)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CASES],
)
def test_eager(name: str, table: dict[str, Row]) -> None:
    """Loss and gradients, with and without a gate, of two lengths, or a refusal that is true."""
    outcome_of(eager, name, table, "eager")


LENGTHS = (9, 12, 9)


def compiled(case: Case, row: Row) -> str:
    """What becomes of a compiled model that is called with several lengths."""
    try:
        one = _ready_to_compile(case)
    except Exception as error:
        return f"not built: {_reason(error)}"
    row.model = type(one.model).__name__
    try:
        with patched(one.model):
            if one.error is not None:
                return f"not built: its own forward raises {_reason(one.error)}"
            refusal, expected = _eagerly(one)
            try:
                found = _compiled(one)
            except Refused as error:
                assert str(error) == str(refusal), f"refused when compiled: {error}"
                return f"refused: {error}"
            except Exception as error:
                failure = error
            else:
                assert refusal is None, f"not refused when compiled, but eagerly: {refusal}"
                failure = _difference(found, expected)
    except Refused as refused:
        return f"refused: {refused}"
    if failure is None:
        return "equal"
    # Is it the model's own?
    try:
        own = _difference(_compiled(one), _eagerly(one)[1])
    except Exception as error:
        own = error
    if type(own) is not type(failure):
        raise failure
    return f"not compilable: {_reason(own)}"


def _ready_to_compile(case: Case) -> Ready:
    """With one layer, where that goes: most of the time is that of the compiler."""
    with contextlib.suppress(Exception):
        found = ready(dataclasses.replace(case, layers=1))
        if found.error is None:
            return found
    return ready(case)


def _run(one: Ready, model: Any, length: int) -> tuple[Tensor, dict[str, Any]]:
    loss = of_patched(model, *one.batch(length)).loss
    return loss.detach(), gradients(one.model, loss)


def _eagerly(one: Ready) -> tuple[Refused | None, list[Any]]:
    try:
        return None, [_run(one, one.model, length) for length in LENGTHS]
    except Refused as refusal:
        return refusal, []


def _compiled(one: Ready) -> list[Any]:
    torch._dynamo.reset()
    model = torch.compile(one.model, backend="aot_eager")
    return [_run(one, model, length) for length in LENGTHS]


def _difference(found: list[Any], expected: list[Any]) -> AssertionError | None:
    try:
        for (loss, of_loss), (other, of_other) in zip(found, expected, strict=True):
            assert_near(loss, other, "compiled loss")
            assert_same_gradients(of_loss, of_other)
    except AssertionError as error:
        return error
    return None


@pytest.mark.sweep
@pytest.mark.parametrize("name", CASES)
def test_compiled(name: str, table: dict[str, Row]) -> None:
    """The values of the eager model, at a second length and at the first again."""
    outcome_of(compiled, name, table, "compiled")


@pytest.mark.sweep
def test_enough_of_them_were_built(table: dict[str, Row]) -> None:
    """After all others: what is not built, or not compilable, is not compared with anything."""
    rows = [table.get(name, Row()) for name in CASES]
    if any("not run" in (row.eager, row.compiled) for row in rows):
        pytest.skip("a part of the sweep; --slow --sweep without -k runs all of it")
    counts = _counts(table)
    for outcome, at_least in AT_LEAST.items():
        assert counts[outcome] >= at_least, outcome
