"""Shared by the tests of dropout and bias_act_dropout: the mask that a call must use."""

from __future__ import annotations

import backends
import torch
from torch import Tensor

from pyconv import reference


def default_generator() -> torch.Generator:
    """What a call without a generator draws from."""
    if backends.device().type == "cuda":
        current = torch.cuda.current_device()  # before the tuple is looked up: this fills it
        return torch.cuda.default_generators[current]
    return torch.default_generator


def new_generator(seed: int = 0) -> torch.Generator:
    return torch.Generator(backends.device()).manual_seed(seed)


def next_state(generator: torch.Generator) -> dict[str, int]:
    """The seed and offset that the next drawing call would use, by the names that the reference gives them.

    On the CPU the seed is drawn and the offset is 0; a GPU's generator is itself a seed and an offset. `generator` is
    left as it is.
    """
    if generator.device.type == "cuda":
        return {"seed": generator.initial_seed(), "offset": generator.get_offset()}
    twin = torch.Generator("cpu")
    twin.set_state(generator.get_state())
    seed = torch.empty((), dtype=torch.int64, device="cpu").random_(-(2**63), None, generator=twin)
    return {"seed": int(seed), "offset": 0}


def next_state_in_a_transform() -> dict[str, int]:
    """`next_state` of the default generator under torch.func: on a GPU the seed is drawn there as on the CPU."""
    generator = default_generator()
    if generator.device.type == "cpu":
        return next_state(generator)
    twin = torch.Generator(generator.device)
    twin.set_state(generator.get_state())
    lowest = -(2**63)
    drawn = torch.randint(
        lowest, 2**63 - 1, (1,), generator=twin, device=generator.device, dtype=torch.int64
    ).bitwise_xor(lowest)
    return {"seed": int(drawn), "offset": 0}


def mask_of(shape: tuple[int, ...], p: float, seed: int, offset: int = 0) -> Tensor:
    """`reference.dropout_mask` on the device of the tests."""
    return reference.dropout_mask(shape, p, seed, offset).to(backends.device())


def kept(shape: tuple[int, ...], p: float, generator: torch.Generator | None = None) -> Tensor:
    """The mask that the next drawing call must use: bool, True where an element is kept."""
    return mask_of(shape, p, **next_state(generator or default_generator()))
