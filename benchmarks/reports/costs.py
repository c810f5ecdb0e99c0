"""What a call of the loss costs in one process of many: a model, in bytes.

A byte counts as often as an operator reads or writes it: each operand once, so that these are
floors. What has one number a token (labels, losses, stats) is left out. test_cost_model.py counts
the same in real runs, to the byte; cost_model.py makes tables of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

STAT = 4
"""Bytes of what is added up and told to others: float32, whatever the logits are."""
PARTIAL_HEAD = 3
"""Numbers that a shard tells of a token, beside its k largest logits."""
NOTE_BYTES = 1024
"""A process's note in the store, where processes compare their calls, at most."""
STATS_BYTES = 40
"""Of a token, at most, of what is left out: loss, stats, mask, the gradient of the loss."""
KEPT_BYTES = 3 * STAT
"""Of a token, for the backward: its gate, and the maximum and log-sum of its row."""
VECTOR = 8
"""Elements: rows of a chunk's logits begin at a multiple."""


@dataclass(frozen=True)
class Call:
    """A call in one process."""

    tokens: int
    words: int
    """Of the whole vocabulary, V."""
    hidden: int = 0
    """H, where the output layer is part of it."""
    k: int = 20
    item: int = 2
    """Bytes of an element of logits, hidden and weight."""
    processes: int = 1
    """Those that share the vocabulary."""
    own_words: int | None = None
    """The shard of this process; by default an equal one."""

    @property
    def columns(self) -> int:
        """Of the logits in this process."""
        return -(-self.words // self.processes) if self.own_words is None else self.own_words

    @property
    def logits(self) -> int:
        """Bytes of this process's logits."""
        return self.tokens * self.columns * self.item

    @property
    def hiddens(self) -> int:
        """Bytes of the hidden of all tokens."""
        return self.tokens * self.hidden * self.item

    @property
    def weight(self) -> int:
        """Bytes of this process's rows of the output layer."""
        return self.columns * self.hidden * self.item

    @property
    def partial(self) -> int:
        """Bytes of what this process tells the others."""
        return self.tokens * (self.k + PARTIAL_HEAD) * STAT if self.processes > 1 else 0

    @property
    def product(self) -> int:
        """Floating-point operations of one product with the output layer."""
        return 2 * self.tokens * self.columns * self.hidden


@dataclass(frozen=True)
class Collective:
    """All of one kind in one direction of a call."""

    name: str
    count: int
    given: int
    """Bytes that this process brings, to all of them together."""
    group: str = "vocabulary"
    ours: bool = True
    """Of this package, and not of the training stack."""

    def received(self, processes: int) -> float:
        """Bytes that reach this process over its link, in a ring."""
        rounds = {
            "all_gather": processes - 1,
            "reduce_scatter": (processes - 1) / processes,
            "all_reduce": 2 * (processes - 1) / processes,
        }
        return self.given * rounds[self.name]


Collectives = tuple[Collective, ...]


@dataclass(frozen=True)
class Cost:
    """Of a call and its backward, in bytes."""

    forward: int
    """Read and written in memory."""
    backward: int
    kept: int
    """Allocated by the forward and kept for the backward."""
    peak: int
    """Most that is allocated beyond the inputs at once, results included."""
    sent_forward: Collectives = ()
    sent_backward: Collectives = ()
    products: int = 0
    """Floating-point operations of the products with the output layer."""

    @property
    def moved(self) -> int:
        """In memory, forward and backward."""
        return self.forward + self.backward


def _exchange(call: Call) -> int:
    """A partial written and brought; all of them received, and read."""
    return 2 * call.partial + 2 * call.processes * call.partial


def _gather(call: Call, count: int = 1) -> Collectives:
    return (Collective("all_gather", count, call.partial),) if call.partial else ()


def logits_loss(call: Call, in_place: bool = False, in_forward: bool = False) -> Cost:
    """``gated_ce``, or ``vocab_parallel_gated_ce`` where processes share the vocabulary.

    One read; then one read and one write; ``in_forward`` has both in one read and one write.
    """
    gradient = 0 if in_place else call.logits
    if in_forward:
        return Cost(2 * call.logits, 0, gradient, gradient)
    partials = (1 + call.processes) * call.partial
    return Cost(
        forward=call.logits + _exchange(call),
        backward=2 * call.logits,
        kept=call.tokens * KEPT_BYTES,
        peak=max(gradient, partials),
        sent_forward=_gather(call),
    )


def linear_loss(
    call: Call, chunk_size: int, reduce_hidden: bool = True, sequence: bool = False
) -> Cost:
    """``linear_gated_ce``, or its form for shards, with the gradients of hidden and weight.

    The logits of a chunk are written by a product, read and overwritten by the loss (read once more
    where it waits for the other shards), and read by two products; each product reads the weight or
    its gradient, which every chunk but the first one adds to. With ``sequence`` the training stack
    gathers the hidden, and adds up and divides its gradient.
    """
    chunks = -(-call.tokens // chunk_size)
    longest = replace(call, tokens=min(call.tokens, chunk_size))
    buffer = longest.tokens * -(-call.columns // VECTOR) * VECTOR * call.item
    passes = 5 if call.processes == 1 else 6
    gradients = call.weight + call.hiddens
    # Of the hidden: two products read it; its gradient is zeroed, then written.
    cost = Cost(
        forward=passes * call.logits
        + 4 * call.hiddens
        + (4 * chunks - 1) * call.weight
        + _exchange(call),
        backward=0,
        kept=gradients,
        peak=gradients + buffer + (1 + call.processes) * longest.partial,
        sent_forward=_gather(call, chunks),
        products=3 * call.product,
    )
    if call.processes == 1 or not (sequence or reduce_hidden):
        return cost
    if not sequence:
        added_up = Collective("all_reduce", 1, call.hiddens)
        return replace(
            cost,
            forward=cost.forward + 2 * call.hiddens,
            sent_forward=(*cost.sent_forward, added_up),
        )
    own = call.hiddens // call.processes
    return replace(
        cost,
        forward=cost.forward + own + call.hiddens,
        backward=call.hiddens + own,
        peak=cost.peak + call.hiddens,
        sent_forward=(Collective("all_gather", 1, own, ours=False), *cost.sent_forward),
        sent_backward=(Collective("reduce_scatter", 1, call.hiddens, ours=False),),
    )


def output_layer(call: Call) -> Cost:
    """The logits by a product of their own, and the gradients by two: beside a loss of logits."""
    operands = call.hiddens + call.weight + call.logits
    return Cost(
        forward=operands,
        backward=2 * operands,
        kept=call.logits,
        peak=call.logits + call.weight + call.hiddens,
        products=3 * call.product,
    )


def eager_loss(call: Call) -> Cost:
    """EAFT as training frameworks write it, of whole rows, which shards are gathered to first.

    Operation by operation: a float32 copy, log-softmax, top k and its entropy; then the gradients
    of the picked losses and of log-softmax, and that of the copy.
    """
    wide = call.tokens * call.words * STAT
    whole = call.tokens * call.words * call.item
    copy = wide + whole if call.item != STAT else 0
    # What top k gives, float32 and int64, and the five operations from there to the entropy.
    entropy = 48 * call.tokens * call.k
    forward, backward = copy + 3 * wide + entropy, 4 * wide + copy
    sent: Collectives = ()
    if call.processes > 1:
        # Received process by process, then put in the order of a row.
        forward += call.logits + 3 * whole
        backward += 2 * call.logits
        sent = (Collective("all_gather", 1, call.logits, ours=False),)
    return Cost(forward, backward, kept=wide, peak=3 * wide, sent_forward=sent)


def rows_divided(cost: Cost, counts: bool = True) -> Cost:
    """Where DTensors divide rows as well: the mean is over all, so losses and counts are added."""
    given = (8, STAT) if counts else (STAT,)
    added = Collective("all_reduce", len(given), sum(given), "rows")
    return replace(cost, sent_forward=(*cost.sent_forward, added))
