"""How it is measured: clock, memory, rounds, processes, and the result file that grows."""
