"""What compute-sanitizer looks for in sanitize.py: the tools and their options."""

from __future__ import annotations

from dataclasses import dataclass

ERROR_STATUS = 9
FIRST_PORT = 49152

# The mangled names of our kernels have the namespace in them. Other libraries' kernels, cuBLAS's
# above all, have more barriers than a tool can follow.
OURS = ("--kernel-name", "kernel_substring=eaft_ext")
# Those that bring rows by bulk copies, in gated_ce_forward_with_grad.cuh.
STAGED = "kernel_substring=_staged_"
# In a block. The compiler cannot tell how many a loop makes, and where the tool has to guess, it is
# said to guess too few. kMaxStagedTiles of staged_span.cuh is 19.
BARRIERS = ("--num-cuda-barriers", "64")


@dataclass(frozen=True)
class Watch:
    """A run of a tool; one that does not count is told of, and fails nothing."""

    tool: str
    options: tuple[str, ...] = ()
    counts: bool = True

    def command(self, program: str, port: int) -> list[str]:
        """The tool's call, less the program that it watches."""
        status = str(ERROR_STATUS)
        return [
            *(program, "--tool", self.tool, "--print-limit", "20", "--error-exitcode", status),
            *("--port", str(port), *self.options),
        ]


WATCHES = {
    # Calls that may fail are checked by who calls: a launch that is tried, say.
    "memcheck": Watch("memcheck", ("--padding", "64", "--report-api-errors", "no")),
    "racecheck": Watch("racecheck", (*OURS, "--kernel-name-exclude", STAGED, *BARRIERS)),
    # The tool is said to take what a bulk copy writes for a race with who has waited for it in a
    # loop; its release notes list mends of that up to 2026.3.
    "racecheck of bulk copies": Watch("racecheck", ("--kernel-name", STAGED, *BARRIERS), False),
    "synccheck": Watch("synccheck", (*OURS, *BARRIERS)),
    "initcheck": Watch("initcheck"),
}
