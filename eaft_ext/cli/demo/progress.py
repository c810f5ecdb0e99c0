"""Live progress: bars on a terminal, one line for each step elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from .training import Run


class Progress:
    """Shows runs as they advance; use it as a context manager."""

    def __init__(self, console: Any, steps: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        self._console = console
        self._steps = steps
        self._tasks: dict[str, Any] = {}
        self._bars = Bars(
            TextColumn("{task.description:<5}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[state]}"),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def say(self, message: str) -> None:
        """Print a line above the bars."""
        self._console.print(message, highlight=False, markup=False)

    def update(self, run: Run) -> None:
        """Show where ``run`` stands; called after every step and every measurement."""
        if not run.steps:
            return
        step, measured = run.steps[-1], run.evaluations[-1]
        state = f"loss {step.loss:.3f}  held-out {measured.target_loss:.3f}"
        state += f"  drift {measured.drift_kl:.4f}"
        if self._console.is_terminal:
            if run.name not in self._tasks:
                self._tasks[run.name] = self._bars.add_task(
                    run.name, total=self._steps, state=state
                )
            self._bars.update(self._tasks[run.name], completed=step.step, state=state)
        elif measured.step == step.step:
            self.say(f"{run.name:<5} step {step.step}/{self._steps}  measured: {state}")
        else:
            self.say(f"{run.name:<5} step {step.step}/{self._steps}  {state}")
