"""How the compiled part of eaft_ext was built, and its limits."""

MIN_TOP_K: int
MAX_TOP_K: int

def build_info() -> dict[str, str]:
    """How the compiled part was built, as strings."""
