"""Exceptions of pyconv. PyTorch is not needed to import this module."""


class DataError(ValueError):
    """A data file is truncated, foreign or inconsistent; the message names the file, what was expected and
    found."""
