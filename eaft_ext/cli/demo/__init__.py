"""``eaft-ext demo``: plain cross-entropy and EAFT side by side on a real model and real text."""
