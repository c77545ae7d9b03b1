"""Random distortions of images of 1x28x28: pyconv beside batched PyTorch, each with random numbers of its own."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import peers
from benchmarks.timing import Candidate
from pyconv import RandomDistortion, reference

SIZE = 28
BATCHES = (10, 1000)
AFFINE = {"shift": 2.0, "rotation": 10.0, "scale": 0.1}
SETTINGS = {"affine": AFFINE, "affine and elastic": {**AFFINE, "elastic": 34.0}}
_TOLERANCE = 1e-4
"""Coordinates of up to 28 pixels in float32."""


class TorchDistortion:
    """The distortion by affine_grid and grid_sample, whole batches at once."""

    def __init__(self, shift: float, rotation: float, scale: float, elastic: float = 0.0, elastic_sigma: float = 4.0):
        self.shift, self.rotation, self.scale, self.elastic = shift, math.radians(rotation), scale, elastic
        half = reference.gaussian_half(elastic_sigma, SIZE).float()
        distance = (torch.arange(SIZE)[:, None] - torch.arange(SIZE)).abs()
        self.band = torch.where(distance < len(half), half[distance.clamp(max=len(half) - 1)], 0.0)

    def __call__(self, images: Tensor) -> Tensor:
        n = len(images)
        fields = torch.empty(n, 2, SIZE, SIZE).uniform_(-1.0, 1.0) if self.elastic else None
        return self.distorted(images, torch.empty(n, 5).uniform_(-1.0, 1.0), fields)

    def distorted(self, images: Tensor, draws: Tensor, fields: Tensor | None) -> Tensor:
        """draws (n, 5), from -1 to 1: shift down and to the right, rotation, scale of height and of width."""
        down, right, turn, height, width = draws.unbind(1)
        to_unit = 2.0 / (SIZE - 1)  # from pixels to grid_sample's coordinates, -1 to 1
        angle, scale_h, scale_w = turn * self.rotation, 1.0 + height * self.scale, 1.0 + width * self.scale
        sine, cosine = angle.sin(), angle.cos()
        linear = torch.stack([cosine / scale_w, -sine / scale_w, sine / scale_h, cosine / scale_h], 1).view(-1, 2, 2)
        shift = torch.stack([right, down], 1) * (self.shift * to_unit)
        theta = torch.cat([linear, -linear @ shift[:, :, None]], 2)
        grid = F.affine_grid(theta, [len(images), 1, SIZE, SIZE], align_corners=True)
        if fields is not None:
            smoothed = self.band @ fields @ self.band
            grid = grid + smoothed.flip(1).permute(0, 2, 3, 1) * (self.elastic * to_unit)
        return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=True)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_random_distortion(measure, suite, threads: int, settings: dict[str, float], batch: int) -> None:
    torch.set_num_threads(threads)
    images = torch.rand(batch, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(batch)
    ours, theirs = RandomDistortion((1, SIZE, SIZE), **settings), TorchDistortion(**settings)
    pair = {**settings, "shift": (settings["shift"],) * 2}
    exact = reference.random_distortion(images.double(), positions, **pair)
    draws = reference.distortion_draws(positions, (SIZE, SIZE), (1, 1), 0.0, seed=0, epoch=0)

    def check_peer() -> None:
        numbers = torch.cat([draws.shift, draws.rotation[:, None], draws.scale], 1).float()
        fields = draws.fields.float() if theirs.elastic else None
        peers.check_close(theirs.distorted(images, numbers, fields), exact, _TOLERANCE, "the peer's output")

    def candidate(name: str, role: str, run: Callable[[], Tensor], check: Callable[[], None], **more) -> Candidate:
        return Candidate(name, role, run, threads=threads, check=check, **more)

    found = [
        candidate(
            "pyconv", "ours", lambda: ours.apply(images, positions),
            lambda: peers.check_close(ours.apply(images, positions), exact, _TOLERANCE, "the output"),
        ),
        candidate("torch eager", "peer", lambda: theirs(images), check_peer),
    ]  # fmt: skip
    # At ten images it is the calls that cost, and compiling takes the suite's time.
    for mode in suite.compile_modes if batch == max(BATCHES) else ():
        compiled = torch.compile(theirs, mode=mode, fullgraph=True, dynamic=False)
        run = functools.partial(compiled, images)
        found.append(candidate(peers.COMPILE_MODES[mode], "peer", run, check_peer, compile_mode=mode))
    measure(
        found,
        "random_distortion",
        shape=next(name for name, wanted in SETTINGS.items() if wanted is settings),
        batch=batch,
        precision="float32",
        phase="forward",
        threads=threads,
    )
