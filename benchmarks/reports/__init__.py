"""What is made of result files: figures, promises, tables."""
