"""Errors of the PyTorch storey."""


class Unsupported(RuntimeError):
    """An operation that cannot be compiled for the chip."""
