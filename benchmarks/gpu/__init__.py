"""What gpu_check.py alone needs."""
