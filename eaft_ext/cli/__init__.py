"""The command ``eaft-ext``."""
