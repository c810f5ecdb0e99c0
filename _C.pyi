"""The compiled part of eaft_ext: its operators, ``torch.ops.eaft_ext.*``."""

MIN_TOP_K: int
MAX_TOP_K: int

def build_info() -> dict[str, str]:
    """How this module was built, as strings."""
