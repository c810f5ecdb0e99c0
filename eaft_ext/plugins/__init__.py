"""Files that training stacks load by their path, each in a folder of its own."""
