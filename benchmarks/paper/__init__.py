"""The claims of the EAFT paper, measured: ``python benchmarks/paper COMMAND --help``."""
