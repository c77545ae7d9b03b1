"""Callbacks for `Network.SGD`. A callback is any function of an epoch's record, see `History`."""

from __future__ import annotations

import os
from typing import Any


class TensorBoard:
    """Writes what an epoch measured as scalars for TensorBoard, one for each number, with the epoch as step.

    Args:
        directory: of the event files; a training that goes on may go on in the same one.

    Raises:
        ImportError: tensorboard is not installed.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            if error.name != "tensorboard":
                raise
            raise ImportError("TensorBoard needs tensorboard: pip install tensorboard") from None
        self._writer = SummaryWriter(os.fspath(directory))

    def __call__(self, record: dict[str, Any]) -> None:
        for key, value in record.items():
            if key != "epoch" and value is not None:
                self._writer.add_scalar(key, value, record["epoch"])
        self._writer.flush()
