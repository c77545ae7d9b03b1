"""pyconv.compile_training on the CPU against the eager steps of plain PyTorch models."""

from __future__ import annotations

import copy
import threading
import time
import warnings

import pytest
import torch
from torch import nn
from training_support import (
    SETTINGS,
    assert_same_parameters,
    difference,
    eager_step,
    make_model,
    mini_batch,
    step_both,
)

import pyconv


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_steps_of_a_sequential_model(settings: dict) -> None:
    eager = make_model()
    compiled = copy.deepcopy(eager)
    optimizers = [torch.optim.SGD(m.parameters(), **settings) for m in (eager, compiled)]
    schedulers = [torch.optim.lr_scheduler.StepLR(o, 4, 0.5) for o in optimizers]
    step = pyconv.compile_training(compiled, loss="cross_entropy", optimizer=optimizers[1])
    for i, n in enumerate([8] * 10 + [3, 8, 13, 1]):
        expected, loss = step_both(eager, optimizers[0], step, i, n)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for scheduler in schedulers:
                scheduler.step()
    assert_same_parameters(compiled, eager)
    states = [[o.state[p].get("momentum_buffer") for p in o.param_groups[0]["params"]] for o in optimizers]
    for buffer, expected in zip(states[1], states[0], strict=True):
        assert (buffer is None) == (expected is None)
        if buffer is not None:
            assert difference(buffer, expected) <= 1e-9


def test_eager_and_compiled_steps_take_turns() -> None:
    eager = make_model()
    mixed = copy.deepcopy(eager)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (eager, mixed)]
    step = pyconv.compile_training(mixed, optimizer=optimizers[1])
    for i in range(6):
        x, y = mini_batch(8, i)
        torch.manual_seed(i)
        eager_step(eager, optimizers[0], x, y)
        torch.manual_seed(i)
        step(x, y) if i % 2 else eager_step(mixed, optimizers[1], x, y)
    assert_same_parameters(mixed, eager)


def test_two_groups_and_parameters_left_out() -> None:
    eager = make_model()
    compiled = copy.deepcopy(eager)

    def optimizer(model):
        linear = model[7]
        return torch.optim.SGD(
            [{"params": [linear.weight], "lr": 0.2}, {"params": [linear.bias, model[11].weight]}], lr=0.05
        )

    optimizers = [optimizer(m) for m in (eager, compiled)]
    step = pyconv.compile_training(compiled, optimizer=optimizers[1])
    for i in range(5):
        step_both(eager, optimizers[0], step, i)
    assert_same_parameters(compiled, eager)


def test_the_plan_of_a_step_says_what_took_how_long() -> None:
    model = make_model()
    step = pyconv.compile_training(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(RuntimeError, match="expected a step before its plan is asked for"):
        step.plan()
    for i in range(3):
        step(*mini_batch(8, i))
    table = step.plan()
    assert table.mini_batches == 3
    assert all(0 < row["forward_seconds"] < 1 for row in table.rows)
    assert "forward us" in str(table) and "conv_max_pool2d 6x2x3x3" in str(table)


def test_a_first_loss_that_is_not_finite_leaves_no_momentum() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, dampening=0.5)
    step = pyconv.compile_training(model, optimizer=optimizer)
    x, y = mini_batch(8, 0)
    with pytest.raises(FloatingPointError, match="the loss of step 0 is nan"):
        step(x * float("nan"), y)
    assert not any(optimizer.state[p].get("momentum_buffer") is not None for p in model.parameters())


def test_a_loss_that_is_not_finite_changes_nothing() -> None:
    model = make_model()
    step = pyconv.compile_training(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    x, y = mini_batch(8, 0)
    step(x, y)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(FloatingPointError, match="the loss of step 1 is nan"):
        step(x * float("nan"), y)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.BatchNorm2d(6), r"module 1 \(BatchNorm2d"),
        (nn.MaxPool2d(2), r"module 1 \(MaxPool2d"),
        (nn.GELU(approximate="tanh"), r"module 1 \(GELU"),
        (nn.Flatten(2), r"module 1 \(Flatten\)"),
        (nn.Conv2d(6, 6, 3, padding=1, padding_mode="reflect"), "padding_mode 'reflect'"),
        (nn.Sequential(nn.Identity(), nn.LayerNorm(5)), r"module 1\.1 \(LayerNorm"),
    ],
)
def test_what_is_unsupported_is_named(module: nn.Module, message: str) -> None:
    model = nn.Sequential(nn.Conv2d(2, 6, 3), module, nn.Flatten(), nn.Linear(600, 5))
    if isinstance(module, nn.MaxPool2d):
        model[0] = nn.Dropout()
    with pytest.raises(pyconv.UnsupportedError, match=message):
        pyconv.compile_training(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))


def test_shared_parameters_are_refused() -> None:
    shared = nn.Linear(4, 4)
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    for model in (nn.Sequential(shared, nn.ReLU(), shared), tied):
        with pytest.raises(pyconv.UnsupportedError, match="is also the weight of module 0 .*shared parameters"):
            pyconv.compile_training(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))


def test_the_same_activation_twice_is_two_modules() -> None:
    relu = nn.ReLU()
    eager = nn.Sequential(nn.Linear(4, 9), relu, nn.Linear(9, 9), relu, nn.Linear(9, 3)).double()
    compiled = copy.deepcopy(eager)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.5) for m in (eager, compiled)]
    step = pyconv.compile_training(compiled, optimizer=optimizers[1])
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 3
    for _ in range(5):
        eager_step(eager, optimizers[0], x, y)
        step(x, y)
    assert_same_parameters(compiled, eager)


def test_an_own_forward_is_refused_and_a_plain_subclass_is_not() -> None:
    class Twice(nn.Sequential):
        def forward(self, x):
            return 2 * super().forward(x)

    class Plain(nn.Sequential):
        pass

    model = Twice(nn.Linear(4, 3))
    with pytest.raises(pyconv.UnsupportedError, match=r"the model \(Twice\) has a forward of its own"):
        pyconv.compile_training(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    model = Plain(nn.Linear(4, 3))
    pyconv.compile_training(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))


def test_changes_of_the_model_between_steps_are_seen() -> None:
    eager = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Dropout(0.0), nn.Linear(9, 3)).double()
    compiled = copy.deepcopy(eager)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.5) for m in (eager, compiled)]
    step = pyconv.compile_training(compiled, optimizer=optimizers[1])
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 3
    step(x, y)
    eager_step(eager, optimizers[0], x, y)
    for model in (eager, compiled):
        model[1] = nn.Tanh()
        model[0].bias.requires_grad_(False)
    step(x, y)
    eager_step(eager, optimizers[0], x, y)
    assert_same_parameters(compiled, eager)
    compiled[2].p = 1.0
    assert step(x, y) != eager_step(eager, optimizers[0], x, y)
    compiled[2].eval()
    with pytest.raises(pyconv.UnsupportedError, match=r"module 2 \(Dropout\) is in evaluation mode"):
        step(x, y)
    compiled[2].train()
    compiled[3].weight.register_hook(lambda g: 0 * g)
    with pytest.raises(pyconv.UnsupportedError, match=r"weight of module 3 \(Linear\) has hooks"):
        step(x, y)


def test_optimizers_that_would_do_something_else_are_refused() -> None:
    model, other = nn.Sequential(nn.Linear(4, 3)), nn.Linear(4, 3)
    with pytest.raises(pyconv.UnsupportedError, match="the optimizer has none of the model's parameters"):
        pyconv.compile_training(model, optimizer=torch.optim.SGD(other.parameters(), lr=0.1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = pyconv.compile_training(model, optimizer=optimizer)
    optimizer.register_step_pre_hook(lambda *_: None)
    with pytest.raises(pyconv.UnsupportedError, match="the optimizer has hooks"):
        step(torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64))


def test_examples_that_do_not_fit_are_described() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step = pyconv.compile_training(model, optimizer=optimizer)
    y = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=r"expected x of dtype torch.float32 .* but got torch.float64"):
        step(torch.zeros(2, 4, dtype=torch.float64), y)
    with pytest.raises(RuntimeError, match="with at least one example, but got"):
        step(torch.zeros(0, 4), y[:0])
    with pytest.raises(TypeError, match="expected x to be a tensor, but got list"):
        step([[0.0] * 4], y)
    mixed = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3).double())
    with pytest.raises(pyconv.UnsupportedError, match="expected parameters of one dtype and device"):
        pyconv.compile_training(mixed, optimizer=torch.optim.SGD(mixed.parameters(), lr=0.1))


def test_momentum_buffers_follow_their_parameters() -> None:
    """An eager step may leave other strides, and .double() another dtype."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(16, 3))
    eager = copy.deepcopy(model).double()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (eager, model)]
    x, y = torch.randn(5, 1, 4, 4).contiguous(memory_format=torch.channels_last), torch.arange(5) % 3
    for m, optimizer in zip((eager, model), optimizers, strict=True):
        eager_step(m, optimizer, x.to(m[0].weight.dtype), y)
    step = pyconv.compile_training(model, optimizer=optimizers[1])
    state = optimizers[1].state[model[3].weight]
    state["momentum_buffer"] = state["momentum_buffer"].t().contiguous().t()
    for _ in range(2):
        eager_step(eager, optimizers[0], x.double(), y)
        step(x, y)
        assert_same_parameters(model, eager, 1e-6)
    model.double()
    eager_step(eager, optimizers[0], x.double(), y)
    step(x.double(), y)
    assert_same_parameters(model, eager, 1e-6)
    assert all(optimizers[1].state[p]["momentum_buffer"].dtype == torch.float64 for p in model.parameters())


def test_a_first_step_that_raises_leaves_no_momentum() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, dampening=0.5)
    step = pyconv.compile_training(model, optimizer=optimizer)
    for labels in (torch.tensor([0, 3]), torch.tensor([0, 1], dtype=torch.int32), torch.tensor([0, 1, 2])):
        with pytest.raises((ValueError, RuntimeError)):
            step(torch.zeros(2, 4), labels)
        assert not any("momentum_buffer" in optimizer.state[p] for p in model.parameters())


def test_a_step_in_inference_mode_leaves_ordinary_state() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step = pyconv.compile_training(model, optimizer=optimizer)
    x, y = torch.randn(2, 4), torch.tensor([0, 1])
    with torch.inference_mode():
        assert not step(torch.randn(2, 4), y).is_inference()
    eager_step(model, optimizer, x, y)


def test_steps_from_two_threads_follow_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of mini-batches whose size grows, so that each makes a new plan; each step is given time to be interrupted."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    step = pyconv.compile_training(model, optimizer=torch.optim.SGD(model.parameters(), lr=1e-3))
    x, y = torch.randn(900, 64), torch.randint(10, (900,))
    losses: list[torch.Tensor] = []
    inside: list[int] = []
    one_step = step._step

    def watched(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        inside.append(len(x))
        time.sleep(0.001)
        assert len(inside) == 1, "two steps at a time"
        inside.clear()
        return one_step(x, y)

    monkeypatch.setattr(step, "_step", watched)

    def work(n: int) -> None:
        for i in range(100):
            losses.append(step(x[: n + i], y[: n + i]))

    threads = [threading.Thread(target=work, args=(n,)) for n in (5, 700)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(losses) == 200 and all(loss.isfinite() for loss in losses)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m[0], "padding", (0, 0)),
        lambda m: setattr(m[1], "approximate", "tanh"),
        lambda m: setattr(m[0], "dilation", (2, 2)),
    ],
    ids=["padding", "approximate", "dilation"],
)
def test_settings_changed_between_steps_are_seen_or_refused(change) -> None:
    eager = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.GELU(), nn.Flatten(), nn.Linear(75, 4)).double()
    eager[3] = nn.LazyLinear(4, dtype=torch.float64)
    x, y = torch.randn(3, 1, 5, 5, dtype=torch.float64), torch.arange(3)
    with pytest.raises(pyconv.UnsupportedError, match=r"module 3 \(LazyLinear\) is not initialised"):
        pyconv.compile_training(eager, optimizer=torch.optim.SGD(eager[0].parameters(), lr=0.1))
    eager[3] = nn.Linear(75, 4).double()
    compiled = copy.deepcopy(eager)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (eager, compiled)]
    step = pyconv.compile_training(compiled, optimizer=optimizers[1])
    step(x, y)
    eager_step(eager, optimizers[0], x, y)
    for model in (eager, compiled):
        change(model)
    try:
        expected = eager_step(eager, optimizers[0], x, y)
    except RuntimeError:
        with pytest.raises(pyconv.UnsupportedError):
            step(x, y)
    else:
        try:
            torch.testing.assert_close(step(x, y), expected, rtol=1e-12, atol=0)
        except pyconv.UnsupportedError as error:
            assert "GELU" in str(error)


def test_what_runs_beside_the_modules_is_refused() -> None:
    def optimizer_of(model: nn.Module) -> torch.optim.SGD:
        return torch.optim.SGD(model.parameters(), lr=0.1)

    model = nn.Sequential(nn.Linear(4, 3), nn.Identity())
    model[1].register_forward_hook(lambda *_: None)
    with pytest.raises(pyconv.UnsupportedError, match=r"module 1 \(Identity\) has hooks"):
        pyconv.compile_training(model, optimizer=optimizer_of(model))
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight.data = model[0].weight.data
    with pytest.raises(pyconv.UnsupportedError, match="shared parameters"):
        pyconv.compile_training(model, optimizer=optimizer_of(model))
    model = nn.Sequential(nn.Linear(4, 3))
    optimizer = optimizer_of(model)
    step = pyconv.compile_training(model, optimizer=optimizer)
    optimizer.param_groups[0]["maximize"] = True
    with pytest.raises(pyconv.UnsupportedError, match="maximize"):
        step(torch.zeros(2, 4), torch.tensor([0, 1]))
    optimizer.param_groups[0]["maximize"] = False
    with pytest.raises(pyconv.UnsupportedError, match="expected a fully connected layer before the loss"):
        pyconv.compile_training(nn.Sequential(), optimizer=optimizer)


def test_hooks_and_parametrizations_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = model[1].register_forward_hook(lambda *_: None)
    with pytest.raises(pyconv.UnsupportedError, match=r"module 1 \(ReLU\) has hooks"):
        pyconv.compile_training(model, optimizer=optimizer)
    handle.remove()
    nn.utils.parametrizations.weight_norm(model[0])
    with pytest.raises(pyconv.UnsupportedError, match=r"module 0 .* is parametrized"):
        pyconv.compile_training(model, optimizer=optimizer)


def test_refusals_of_arguments() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(ValueError, match="expected a torch.optim.SGD, the only optimizer supported, but got Adam"):
        pyconv.compile_training(model, optimizer=torch.optim.Adam(model.parameters()))
    with pytest.raises(ValueError, match="maximize"):
        pyconv.compile_training(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1, maximize=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="loss must be 'cross_entropy'.*but got 'mse'"):
        pyconv.compile_training(model, loss="mse", optimizer=optimizer)
    with pytest.raises(pyconv.UnsupportedError, match="expected an nn.Sequential.*but got Linear"):
        pyconv.compile_training(model[0], optimizer=optimizer)
    step = pyconv.compile_training(model, optimizer=optimizer)
    with pytest.raises(pyconv.UnsupportedError, match=r"expected 4 inputs of a fully connected layer, but got \(5,\)"):
        step(torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="labels from 0 to 2, but got 3 at index 1"):
        step(torch.zeros(2, 4), torch.tensor([0, 3]))
    model.eval()
    with pytest.raises(RuntimeError, match="call model.train()"):
        step(torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64))
