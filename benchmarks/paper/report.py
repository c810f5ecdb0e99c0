"""The blocks of docs/paper.md, made from result files."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from reports.tables import MISSING, table

from .study import ARMS, EDITED, PRESETS, Preset, Run
from .verdict import (
    Array,
    Comparison,
    Path,
    compare,
    forgetting_at,
    frontier,
    interval,
    path_of,
)
from .weights import LOSSES

MIB = 2**20
WIDTH = 118
NOTHING = "*There is no result yet.*"
Results = dict[str, Any]


def fidelity(results: Results) -> str:
    """Correlations and errors of each k, text by text."""
    parts = []
    for name in ("answers", "prose"):
        found = results[name]
        rows = [
            [
                k,
                f"{of_k['pearson']:.4f}",
                f"{of_k['spearman']:.4f}",
                f"{of_k['mean_error']:.3f}",
                f"{of_k['largest_error']:.2f}",
                f"{of_k['gate_error']:.2f}",
            ]
            for k, of_k in found["k"].items()
        ]
        head = ["k", "Pearson", "Spearman", "mean error of H", "largest", "largest, of the gate"]
        parts += [
            f"{name.capitalize()}, {found['tokens']} tokens whose mean entropy is "
            f"{found['mean_entropy']:.2f} nats:",
            table(head, rows),
        ]
    return "\n\n".join([*parts, _machine(results)])


def costs(results: Results) -> str:
    """Time and memory of each k."""
    found = results["costs"]
    rows = [
        [
            k,
            *(f"{1e3 * found[way][k]['median']:.0f}" for way in found),
            *(f"{found[way][k]['peak_bytes'] / MIB:.0f}" for way in found),
        ]
        for k in found["gated_ce"]
    ]
    head = ["k", "`gated_ce`, ms", "eager, ms", "`gated_ce`, MiB", "eager, MiB"]
    size = f"Of {results['rows']} tokens in float32, with the vocabulary of {results['model']}:"
    return "\n\n".join([size, table(head, rows), _machine(results)])


def ends(results: Results, arm: str) -> str:
    """Where each loss ends at the first rate, as means over the seeds that were run."""
    preset = PRESETS[results["preset"]]
    rows = []
    base = _paths(results, arm, "sft", preset)
    if base:
        rows.append(["the base model", "", *_numbers(base, 0)])
    for loss in (*preset.losses, *preset.candidates):
        paths = _paths(results, arm, loss, preset)
        if paths:
            rows.append([LOSSES[loss].title, str(len(paths)), *_numbers(paths, -1)])
    head = ["loss", "seeds", "target", "what the base was sure of", "WikiText"]
    return table([*head, "KL, WikiText", "KL, target"], rows)


def verdicts(results: Results, arm: str) -> str:
    """Forgetting of each loss at equal target loss, as a share of that of cross-entropy.

    There is none for a loss that never came below the base model's target loss.
    """
    preset = PRESETS[results["preset"]]
    rows = []
    for loss in (*preset.losses, *preset.candidates):
        if loss == "sft" or not _paths(results, arm, loss, preset):
            continue
        found = comparison(results, arm, loss)
        of_seeds = [MISSING] * 4
        if found is not None:
            interval = f"{found.low:.2f} to {found.high:.2f}"
            of_seeds = [f"{found.ratio:.2f}", interval, f"{found.level:.3f}", str(found.seeds)]
        rows.append([LOSSES[loss].title, *of_seeds, *_frontiers(results, arm, loss, preset)])
    head = ["loss", "KL, share of SFT's", "95 %", "at target loss", "seeds"]
    return table([*head, "over rates", "at target loss", "rates"], rows)


def rates(results: Results) -> str:
    """Forgetting of cross-entropy and EAFT at each rate, where all of an arm have learned as much.

    Of seed 0. The level is the lowest that all of an arm have reached at their first checkpoint:
    at a lower one it would count how long each was trained. A rate at which one has not learned
    anything by then is left out.
    """
    preset = PRESETS[results["preset"]]
    losses = ("sft", "eaft")
    names = list(itertools.product(ARMS, losses))
    paths: dict[float, dict[tuple[str, str], Path]] = {}
    for rate in sorted(preset.rates):
        found = {of: path_of(results, Run(*of, rate, 0)) for of in names}
        learned = {of: p for of, p in found.items() if p and p.target()[1] < p.target()[0]}
        if len(learned) == len(names):
            paths[rate] = learned
    if not paths:
        return NOTHING
    rows = []
    for arm, loss in names:
        level = max(of[arm, other].target()[1] for of in paths.values() for other in losses)
        of_rates = [paths[rate][arm, loss] for rate in paths]
        kl = [forgetting_at(level, path.target(), path.kl()) for path in of_rates]
        title = f"{LOSSES[loss].title}, {arm}"
        rows.append([title, f"{level:.3f}", *(f"{one:.4f}" for one in kl)])
    return table(["KL, WikiText", "at target loss", *(f"rate {rate:g}" for rate in paths)], rows)


def edits(results: Results) -> str:
    """What each loss has learned of the counterfactual arm, and at what cost."""
    preset = PRESETS[results["preset"]]
    count = results["counts"].get("edited")
    rows: list[list[str]] = []
    for loss in (*preset.losses, *preset.candidates):
        run = results["runs"].get(Run(EDITED, loss, preset.rates[0], 0).name)
        path = path_of(results, Run(EDITED, loss, preset.rates[0], 0))
        if run is None or path is None:
            continue
        shown = [("the base model", 0)] if not rows else []
        for title, at in [*shown, (LOSSES[loss].title, -1)]:
            new, old = (
                sum(run["measured"][at][name]) / (sum(count) or np.nan)
                for name in ("new_nll", "old_nll")
            )
            others = path.target_nll[at].sum() - sum(run["measured"][at]["old_nll"])
            others /= path.target_tokens.sum() - sum(count)
            kl = f"{path.kl()[at]:.4f}"
            rows.append([title, f"{new:.3f}", f"{old:.3f}", f"{others:.3f}", kl])
    if not rows or not sum(count):
        return NOTHING
    head = ["loss", "nll of the new word", "of the old one", "of other tokens", "KL, WikiText"]
    return table(head, rows)


def beyond(results: Results) -> str:
    """Each loss beside cross-entropy and EAFT in both arms, and which lie ahead of both there."""
    preset = PRESETS[results["preset"]]
    rows, ahead = [], {"surely": [], "perhaps": []}
    for loss in (*preset.losses, *preset.candidates):
        found = [comparison(results, arm, loss, other) for other in ("sft", "eaft") for arm in ARMS]
        if loss in ("sft", "eaft") or not any(found):
            continue
        shown = (
            MISSING if one is None else f"{one.ratio:.2f} ({one.low:.2f} to {one.high:.2f})"
            for one in found
        )
        rows.append([LOSSES[loss].title, *shown])
        if all(one is not None and one.ratio < 1 for one in found):
            sure = all(one is not None and one.high < 1 for one in found)
            ahead["surely" if sure else "perhaps"].append(LOSSES[loss].title)
    head = [f"{arm}, {name}" for name in ("of SFT's", "of EAFT's") for arm in ARMS]
    surely, perhaps = (", ".join(ahead[name]) or "none" for name in ("surely", "perhaps"))
    return "\n\n".join(
        [
            table(["loss", *head], rows),
            f"Ahead of cross-entropy and of EAFT in both arms, with intervals below 1: {surely}. "
            f"With a ratio below 1 in all four: {perhaps}.",
        ]
    )


def comparison(results: Results, arm: str, loss: str, other: str = "sft") -> Comparison | None:
    """Against another loss at the first rate, over the seeds that both have."""
    preset = PRESETS[results["preset"]]
    pairs = []
    for seed in range(preset.seeds):
        pair = [path_of(results, Run(arm, name, preset.rates[0], seed)) for name in (loss, other)]
        if pair[0] is not None and pair[1] is not None:
            pairs.append((pair[0], pair[1]))
    return compare(pairs, np.random.default_rng(0)) if pairs else None


def precision(results: Results) -> str:
    """Whether bfloat16 changes what is found: one run each, in both."""
    preset = PRESETS[results["preset"]]
    rows = []
    for loss in preset.losses[:2]:
        runs = [Run("planted", loss, preset.rates[0], 0, kind) for kind in ("float32", "bfloat16")]
        paths = [path_of(results, run) for run in runs]
        rows += [
            [f"{LOSSES[loss].title}, {run.precision}", *_numbers([path], -1)]
            for run, path in zip(runs, paths, strict=True)
            if path is not None and None not in paths
        ]
    if not rows:
        return NOTHING
    head = ["", "target", "what the base was sure of", "WikiText", "KL, WikiText", "KL, target"]
    return table(head, rows)


def knowledge(results: Results) -> str:
    """Questions answered right before and after each loss, and by how much that differs.

    The intervals are of a bootstrap over the questions, paired, and over the seeds.
    """
    runs = results["runs"]
    if "base" not in runs:
        return NOTHING
    base = _right(results, [runs["base"]])
    count = base.shape[1]
    low, high = interval(base, np.random.default_rng(0))
    shown = f"{100 * base.mean():.1f} ({100 * low:.1f} to {100 * high:.1f})"
    rows = [["the base model", "", shown, "", ""]]
    for arm in ARMS:
        found = {
            loss: {
                run["seed"]: run
                for run in runs.values()
                if (run.get("arm"), run.get("loss")) == (arm, loss)
            }
            for loss in ("sft", "eaft")
        }
        seeds = sorted(set.intersection(*map(set, found.values())))
        if not seeds:
            continue
        right = {loss: _right(results, [found[loss][seed] for seed in seeds]) for loss in found}
        for loss, of_loss in right.items():
            changes = [_points(of_loss - base)]
            changes += [_points(of_loss - right["sft"]) if loss == "eaft" else ""]
            title = f"{LOSSES[loss].title}, {arm}"
            rows.append([title, str(len(seeds)), f"{100 * of_loss.mean():.1f}", *changes])
    head = ["", "seeds", f"% right of {count:,}", "points from the base", "from cross-entropy"]
    return "\n\n".join([table(head, rows), _machine(results)])


def _right(results: Results, runs: list[dict[str, Any]]) -> Array:
    """Whether each run chose the right answer: [runs, questions]."""
    chosen = np.array([list(run["chosen"]) for run in runs])
    return (chosen == np.array(list(results["right"]))).astype(np.float64)


def _points(differences: Array) -> str:
    """The mean over runs and questions, in points, with its interval."""
    low, high = interval(differences, np.random.default_rng(0))
    return f"{100 * differences.mean():+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def regions(results: Results) -> str:
    """The share of tokens in the corner of confident conflicts, and of the gradient by gate."""
    rows = []
    for name, found in results["runs"].items():
        for when in ("start", "end"):
            of = found[when]
            cells = [f"{name.split('-seed')[0]}, {when}", _corner(of["tokens"])]
            rows.append([*cells, *(_corner(of[gate]) for gate in _gates(of))])
    first = next(iter(results["runs"].values()))["start"]
    head = ["run", "of tokens", *(LOSSES[gate].title for gate in _gates(first))]
    return "\n\n".join([table(head, rows), _machine(results)])


def step(results: Results) -> str:
    """Seconds, memory and the largest batch of each way to compute the loss."""
    rows = [
        [
            "eager EAFT, float32 logits" if way == "eager" else f"`{way}`",
            f"{found['median']:.2f}",
            f"{found['bytes'] / MIB:.0f}",
            f"{found['largest'] * results['length']:,}"
            + (" or more" if found["largest"] == results["most"] else ""),
        ]
        for way, found in results["ways"].items()
    ]
    tokens = results["rows"] * results["length"]
    head = ["", f"seconds, {tokens:,} tokens", "peak, MiB", f"tokens in {results['gib']:g} GiB"]
    return "\n\n".join([table(head, rows), _machine(results)])


def dropping(results: Results) -> str:
    """Rows in the products, time and errors of each gate, text by text."""
    parts = []
    for name, found in results["texts"].items():
        rows = []
        for gate, of_gate in found["gates"].items():
            title = f"hard, {gate[4:]} % muted" if gate.startswith("hard") else LOSSES[gate].title
            rounding = " / ".join(f"{error:.1e}" for error in of_gate["rounding"])
            for share, of_share in of_gate["shares"].items():
                errors = " / ".join(f"{error:.1e}" for error in of_share["errors"])
                rows.append(
                    [
                        title,
                        share,
                        f"{100 * of_share['rows']:.1f} %",
                        f"{of_share['over products']:.2f}",
                        MISSING if share == "0" else errors,
                        rounding,
                    ]
                )
        head = ["gate", "`drop_below`", "rows", "time", "errors", "of bfloat16"]
        parts += [f"{name.capitalize()}, {results['tokens']:,} tokens:", table(head, rows)]
    return "\n\n".join([*parts, _machine(results)])


def muted(results: Results) -> str:
    """What is learned with every share of ``drop_below``, and whether that is what seeds differ by.

    The verdict is of each checkpoint: the mean over the seeds lies among the losses of the runs in
    which nothing was dropped, or not.
    """
    shares = seeds_of(results)
    exact = next(iter(shares.values()), [])
    if len(shares) < 2 or not exact:
        return NOTHING
    rows, outside = [], []
    for at, step in enumerate(one["step"] for one in exact[0]["measured"]):
        cells = [str(step)]
        for share, runs in shares.items():
            found = [run["measured"][at]["nll"] for run in runs]
            cells += [f"{np.mean(found):.4f}", f"{min(found):.4f} to {max(found):.4f}"]
            of_exact = [run["measured"][at]["nll"] for run in exact]
            if not min(of_exact) <= np.mean(found) <= max(of_exact):
                outside.append(f"{share} at step {step}")
        rows.append([*cells, f"{max(_differences(shares, at)):.4f}"])
    head = ["step"]
    for share, runs in shares.items():
        dropped = np.mean([run["steps"]["dropped"] for run in runs])
        head += [f"`drop_below` {share}: {100 * dropped:.1f} % of rows dropped", "seeds"]
    ends = [run["measured"][-1]["nll"] for run in exact]
    settings = results["settings"]
    text = (
        f"{results['model']} on EAFT, {len(exact[0]['steps']['loss'])} steps of AdamW at "
        f"{settings['rates'][0]:g} in {results['precision']}, answers of GSM8K in a step: "
        f"{settings['rows_a_step']}. Held-out cross-entropy in nats a token, as a mean over the "
        f"seeds, of which there are {len(exact)}, and their range. After the last step the runs of "
        f"one seed differ by up to {max(_differences(shares, -1)):.4f}"
    )
    if len(exact) == 1:
        text += "; one seed does not say by how much seeds do."
    else:
        text += f", and seeds by up to {max(ends) - min(ends):.4f}. "
        text += "The mean with rows dropped lies "
        where = f"outside the range of those without: {', '.join(outside)}."
        text += where if outside else "within the range of those without, at every step."
    shown = textwrap.fill(text, WIDTH, break_on_hyphens=False)
    return "\n\n".join([shown, table([*head, "same seed, at most"], rows), _machine(results)])


def seeds_of(results: Results) -> dict[str, list[Any]]:
    """The runs of each share, of the seeds that have run with all shares, in the same order."""
    by_share: dict[str, dict[int, Any]] = {}
    for run in results["runs"].values():
        by_share.setdefault(f"{run['drop_below']:g}", {})[run["seed"]] = run
    seeds = sorted(set.intersection(*map(set, by_share.values()))) if by_share else []
    return {share: [by_share[share][seed] for seed in seeds] for share in sorted(by_share)}


def _differences(shares: dict[str, list[Any]], at: int) -> list[float]:
    """How far apart the held-out losses of one seed are."""
    losses = [[run["measured"][at]["nll"] for run in runs] for runs in shares.values()]
    return [max(of_seed) - min(of_seed) for of_seed in zip(*losses, strict=True)]


def sentences(results: Results) -> str:
    """The verdict, for and against."""
    planted, natural = (comparison(results, arm, "eaft") for arm in ("planted", "natural"))
    if planted is None or natural is None:
        return NOTHING
    text = (
        f"Where a fifth of the labels that the model knows are wrong, EAFT forgets "
        f"{planted.ratio:.2f} times what cross-entropy does at equal target loss "
        f"({_certainty(planted)}). With the labels as they are, {natural.ratio:.2f} times "
        f"({_certainty(natural)}; {results['model']} on GSM8K)."
    )
    return textwrap.fill(text, WIDTH, break_on_hyphens=False)


def _certainty(found: Comparison) -> str:
    seeds = f"{found.seeds} seed{'s' if found.seeds > 1 else ''}"
    return f"95 %: {found.low:.2f} to {found.high:.2f}, {seeds}"


def study(results: Results) -> str:
    """What was run."""
    preset: Preset = PRESETS[results["preset"]]
    runs = results["runs"].values()
    minutes = sum(run["seconds"] for run in runs) / 60
    tokens = sum(sum(counts) for counts in results["counts"]["target"].values())
    begun = [
        sum(map(sum, run["measured"][0]["target_nll"].values())) / tokens
        for run in runs
        if run["precision"] == Run.precision
    ]
    text = (
        f"{len(runs)} runs of {results['model']}, {preset.measured_at[-1]} steps of "
        f"{preset.rows_a_step} answers, rates {', '.join(f'{rate:g}' for rate in preset.rates)}, "
        f"whose times add up to {minutes:.0f} minutes. A file that has some goes on wherever it "
        "is: named here is where it began. The base model's target loss, measured before each run, "
        "is "
        f"{min(begun):.4f} to {max(begun):.4f}."
    )
    return textwrap.fill(text, WIDTH, break_on_hyphens=False) + "\n\n" + _machine(results)


def _machine(results: Results) -> str:
    machine = results["machine"]
    return (
        f"*{machine['model']}, {machine['cores']} cores, torch {machine['torch']}, commit "
        f"{machine['commit']}, {machine['date'][:10]}.*"
    )


def _paths(results: Results, arm: str, loss: str, preset: Preset) -> list[Path]:
    found = (
        path_of(results, Run(arm, loss, preset.rates[0], seed)) for seed in range(preset.seeds)
    )
    return [path for path in found if path is not None]


def _numbers(paths: list[Path], at: int) -> list[str]:
    def mean(of: Callable[[Path], Any], digits: int) -> str:
        found = np.mean([of(path)[at] for path in paths])
        return MISSING if np.isnan(found) else f"{found:.{digits}f}"

    return [
        mean(Path.target, 3),
        mean(Path.sure, 3),
        mean(Path.other, 3),
        mean(Path.kl, 4),
        mean(Path.kl_target, 4),
    ]


def _frontiers(results: Results, arm: str, loss: str, preset: Preset) -> tuple[str, str, str]:
    """The ratio to cross-entropy of the least forgetting over rates, the level, and the rates.

    They are those that both were run at with seed 0; of one there is no frontier. The level is the
    lowest that both reach at the lowest rate, where they forget least: further on it would tell
    which of them was trained for longer.
    """
    pairs = {
        rate: [path_of(results, Run(arm, name, rate, 0)) for name in (loss, "sft")]
        for rate in preset.rates
    }
    rates = sorted(rate for rate, pair in pairs.items() if None not in pair)
    both = [[path for rate in rates if (path := pairs[rate][i])] for i in range(2)]
    if len(rates) < 2:
        return MISSING, MISSING, MISSING
    level = max(float(of[0].target().min()) for of in both)
    if level >= both[0][0].target()[0]:  # one has learned nothing
        return MISSING, MISSING, MISSING
    one, other = (frontier(level, of) for of in both)
    assert one is not None and other is not None
    return f"{one / other:.2f}", f"{level:.3f}", ", ".join(f"{rate:g}" for rate in rates)


def _gates(of: dict[str, Any]) -> Iterable[str]:
    return (name for name in of if name != "tokens")


def _corner(cells: list[list[float]]) -> str:
    """The share of the cells of confident conflicts: H below 0.3 ln k and p below 0.1."""
    total = sum(map(sum, cells))
    return f"{100 * (cells[0][0] + cells[1][0]) / total:.1f} %"
