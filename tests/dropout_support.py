"""Shared by the tests of dropout and bias_act_dropout: the mask that a call must use."""

from __future__ import annotations

import torch
from torch import Tensor

from pyconv import reference


def next_seed(generator: torch.Generator) -> int:
    """The seed that the next drawing call would take from `generator`, which is left as it is."""
    twin = torch.Generator()
    twin.set_state(generator.get_state())
    return int(torch.empty((), dtype=torch.int64).random_(-(2**63), None, generator=twin))


def kept(shape: tuple[int, ...], p: float, generator: torch.Generator) -> Tensor:
    """The mask that the next drawing call must use: bool, True where an element is kept."""
    return reference.dropout_mask(shape, p, next_seed(generator))
