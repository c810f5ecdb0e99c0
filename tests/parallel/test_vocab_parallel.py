"""The loss over a vocabulary in shards against the undivided one and the reference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from gate_cases import FAMILY, GATES
from inputs import IGNORED, REFUSAL, TRAPS, agree, make, same_bits, upstream_of
from parity import Outcome, outcome
from tolerances import FLOOR_IN_EPSILONS
from torch import Tensor
from vocab_shards import NUM_SHARDS, assert_shards_match, divide, outcome_of_shards, shards_at

from eaft_ext import EntropyGate, Gate, NoGate, SigmoidGate, gated_ce, reference
from eaft_ext._options import TokenLoss
from eaft_ext.gates import GateFunction
from eaft_ext.parallel import _shard
from eaft_ext.parallel._shard import VocabShard, token_losses

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.operator("gated_ce_merge"),
]


FLOAT32_EPSILON = torch.finfo(torch.float32).eps


def _truth(logits: Tensor, labels: Tensor, upstream: Tensor) -> Outcome:
    logits = logits.double()
    return outcome(reference.gated_ce, logits, labels, upstream, reduction="none", gate=NoGate())


def _relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()) / b.double()).abs().max().item()


def _assert_match(logits: Tensor, labels: Tensor, widths: list[int], **options: Any) -> None:
    assert_shards_match(logits, labels, upstream_of(labels), widths, **options)


@pytest.mark.parametrize("num_shards", NUM_SHARDS)
@pytest.mark.parametrize("vocab_size", [37, 1003])
@pytest.mark.parametrize("trap", TRAPS)
def test_traps(
    device: str, dtype: torch.dtype, trap: str, vocab_size: int, num_shards: int
) -> None:
    logits, labels = make(9, vocab_size, dtype, trap=trap, device=device)
    _assert_match(logits, labels, divide(vocab_size, num_shards))


@pytest.mark.parametrize("trap", TRAPS)
def test_traps_without_kernels(without_kernels: None, dtype: torch.dtype, trap: str) -> None:
    logits, labels = make(9, 130, dtype, trap=trap)
    for num_shards in NUM_SHARDS:
        _assert_match(logits, labels, divide(130, num_shards))


@pytest.mark.parametrize("num_rows", [2, 9], ids=["few_rows", "many_rows"])
@pytest.mark.parametrize("vocab_size", [1, 2, 5, 129, 8193, 151936])
def test_vocab_sizes(device: str, dtype: torch.dtype, vocab_size: int, num_rows: int) -> None:
    """Fewer columns than shards, a last block that is not full, and a real vocabulary."""
    logits, labels = make(num_rows, vocab_size, dtype, device=device, ignored=0.2)
    for num_shards in (2, 8):
        _assert_match(logits, labels, divide(vocab_size, num_shards))


WIDTHS = {
    "first_empty": [0, 40, 20],
    "middle_empty": [40, 0, 20],
    "last_empty": [40, 20, 0],
    "one_column": [1, 58, 1],
    "columns_alone": [1] * 60,
    "one_has_all": [0, 60, 0, 0],
}


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS.keys())
def test_narrow_and_empty_shards(device: str, dtype: torch.dtype, widths: list[int]) -> None:
    logits, labels = make(9, 60, dtype, device=device, ignored=0.2)
    _assert_match(logits, labels, widths)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("vocab_size", [3, 37, 400])
@pytest.mark.parametrize("k", [2, 8, 20, 64, 128])
def test_k(device: str, k: int, vocab_size: int) -> None:
    """Less than a shard has, more than that, and more than there are in all."""
    logits, labels = make(9, vocab_size, device=device)
    for num_shards in (2, 3, 8):
        _assert_match(logits, labels, divide(vocab_size, num_shards), k=k)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("widths", [[100, 100, 100], [3, 5, 2]], ids=str)
@pytest.mark.parametrize("gate", GATES, ids=lambda gate: getattr(gate, "__name__", str(gate)))
def test_gates(device: str, dtype: torch.dtype, gate: Any, widths: list[int]) -> None:
    logits, labels = make(12, sum(widths), dtype, device=device, ignored=0.2)
    _assert_match(logits, labels, widths, gate=gate)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("widths", [[100, 100, 100], [3, 5, 2]], ids=str)
@pytest.mark.parametrize("family", FAMILY, ids=str)
def test_family(device: str, dtype: torch.dtype, family: dict[str, Any], widths: list[int]) -> None:
    logits, labels = make(12, sum(widths), dtype, device=device, ignored=0.2)
    _assert_match(logits, labels, widths, **family)


class _OfK(Gate):
    """A gate of one's own that depends on k."""

    def for_k(self, k: int) -> GateFunction:
        return lambda nll, entropy: entropy / k


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("gate", [_OfK(), EntropyGate(), SigmoidGate()], ids=["own", *"ab"])
@pytest.mark.parametrize("told", ["vocab_size", "equal_shards"])
def test_a_gate_has_the_k_that_there_is(device: str, gate: Any, told: str) -> None:
    """Where the vocabulary is smaller than k, that is the number of its words."""
    logits, labels = make(9, 12, device=device)
    _assert_match(
        logits, labels, [4, 4, 4], gate=gate, vocab_size=12 if told == "vocab_size" else None
    )


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("gate", [EntropyGate(), SigmoidGate(), NoGate()], ids=str)
def test_built_in_gates_find_out_how_many_words_there_are(device: str, gate: Any) -> None:
    """As with vocab_start and without vocab_size: a process knows of its own columns alone."""
    logits, labels = make(9, 12, device=device)
    upstream = upstream_of(labels)
    expected = outcome(gated_ce, logits, labels, upstream, gate=gate, reduction="none")
    places = [(x, shard._replace(total=None)) for x, shard in shards_at(logits, [5, 7])]
    partials = torch.stack(
        [reference.shard_partial(x, labels, 20, shard.start) for x, shard in places]
    )
    for x, shard in places:
        of_token = TokenLoss(20, gate, IGNORED)
        loss, stats = token_losses(x, labels, of_token, shard, lambda _: partials)
        torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(stats.gate, expected.gate, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("num_shards", [2, 8])
@pytest.mark.parametrize("vocab_size", [130, 4096, 50257])
@pytest.mark.parametrize(
    ("trap", "doubt"), [("probability_0.999", 1e-3), ("probability_one_minus_1e-6", 1e-6)]
)
def test_confident_tokens(
    device: str, dtype: torch.dtype, trap: str, doubt: float, vocab_size: int, num_shards: int
) -> None:
    logits, labels = make(4, vocab_size, dtype, trap=trap, device=device)
    upstream = torch.full((4,), 64.0, device=device)  # 1e-6 would be subnormal in float16
    op = outcome_of_shards(logits, labels, upstream, divide(vocab_size, num_shards), gate=NoGate())
    truth = _truth(logits, labels, upstream)
    known = 1e-8 if dtype == torch.float64 else FLOOR_IN_EPSILONS * FLOAT32_EPSILON / doubt
    assert _relative(op.nll, truth.nll) <= known
    at_label = (x.gradient.gather(1, labels[:, None]) for x in (op, truth))
    assert _relative(*at_label) <= known + torch.finfo(dtype).eps


@pytest.mark.parametrize("num_shards", [1, 2, 8])
@pytest.mark.parametrize("at", [0, 3000, 8999])
def test_the_rest_keeps_its_digits(
    device: str, dtype: torch.dtype, route: str, at: int, num_shards: int
) -> None:
    """Of p = 1 - 1e-6 all is in the sum beside the label's 1, which a partial must not round off.

    Next to the label, where a kernel may add in float32, nothing is left to be added.
    """
    logits, labels = make(4, 9000, dtype, trap="probability_one_minus_1e-6", device=device)
    target = logits.gather(1, labels[:, None])
    logits[:, max(at - 256, 0) : at + 256] = -math.inf
    logits[:, at : at + 1] = target
    # The former label is an outlier no more.
    logits.masked_fill_((logits == target) & (torch.arange(9000, device=device) != at), 0.0)
    labels.fill_(at)
    upstream = torch.full((4,), 64.0, device=device)
    op = outcome_of_shards(logits, labels, upstream, divide(9000, num_shards), gate=NoGate())
    truth = _truth(logits, labels, upstream)
    assert (truth.nll < 1e-5).all()
    if dtype == torch.float64:
        known = 1e-9  # the truth itself has added the 1
    else:
        known = (16 if device == "cpu" else 1e6) * FLOAT32_EPSILON
    assert _relative(op.nll, truth.nll) <= known
    at_label = (x.gradient[:, at] for x in (op, truth))
    assert _relative(*at_label) <= known + torch.finfo(dtype).eps


SHAPES = {
    "no_dimension": lambda x, y: (x[0], y[0]),
    "batch_first": lambda x, y: (x.view(3, 4, -1), y.view(3, 4)),
    "sequence_first": lambda x, y: (x.view(4, 3, -1).transpose(0, 1), y.view(4, 3).t()),
    "last_token_cut_off": lambda x, y: (x.view(3, 4, -1)[:, :-1], y.view(3, 4)[:, 1:]),
    "every_other_row": lambda x, y: (x[::2], y[::2]),
    "vocabulary_first": lambda x, y: (x.t().contiguous().t(), y),
    "expanded": lambda x, y: (x[:1].expand(5, -1), y[:1].expand(5)),
    "five_dimensions": lambda x, y: (x.view(1, 2, 3, 2, -1), y.view(1, 2, 3, 2)),
    "no_rows": lambda x, y: (x[:0], y[:0]),
    "no_rows_of_three": lambda x, y: (x.view(3, 4, -1)[:, :0], y.view(3, 4)[:, :0]),
}


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("labels_of", [torch.int64, torch.int32], ids=["int64", "int32"])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(device: str, dtype: torch.dtype, shape: str, labels_of: torch.dtype) -> None:
    """Whatever lies around them: the shards are views of all logits. With every kind of labels."""
    flat, flat_labels = make(12, 300, dtype, device=device, ignored=0.2)
    plain, plain_labels = SHAPES[shape](flat, flat_labels)
    widths = divide(300, 3)
    upstream = upstream_of(plain_labels)
    expected = outcome_of_shards(plain.contiguous(), plain_labels.contiguous(), upstream, widths)
    found = outcome_of_shards(plain, plain_labels.to(labels_of), upstream, widths)
    for name, a, b in zip(Outcome._fields, found, expected, strict=True):
        assert agree(a, b), name
    _assert_match(plain, plain_labels, widths)


@pytest.mark.usefixtures("route")
def test_rows_in_more_dimensions_than_kernels_address(device: str, dtype: torch.dtype) -> None:
    logits, labels = make(32, 300, dtype, device=device, ignored=0.2)
    mixed = logits.view(2, 2, 2, 2, 2, 300).permute(4, 3, 2, 1, 0, 5)
    labels = labels.view(2, 2, 2, 2, 2)
    upstream = upstream_of(labels)
    found = outcome_of_shards(mixed, labels, upstream, divide(300, 3))
    expected = outcome_of_shards(mixed.contiguous(), labels, upstream, divide(300, 3))
    for name, a, b in zip(Outcome._fields, found, expected, strict=True):
        assert agree(a, b), name


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("at", [0, 1, 2])
def test_all_labels_in_one_shard(device: str, dtype: torch.dtype, at: int) -> None:
    widths = [50, 10, 70]
    start = sum(widths[:at])
    logits, _ = make(12, 130, dtype, device=device)
    labels = torch.randint(start, start + widths[at], (12,)).to(device)
    labels[0], labels[1] = start, start + widths[at] - 1
    _assert_match(logits, labels, widths)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("ignore_index", [-100, 0, 17, 59, 60, 2**40])
def test_ignored_tokens(device: str, dtype: torch.dtype, ignore_index: int) -> None:
    """Zero in every result, also where their logits are NaN; and nothing changes for the others."""
    logits, labels = make(12, 60, dtype, device=device)
    labels[labels == ignore_index] = 1
    upstream = upstream_of(labels)
    options: dict[str, Any] = {"widths": [20, 25, 15], "ignore_index": ignore_index}
    kept = outcome_of_shards(logits, labels, upstream, **options)
    labels[1::3] = ignore_index
    ignored = labels == ignore_index
    found = outcome_of_shards(
        logits.masked_fill(ignored[:, None], math.nan), labels, upstream, **options
    )
    for name, a, b in zip(Outcome._fields, found, kept, strict=True):
        assert not a[ignored].any(), name
        assert same_bits(a[~ignored], b[~ignored]), name


@pytest.mark.usefixtures("route")
def test_all_ignored(device: str, dtype: torch.dtype) -> None:
    logits, labels = make(12, 60, dtype, device=device, ignored=1.0)
    logits[3:] = math.nan
    for name, value in (
        outcome_of_shards(logits, labels, upstream_of(labels), [20, 25, 15])._asdict().items()
    ):
        assert not value.any(), name


def test_run_to_run(device: str, dtype: torch.dtype) -> None:
    logits, labels = make(12, 9001, dtype, device=device)
    upstream = upstream_of(labels)
    first = outcome_of_shards(logits, labels, upstream, divide(9001, 3))
    again = outcome_of_shards(logits.clone(), labels, upstream, divide(9001, 3))
    for name, a, b in zip(Outcome._fields, again, first, strict=True):
        assert same_bits(a, b), name


def test_one_shard_is_the_undivided_call(device: str, dtype: torch.dtype) -> None:
    logits, labels = make(12, 9001, dtype, device=device, ignored=0.2)
    upstream = upstream_of(labels)
    whole = outcome(gated_ce, logits, labels, upstream, reduction="none")
    found = outcome_of_shards(logits, labels, upstream, [9001])
    assert same_bits(found.entropy, whole.entropy) and same_bits(found.gate, whole.gate)
    epsilon = torch.finfo(found.nll.dtype).eps
    torch.testing.assert_close(found.nll, whole.nll, rtol=2 * epsilon, atol=0)


def test_the_route_without_kernels_calls_none(
    without_kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the tests here with the route "reference" rely on."""
    logits, labels = make(3, 8)
    monkeypatch.setattr(_shard, "ops", None)
    outcome_of_shards(logits, labels, upstream_of(labels), [4, 4])
    monkeypatch.undo()
    monkeypatch.setattr(_shard, "ops", None)
    with pytest.raises(AttributeError):
        of_token = TokenLoss(4, NoGate(), IGNORED)
        _shard.token_losses(
            logits, labels, of_token, VocabShard(0, None, 8), lambda partial: partial
        )


def _merge(**changed: Any) -> Any:
    arguments: dict[str, Any] = {
        "logits": torch.zeros(3, 9),
        "labels": torch.zeros(3, dtype=torch.int64),
        "partials": torch.zeros(2, 3, 7),
        "k": 4,
        "gate": "none",
        "gate_parameters": [],
        "ignore_index": -100,
        "vocab_start": 0,
        "vocab_size": None,
    }
    return torch.ops.eaft_ext.gated_ce_merge(**arguments | changed)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"partials": torch.zeros(0, 3, 7)}, r"got \[0, 3, 7\] for labels \[3\]"),
        ({"partials": torch.zeros(2, 3, 4)}, r"k = 4, got \[2, 3, 4\]"),
        ({"partials": torch.zeros(2, 3, 132)}, r"got \[2, 3, 132\]"),
        ({"partials": torch.zeros(2, 4, 7)}, r"got \[2, 4, 7\] for labels \[3\]"),
        ({"partials": torch.zeros(3, 7)}, r"got \[3, 7\] for labels \[3\]"),
        ({"partials": torch.tensor(1.0)}, r"got \[\] for labels \[3\]"),
        ({"partials": torch.zeros(2, 3, 7).double()}, "must be Float .*got Double"),
        ({"partials": torch.zeros(2, 3, 7).long()}, "must be Float .*got Long"),
        ({"logits": torch.zeros(3, 9).double()}, "must be Double .*got Float"),
        ({"logits": torch.zeros(3, 9).long()}, "got Long"),
        ({"labels": torch.zeros(2, dtype=torch.int64)}, r"got \[2\] for logits"),
        ({"labels": torch.zeros(3)}, "int64 or int32, got Float"),
        ({"gate": "unknown"}, "got unknown"),
        ({"vocab_start": -1}, "vocab_start must be at least 0, got -1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_merge_checks_for_itself(changed: dict[str, Any], sentence: str) -> None:
    with pytest.raises(REFUSAL, match=sentence):
        _merge(**changed)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"k": 1}, "k must be from 2 to 128, or 0 for all logits, got 1"),
        ({"k": 129}, "k must be from 2 to 128, or 0 for all logits, got 129"),
        ({"vocab_start": -1}, "vocab_start must be at least 0, got -1"),
        ({"logits": torch.tensor(0.0)}, r"got \[\]"),
        ({"logits": torch.zeros(3, 9).int()}, "got Int"),
        ({"labels": torch.zeros(4).long()}, r"got \[4\] for logits \[3, 9\]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_partial_checks_for_itself(changed: dict[str, Any], sentence: str) -> None:
    arguments: dict[str, Any] = {
        "logits": torch.zeros(3, 9),
        "labels": torch.zeros(3, dtype=torch.int64),
        "k": 4,
        "vocab_start": 0,
        "vocab_size": None,
        "ignore_index": -100,
    }
    with pytest.raises(REFUSAL, match=sentence):
        torch.ops.eaft_ext.gated_ce_partial(**arguments | changed)


def test_partial_without_values_checks_how_many_are_asked_for() -> None:
    """A size that no tensor can have must not be asked for."""
    logits, labels = torch.zeros(3, 9, device="meta"), torch.zeros(3, device="meta").long()
    with pytest.raises(ValueError, match=rf"k must be from 2 to 128, .* got {2**63 - 1}"):
        torch.ops.eaft_ext.gated_ce_partial(logits, labels, 2**63 - 1, 0, None, -100)
