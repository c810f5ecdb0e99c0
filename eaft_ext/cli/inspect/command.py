"""The command: what it reads, what it is asked for, and what it leaves."""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import eaft_ext
from eaft_ext.cli.batches import Batch, Example, count_tokens, evaluation_rows
from eaft_ext.cli.console import make_console
from eaft_ext.cli.demo.corpus import language_reference
from eaft_ext.cli.errors import CommandError
from eaft_ext.cli.model import check_length, load, shown_name
from eaft_ext.cli.options import (
    add_reading,
    default_device,
    positive_float,
    positive_int,
    require_extras,
)
from eaft_ext.cli.records import read_records
from eaft_ext.cli.training_log import run_log

from .moved import moved
from .page import Report, write_page
from .pieces import Pieces
from .plot import write_plot
from .shares import Columns, gate_title
from .spool import Spool
from .table import most_muted, print_report
from .tokens import Reader, View, read

REQUIRED = ("transformers", "rich")
PLOTS = (".png", ".svg", ".pdf")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``eaft-ext inspect``."""
    add = parser.add_argument
    default = " (default: %(default)s)"
    add_reading(parser, data="plain text", rows="rows at a time")
    add(
        "--tokens",
        type=tokens,
        default=4096,
        metavar="N",
        help="tokens to read, with those of prompts, spread evenly over the data; or all" + default,
    )
    add("--show", type=positive_int, default=12, metavar="N", help="muted tokens shown" + default)
    add("--html", type=Path, metavar="FILE", help="write a page to browse: plane, gates, texts")
    add("--plot", type=Path, metavar="FILE", help="draw the plane into this PNG, SVG or PDF")
    add("--output", type=Path, metavar="FILE", help="write every token to this JSONL file")
    add(
        "--against",
        metavar="NAME",
        help="a second model, such as --model after tuning: what it thinks of the same tokens, in "
        "rows made as for --model",
    )
    add(
        "--log",
        type=Path,
        metavar="DIR",
        help="in place of a text: show what a training with EAFTCallback has logged in this folder",
    )
    add("--alpha", type=positive_float, default=1.0, help="exponent of the gate" + default)
    add(
        "--normalizer",
        type=positive_float,
        help="what the entropy is divided by (default: ln k, as in the paper)",
    )


def tokens(text: str) -> int:
    """A whole number from 1, or all."""
    if text == "all":
        return sys.maxsize
    try:
        return positive_int(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, and it is not all") from None


def run(arguments: argparse.Namespace) -> int:
    """Read the text with the model, or the log of a training, and show what the gate does."""
    if arguments.log is not None:
        return _show_log(arguments)
    require_extras(REQUIRED)
    _check_files(arguments)
    console = make_console()
    records = read_records(arguments.data) if arguments.data else language_reference().train
    readers, tokenizer = _readers(arguments, console)
    length = arguments.sequence_length
    rows = evaluation_rows(
        records, tokenizer, length=length, max_tokens=arguments.tokens, turns=arguments.turns
    )
    pieces = readers[0].pieces
    within = count_tokens(rows)
    if not any(any(row.learned) for row in rows):
        raise CommandError(
            f"the {within} tokens that were read are all of a prompt: pass more --tokens"
        )
    with _spool(arguments) as spool:
        _read(rows, readers, spool, arguments, console)
        columns = [Columns.of(views, readers[0].k) for views in _views(spool, len(readers))]
        gate = readers[0].gate
        names = [shown_name(arguments.model)]
        names += [shown_name(arguments.against)] if arguments.against else []
        source = str(arguments.data or "the Python language reference")
        predicted = len(columns[0])
        all_of_it = f", all that rows of {length} have" if within < arguments.tokens else ""
        title = (
            f"{names[0]}, {predicted} tokens of {source}, {gate_title(gate)}\n"
            f"{within} tokens were read{all_of_it}; {within - predicted} are of prompts, or begin "
            "a row, and are not predicted."
        )
        print_report(console, title, columns[0], gate, most_muted(spool, arguments.show))
        if arguments.plot is not None:
            write_plot(columns[0], gate, f"{names[0]} on {source}", arguments.plot)
        if arguments.html is not None:
            facts = {
                "data": source,
                "tokens predicted": f"{predicted:,}",
                "tokens read": f"{within:,}{all_of_it}",
                "texts": f"{len(rows):,}",
                "gate": gate_title(gate),
                "k, largest logits of the entropy": str(readers[0].k),
                "eaft_ext": eaft_ext.__version__,
            }
            report = Report(f"{' and '.join(names)} on {Path(source).name}", facts, gate, names)
            change = moved(*columns) if arguments.against else None
            write_page(report, columns[0], change, rows, spool, pieces, arguments.html)
        spool.complete()
    for file in (arguments.output, arguments.plot, arguments.html):
        if file is not None:
            console.print(f"wrote {file}", highlight=False, markup=False)
    return 0


def _show_log(arguments: argparse.Namespace) -> int:
    for name in ("model", "data", "against", "html", "output"):
        if getattr(arguments, name) is not None:
            raise CommandError(f"--log has a table and a --plot: leave --{name} out")
    _check_files(arguments)
    run_log(arguments.log, arguments.plot, make_console())
    return 0


def _check_files(arguments: argparse.Namespace) -> None:
    names = ("data", "output", "html", "plot")
    files = {name: file for name in names if (file := getattr(arguments, name)) is not None}
    for name, file in files.items():
        if name != "data" and (file.is_dir() or not file.parent.is_dir()):
            raise CommandError(f"cannot write --{name} {file}: not a file in a folder that exists")
    for (one, file), (other, its_file) in combinations(files.items(), 2):
        if file.resolve() == its_file.resolve():
            raise CommandError(f"--{one} and --{other} are the same file, {file}")
    plot: Path | None = arguments.plot
    if plot is not None and plot.suffix.lower() not in PLOTS:
        raise CommandError(f"--plot must end in {', '.join(PLOTS)}, got {plot}")
    if arguments.html is not None or plot is not None:
        require_extras(("matplotlib",))


def _readers(arguments: argparse.Namespace, console: Any) -> tuple[list[Reader], Any]:
    """A reader for each model, and the first one's tokenizer, whose words the second has too."""
    on = arguments.device or default_device()
    gate = eaft_ext.EntropyGate(arguments.alpha, arguments.normalizer)
    readers = []
    tokenizers = []
    names = [arguments.model] + ([arguments.against] if arguments.against else [])
    for name in names:
        with console.status("loading the model"):
            model, tokenizer = load(name)
        check_length(arguments.sequence_length, model)
        model.to(on).eval()
        vocabulary = int(model.config.get_text_config().vocab_size)
        readers.append(Reader(model, Pieces(tokenizer), min(arguments.k, vocabulary), gate))
        tokenizers.append(tokenizer)
    if tokenizers[0].get_vocab() != tokenizers[-1].get_vocab():
        raise CommandError(
            f"--against {arguments.against}: its tokenizer is another than that of "
            f"{shown_name(arguments.model)}, so that their tokens cannot be compared"
        )
    return readers, tokenizers[0]


@contextlib.contextmanager
def _spool(arguments: argparse.Namespace) -> Iterator[Spool]:
    """Where the tokens go: to --output, or to a file beside the page while it is made."""
    settings = {
        name: str(value)
        for name, value in sorted(vars(arguments).items())
        if name not in ("output", "html", "plot", "show", "run", "program")
    }
    settings["version"] = eaft_ext.__version__
    for name in ("data", "model", "against"):
        settings[name] += _state_of(getattr(arguments, name))
    if arguments.output is not None:
        yield Spool(arguments.output, settings)
        return
    product: Path | None = arguments.html or arguments.plot
    with tempfile.TemporaryDirectory() as scratch:
        beside = product.with_name(product.name + ".tokens") if product else None
        spool = Spool(beside or Path(scratch) / "tokens", settings)
        yield spool
        spool.path.unlink(missing_ok=True)


def _state_of(name: Path | str | None) -> str:
    """Sizes and times of the files that are there; another state of them is other data."""
    if name is None:
        return ""
    path = Path(name)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    states = ((file.name, file.stat()) for file in files if file.exists())
    return "".join(f", {name} {state.st_size} {state.st_mtime_ns}" for name, state in states)


def _read(
    rows: list[Example],
    readers: list[Reader],
    spool: Spool,
    arguments: argparse.Namespace,
    console: Any,
) -> None:
    """Read the rows that the file does not have, with progress and the time that is left."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    on = arguments.device or default_device()

    def look(batch: Batch) -> list[tuple[View, ...]]:
        return list(zip(*(reader(batch.to(on)) for reader in readers), strict=True))

    if spool.rows:
        console.print(
            f"{spool.rows} of {len(rows)} rows are in {spool.path} already: going on from there",
            highlight=False,
            markup=False,
        )
    columns = (TextColumn("reading"), BarColumn(), MofNCompleteColumn(), TextColumn("rows"))
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        task = progress.add_task("", total=len(rows), completed=spool.rows)
        for begin in range(spool.rows, len(rows), arguments.batch_size):
            some = rows[begin : begin + arguments.batch_size]
            spool.append(read(some, begin, readers[0].pieces, look), len(some))
            progress.update(task, completed=spool.rows)


def _views(spool: Spool, count: int) -> Iterator[Iterator[View]]:
    """The views of each model, of all tokens."""
    yield (token.view for token in spool)
    if count > 1:
        yield (token.after for token in spool if token.after is not None)
