"""compile_training on a GPU: `make test-gpu`. What needs none is in tests/test_captured_training.py."""

from __future__ import annotations

import copy
import math

import backends
import pytest
import torch
from torch import nn
from training_support import SETTINGS, difference, eager_step, make_model, mini_batch

import pyconv
from pyconv import lowering
from pyconv.training import CapturedStep

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not backends.gpu_available(), reason="needs a GPU and a build with CUDA"),
]


@pytest.fixture(autouse=True)
def _tensors_are_made_on_the_cpu():
    """As in a user's script, whatever the other tests of the backend want."""
    torch.set_default_device("cpu")


def on_gpu(n: int, seed: int, dtype=torch.float64) -> list[torch.Tensor]:
    return [t.cuda() for t in mini_batch(n, seed, dtype)]


def make_pair(dtype=torch.float64, **settings):
    """The same model twice, each with its optimizer, and the step of the second."""
    models = [make_model(dtype).cuda()]
    models.append(copy.deepcopy(models[0]))
    optimizers = [torch.optim.SGD(m.parameters(), **settings) for m in models]
    step = pyconv.compile_training(models[1], optimizer=optimizers[1])
    assert isinstance(step, CapturedStep)
    return models, optimizers, step


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_steps_of_a_sequential_model(settings: dict) -> None:
    """The eager model draws the same masks: one operator call for each dropout, in the same order."""
    models, optimizers, step = make_pair(**settings)
    losses = []
    for i, n in enumerate([8] * 10 + [3, 8, 13, 1, 3, 3, 3, 3, 3]):
        x, y = on_gpu(n, i)
        torch.cuda.manual_seed(i)
        expected = eager_step(models[0], optimizers[0], x, y)
        torch.cuda.manual_seed(i)
        losses.append((step(x, y), expected))
    for loss, expected in losses:
        assert loss.device == expected.device and loss.dtype == expected.dtype
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    for e, p in zip(*(m.parameters() for m in models), strict=True):
        assert difference(p.cpu(), e.cpu()) <= 1e-9


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)])
def test_replays_from_common_parameters(dtype: torch.dtype, bound: float) -> None:
    """Against the same operators called one by one, which choose the same maxima."""
    models, optimizers, step = make_pair(dtype, lr=0.1, weight_decay=0.01)
    for i in range(20):
        with torch.no_grad():
            for p, e in zip(models[1].parameters(), models[0].parameters(), strict=True):
                p.copy_(e)
        for group in (o.param_groups[0] for o in optimizers):
            group["lr"] = 0.1 * 0.9**i
        x, y = on_gpu(8, i, dtype)
        torch.cuda.manual_seed(i)
        eager_step(lambda x: lowering.execute(lowering.lower(models[0]), x), optimizers[0], x, y)
        torch.cuda.manual_seed(i)
        step(x, y)
        for e, p in zip(*(m.parameters() for m in models), strict=True):
            assert difference(p.cpu(), e.cpu()) <= bound


def test_masks_differ_from_replay_to_replay() -> None:
    _, _, step = make_pair(torch.float32, lr=0.0)
    x, y = on_gpu(8, 0, torch.float32)
    assert len({step(x, y).item() for _ in range(12)}) > 6


def test_a_step_does_not_wait_for_the_gpu() -> None:
    _, _, step = make_pair(torch.float32, lr=0.1, momentum=0.9)
    x, y = on_gpu(8, 0, torch.float32)
    for _ in range(6):
        step(x, y)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = [step(x, y) for _ in range(5)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(math.isfinite(loss.item()) for loss in losses)


@pytest.mark.parametrize("steps_before", [0, 2, 8])
def test_a_loss_that_is_not_finite_is_told_by_a_later_step(steps_before: int) -> None:
    models, _, step = make_pair(torch.float32, lr=0.1, momentum=0.9)
    x, y = on_gpu(8, 0, torch.float32)
    for _ in range(steps_before):
        step(x, y)
    before = [p.detach().clone() for p in models[1].parameters()]
    losses = [step(x * math.nan, y)]
    with pytest.raises(FloatingPointError, match="the parameters are as the step before left them"):
        for _ in range(1000):
            losses.append(step(x, y))
    assert all(math.isnan(loss.item()) for loss in losses)
    assert all(torch.equal(p, b) for p, b in zip(models[1].parameters(), before, strict=True))
    assert math.isfinite(step(x, y).item())


def test_on_a_stream_of_the_users() -> None:
    models, optimizers, step = make_pair(lr=0.1)
    stream = torch.cuda.Stream()
    batches = [on_gpu(8, i) for i in range(8)]
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for i, (x, y) in enumerate(batches):
            torch.cuda.manual_seed(i)
            step(x, y)
    torch.cuda.synchronize()
    for i, (x, y) in enumerate(batches):
        torch.cuda.manual_seed(i)
        eager_step(models[0], optimizers[0], x, y)
    for e, p in zip(*(m.parameters() for m in models), strict=True):
        assert difference(p.cpu(), e.cpu()) <= 1e-9


def test_a_graph_held_by_the_user_does_not_disturb_the_capture() -> None:
    """A loss with its autograd graph, made on the default stream, that lives on."""
    models, _, step = make_pair(torch.float32, lr=0.1)
    x, y = on_gpu(8, 0, torch.float32)
    held = nn.functional.cross_entropy(models[1](x), y)
    losses = [step(x, y) for _ in range(8)]
    assert all(math.isfinite(loss.item()) for loss in losses) and held.requires_grad


def test_examples_from_the_cpu() -> None:
    models, _, step = make_pair(torch.float32, lr=0.1)
    before = [p.detach().clone() for p in models[1].parameters()]
    for i in range(6):
        assert step(*mini_batch(8, i, torch.float32)).is_cuda
    assert not any(torch.equal(p, b) for p, b in zip(models[1].parameters(), before, strict=True))
