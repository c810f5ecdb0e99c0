"""The loss in other people's training loops: one thin module for each training stack.

Each imports its stack where it needs it, so that importing a module here needs only torch.
"""
