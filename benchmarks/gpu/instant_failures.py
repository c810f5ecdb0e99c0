"""A pytest plugin that shows each failure as it happens: what runs into a limit has no end."""

from __future__ import annotations

import pytest

MOST_CHARACTERS = 4000
MOST_FAILURES = 30


class InstantFailures:
    """Writes to the terminal what pytest would write at the end."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._count = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called in the main process, also for what the workers of xdist report."""
        terminal = self._config.pluginmanager.get_plugin("terminalreporter")
        if not report.failed or terminal is None or self._count >= MOST_FAILURES:
            return
        self._count += 1
        text = report.longreprtext
        terminal.write_line(f"\n>>> {report.nodeid}\n{text[-MOST_CHARACTERS:]}\n<<<")


def pytest_configure(config: pytest.Config) -> None:
    """Not in a worker: it has no terminal."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(InstantFailures(config), "instant_failures_reporter")
