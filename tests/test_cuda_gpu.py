"""The operators on a GPU: graphs, streams, devices, memory, the generator, against the CPU and the emulated kernels.

Values, gradients, layouts, tracing and transforms on a GPU are the tests of the operators with `--backend=cuda`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import backends
import numpy as np
import pytest
import torch
from cases import BY_NAME
from numerics import (
    DATA,
    GRADIENT_NAMES,
    assert_equal,
    expect_forward,
    expect_gradients,
    integers,
    operands,
    operator_arguments,
    run,
)
from torch import Tensor

import pyconv
from pyconv import reference
from pyconv.functional import bias_act_dropout, conv_max_pool2d, dropout

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not backends.gpu_available(), reason="needs a GPU and a pyconv built with CUDA"),
]

TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

PRECISIONS = {
    "float32": (torch.float32, False),
    "tf32": (torch.float32, True),
    "bfloat16": (torch.bfloat16, False),
    "float16": (torch.float16, False),
    "float64": (torch.float64, False),
}
NAMES = ("L1", "L2", "CIFAR64", "K-33", "pool-overlap", "groups-2", "window-300")


@pytest.fixture(autouse=True)
def _explicit_devices(_unchanged_process_state: None) -> None:
    """As most programs run: a default device is a mode, with which calls take the longer way through torch.ops."""
    torch.set_default_device(None)


def on_gpu(*tensors: Tensor) -> list[Tensor]:
    return [t.cuda() for t in tensors]


def on_cpu(*tensors: Tensor) -> list[Tensor]:
    return [t.cpu() for t in tensors]


def need_free_memory(gigabytes: float) -> None:
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes} GiB of GPU memory, but {free:.1f} are free")


# ------------------------------------------------------------------------------------------------------------
# Against the emulated kernels and the CPU's
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not backends.LIBRARY.exists(), reason=backends.NO_LIBRARY)
@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "channels_last"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", NAMES)
def test_emulated_kernels_give_what_the_gpu_gives(name: str, precision: str, channels_last: bool) -> None:
    """Integers: the same bits, argmax included. Others: within the bound around the exact result."""
    dtype, torch.backends.cudnn.allow_tf32 = PRECISIONS[precision]
    pyconv.set_isa(backends.EMULATION)
    case = BY_NAME[name].with_batch(2)
    for make in (lambda *args: integers(*args, largest=1), DATA["signed"]):
        exact = make is not DATA["signed"]
        input, weight, bias, grad_output = on_cpu(*operands(case, dtype, make))
        if channels_last:
            input = input.contiguous(memory_format=torch.channels_last)
        arguments = {"activation": "relu", **case.kwargs()}
        call = operator_arguments(input, weight, bias, **arguments)
        emulated = torch.ops.pyconv._conv_max_pool2d_forward(*call)
        gpu_tensors = on_gpu(input, weight, bias)
        real = torch.ops.pyconv._conv_max_pool2d_forward(*gpu_tensors, *call[3:])
        output, argmax = on_cpu(*real[:2])
        if exact:
            assert_equal(output, emulated[0], "output")
            assert_equal(argmax, emulated[1], "argmax")
        else:
            expect_forward(input, weight, bias, **arguments).check(output, "output of the GPU")
        # Both backwards get the same choice of maxima.
        mask = (True, True, True)
        emulated_gradients = torch.ops.pyconv._conv_max_pool2d_backward(
            grad_output, input, weight, emulated[1], emulated[2], *call[3:], mask
        )
        real_gradients = torch.ops.pyconv._conv_max_pool2d_backward(
            grad_output.cuda(), *gpu_tensors[:2], emulated[1].cuda(), real[2], *call[3:], mask
        )
        expected = expect_gradients(emulated[1], grad_output, input, weight, bias, **arguments)
        for i, gradient_name in enumerate(GRADIENT_NAMES):
            if exact:
                assert_equal(real_gradients[i].cpu(), emulated_gradients[i], f"gradient of {gradient_name}")
            else:
                expected[i].check(real_gradients[i].cpu(), f"gradient of {gradient_name} of the GPU")


@pytest.mark.parametrize("p", [0.5, 0.25, 0.3, 0.999])
@pytest.mark.parametrize("numel", [1, 17, 4099, 1_000_003])
def test_mask_is_the_cpus_for_the_same_state(numel: int, p: float) -> None:
    for seed, offset in ((5, 0), (-0x123456789ABCDEF1, 0x7FEDCBA987654321)):
        masks = [
            torch.ops.pyconv.dropout_with_state(torch.ones(numel, device=device), p, False, seed, offset)
            for device in ("cpu", "cuda")
        ]
        assert_equal(masks[1].cpu(), masks[0], "mask")


@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_bias_act_dropout_with_the_cpus_mask(activation: str) -> None:
    input, bias = torch.randn(65, 129), torch.randn(129)
    state = torch.tensor([7, 11])
    outputs = [
        torch.ops.pyconv._bias_act_dropout(input.to(d), bias.to(d), state.to(d), activation, 0.3, 1 / 0.7).cpu()
        for d in ("cpu", "cuda")
    ]
    torch.testing.assert_close(outputs[1], outputs[0])
    assert torch.equal(outputs[1] == 0, outputs[0] == 0)


# ------------------------------------------------------------------------------------------------------------
# The generator
# ------------------------------------------------------------------------------------------------------------


def default_generator() -> torch.Generator:
    """Of the current GPU, whatever the backend of the other tests is."""
    current = torch.cuda.current_device()  # before the tuple is looked up: this fills it
    return torch.cuda.default_generators[current]


@pytest.mark.parametrize("default", [True, False])
@pytest.mark.parametrize("p", [0.5, 0.3])
def test_a_call_takes_the_generators_state_and_advances_it_by_4(p: float, default: bool) -> None:
    generator = default_generator() if default else torch.Generator("cuda").manual_seed(1234567)
    input = torch.ones(1000, device="cuda")
    for draw in (dropout, bias_act_dropout):
        seed, offset = generator.initial_seed(), generator.get_offset()
        output = draw(input, p=p, inverted=False, generator=None if default else generator)
        expected = reference.dropout_mask((1000,), p, seed, offset).float()
        assert_equal(output.cpu(), expected, "mask")
        assert generator.get_offset() == offset + 4


def test_state_is_saved_and_restored() -> None:
    input = torch.ones(1000, device="cuda")
    torch.cuda.manual_seed(3)
    state = torch.cuda.get_rng_state()
    first, second = dropout(input), dropout(input)
    assert not torch.equal(first, second)
    torch.cuda.manual_seed(3)
    assert torch.equal(dropout(input), first)
    torch.cuda.set_rng_state(state)
    assert torch.equal(dropout(input), first)
    with torch.random.fork_rng(devices=[torch.cuda.current_device()]):
        assert torch.equal(dropout(input), second)
    assert torch.equal(dropout(input), second)


def test_the_cpus_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    dropout(torch.ones(1000, device="cuda"))
    assert torch.equal(torch.get_rng_state(), before)


def test_no_draw_where_nothing_is_random() -> None:
    input = torch.ones(10, device="cuda")
    before = default_generator().get_offset()
    for p, training in ((0.0, True), (1.0, True), (0.5, False)):
        dropout(input, p, training)
        bias_act_dropout(input, activation="relu", p=p, training=training)
    assert default_generator().get_offset() == before


def test_generator_of_another_device() -> None:
    with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator but found 'cpu'"):
        dropout(torch.ones(3, device="cuda"), generator=torch.Generator())


# ------------------------------------------------------------------------------------------------------------
# CUDA graphs
# ------------------------------------------------------------------------------------------------------------


def captured(function: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """The graph of `function` and the tensors that each replay writes, after a warm-up on another stream.

    A capture begins by writing seeds and offsets on its stream, so the stream of the replays must wait for it.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        tensors = function()
    torch.cuda.current_stream().wait_stream(side)
    return graph, tensors


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["L1", "L2", "CIFAR64", "pool-overlap", "window-300"])
def test_graph_of_forward_and_backward_takes_fresh_values(name: str, precision: str) -> None:
    dtype, torch.backends.cudnn.allow_tf32 = PRECISIONS[precision]
    case = BY_NAME[name].with_batch(4)
    *fixed, grad_output = on_gpu(*operands(case, dtype, DATA["signed"]))

    def step(tensors: list[Tensor], upstream: Tensor) -> list[Tensor]:
        output, gradients = run(conv_max_pool2d, *tensors, upstream, activation="tanh", **case.kwargs())
        return [output, *gradients]

    graph, written = captured(lambda: step(fixed, grad_output))
    for seed in (1, 2):
        fresh = on_gpu(*operands(case, dtype, DATA["signed"], seed))
        for place, values in zip((*fixed, grad_output), fresh, strict=True):
            place.copy_(values)
        graph.replay()
        for replayed, eager in zip(written, step(fresh[:3], fresh[3]), strict=True):
            assert torch.equal(replayed, eager)


def dropped_twice(input: Tensor, p: float) -> list[Tensor]:
    """Two draws in one step, and the gradient, which recomputes both masks."""
    leaf = input.detach().requires_grad_()
    output = bias_act_dropout(dropout(leaf, p), activation="relu", p=p)
    return [output.detach(), *torch.autograd.grad(output, leaf, torch.ones_like(output))]


@pytest.mark.parametrize("p", [0.5, 0.3])
def test_graph_replays_draw_new_masks_and_those_of_eager_mode_for_the_same_seed(p: float) -> None:
    input = torch.ones(4000, device="cuda")
    graph, written = captured(lambda: dropped_twice(input, p))
    torch.cuda.manual_seed(17)
    replays = []
    for _ in range(3):
        graph.replay()
        replays.append([t.clone() for t in written])
    torch.cuda.manual_seed(17)
    for replay in replays:
        for actual, expected in zip(replay, dropped_twice(input, p), strict=True):
            assert torch.equal(actual, expected)
    assert not torch.equal(replays[0][0], replays[1][0])
    assert not torch.equal(replays[1][0], replays[2][0])


def test_graph_with_a_generator_of_its_own() -> None:
    input = torch.ones(4000, device="cuda")
    generator = torch.Generator("cuda").manual_seed(5)
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)
    dropout(input, generator=generator)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        output = dropout(input, generator=generator)
    torch.cuda.synchronize()  # as in `captured`
    generator.manual_seed(6)
    replays = []
    for _ in range(2):
        graph.replay()
        replays.append(output.clone())
    generator.manual_seed(6)
    for replay in replays:
        assert torch.equal(replay, dropout(input, generator=generator))


def test_make_graphed_callables() -> None:
    def model() -> torch.nn.Module:
        torch.manual_seed(1)
        return torch.nn.Sequential(
            pyconv.ConvMaxPool2d(1, 20, 5, activation="relu"),
            pyconv.ConvMaxPool2d(20, 40, 5, activation="tanh"),
            torch.nn.Flatten(),
            pyconv.LinearActDropout(640, 100, activation="relu"),
            torch.nn.Linear(100, 10),
        ).cuda()

    eager = model()
    sample = torch.randn(10, 1, 28, 28, device="cuda")
    graphed = torch.cuda.make_graphed_callables(model(), (sample,))
    for _ in range(2):
        input = torch.randn(10, 1, 28, 28, device="cuda")
        outputs = []
        for network in (eager, graphed):
            network.zero_grad(set_to_none=True)
            outputs.append(network(input))
            outputs[-1].square().sum().backward()
        torch.testing.assert_close(outputs[1], outputs[0])
        for ours, theirs in zip(graphed.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)


# ------------------------------------------------------------------------------------------------------------
# Streams and devices
# ------------------------------------------------------------------------------------------------------------

SLEEP_CYCLES = 100_000_000
"""Some 50 ms on any GPU: long enough for a kernel on a wrong stream to run before what it must wait for."""


def test_kernels_run_on_the_current_stream() -> None:
    """The values arrive late on another stream; an event is all that orders the two."""
    case = BY_NAME["L2"]
    *values, grad_output = on_gpu(*operands(case, torch.float32, DATA["signed"]))
    expected, expected_gradients = run(conv_max_pool2d, *values, grad_output, **case.kwargs())
    late = [torch.zeros_like(t) for t in (*values, grad_output)]
    torch.cuda.synchronize()
    producer, consumer = torch.cuda.Stream(), torch.cuda.Stream()
    arrived = torch.cuda.Event()
    with torch.cuda.stream(producer):
        torch.cuda._sleep(SLEEP_CYCLES)
        for place, value in zip(late, (*values, grad_output), strict=True):
            place.copy_(value)
        arrived.record()
    with torch.cuda.stream(consumer):
        consumer.wait_event(arrived)
        output, gradients = run(conv_max_pool2d, *late[:3], late[3], **case.kwargs())
    torch.cuda.synchronize()
    for actual, exact in zip((output, *gradients), (expected, *expected_gradients), strict=True):
        assert torch.equal(actual, exact)


def test_dropout_runs_on_the_current_stream() -> None:
    late = torch.zeros(100_000, device="cuda")
    dropout(late)  # the first launch of a kernel loads it, and waits
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP_CYCLES)
        late.fill_(1)
        output = dropout(late)
    torch.cuda.synchronize()
    assert set(output.unique().tolist()) == {0.0, 2.0}


def test_operators_do_not_synchronise() -> None:
    case = BY_NAME["L2"]
    *tensors, grad_output = on_gpu(*operands(case, torch.float32, DATA["signed"]))
    features = torch.randn(10, 100, device="cuda", requires_grad=True)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(conv_max_pool2d, *tensors, grad_output, activation="relu", **case.kwargs())
        bias_act_dropout(dropout(features), activation="gelu", p=0.5).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@TWO_GPUS
@pytest.mark.parametrize("current", [0, 1])
def test_tensors_of_another_device_than_the_current(current: int) -> None:
    case = BY_NAME["L2"]
    tensors = operands(case, torch.float32, integers)
    with torch.cuda.device(current):
        per_device = []
        for index in (0, 1):
            *moved, grad_output = (t.to(f"cuda:{index}") for t in tensors)
            output, gradients = run(conv_max_pool2d, *moved, grad_output, activation="relu", **case.kwargs())
            assert {t.device.index for t in (output, *gradients)} == {index}
            assert torch.cuda.current_device() == current
            per_device.append(on_cpu(output, *gradients))
            torch.cuda.manual_seed_all(3)
            mask = dropout(torch.ones(1000, device=f"cuda:{index}"))
            assert mask.device.index == index
            assert_equal(mask.cpu(), 2 * reference.dropout_mask((1000,), 0.5, 3).float(), "mask")
    for first, second in zip(*per_device, strict=True):
        assert torch.equal(first, second)


@TWO_GPUS
def test_operands_on_two_gpus_are_refused() -> None:
    input, weight = torch.zeros(1, 1, 8, 8, device="cuda:0"), torch.zeros(4, 1, 3, 3, device="cuda:1")
    with pytest.raises(RuntimeError, match="same device"):
        conv_max_pool2d(input, weight)
    with pytest.raises(RuntimeError, match="same dtype and device"):
        bias_act_dropout(torch.zeros(3, 4, device="cuda:0"), torch.zeros(4, device="cuda:1"))


@pytest.mark.usefixtures("cudnn")
@pytest.mark.parametrize("requires_grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("on_the_cpu", ["input", "weight", "bias"])
def test_operands_on_cpu_and_gpu_are_refused(on_the_cpu: str, requires_grad: bool) -> None:
    tensors = {"input": torch.zeros(2, 3, 8, 8), "weight": torch.zeros(4, 3, 3, 3), "bias": torch.zeros(4)}
    tensors = {name: t if name == on_the_cpu else t.cuda() for name, t in tensors.items()}
    tensors["weight"].requires_grad_(requires_grad)
    with pytest.raises(RuntimeError) as expected:
        torch.nn.functional.conv2d(**tensors)
    with pytest.raises(RuntimeError) as actual:
        conv_max_pool2d(**tensors)
    assert str(actual.value).splitlines()[0] == str(expected.value).splitlines()[0]


def test_bias_act_dropout_on_cpu_and_gpu_is_refused() -> None:
    with pytest.raises(RuntimeError, match="same dtype and device.*cuda.*cpu"):
        bias_act_dropout(torch.zeros(3, 4, device="cuda"), torch.zeros(4))


# ------------------------------------------------------------------------------------------------------------
# Determinism
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "channels_last"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["L1", "L2", "CIFAR64", "KSH5", "window-300"])
def test_ten_runs_give_the_same_bits(name: str, precision: str, channels_last: bool) -> None:
    dtype, torch.backends.cudnn.allow_tf32 = PRECISIONS[precision]
    case = BY_NAME[name].with_batch(16)
    *tensors, grad_output = on_gpu(*operands(case, dtype, DATA["signed"]))
    if channels_last:
        tensors[0] = tensors[0].contiguous(memory_format=torch.channels_last)
    first: list[Tensor] = []
    for _ in range(10):
        output, gradients = run(conv_max_pool2d, *tensors, grad_output, activation="silu", **case.kwargs())
        first = first or [output, *gradients]
        for again, before in zip((output, *gradients), first, strict=True):
            assert torch.equal(again, before)


def test_ten_runs_of_bias_act_dropout_give_the_same_bits() -> None:
    input, grad_output = torch.randn(2, 3000, 500, device="cuda")
    bias = torch.randn(500, device="cuda")
    first: list[Tensor] = []
    for _ in range(10):
        torch.cuda.manual_seed(1)
        leaves = [t.detach().requires_grad_() for t in (input, bias)]
        output = bias_act_dropout(*leaves, activation="gelu", p=0.3)
        now = [output.detach(), *torch.autograd.grad(output, leaves, grad_output)]
        first = first or now
        assert all(torch.equal(again, before) for again, before in zip(now, first, strict=True))


# ------------------------------------------------------------------------------------------------------------
# Memory
# ------------------------------------------------------------------------------------------------------------


def requested_bytes(which: str = "current") -> int:
    """What is asked of the allocator. What it hands out is more, by up to a MiB a block, depending on its cache."""
    return torch.cuda.memory_stats()[f"requested_bytes.all.{which}"]


def peak_bytes(step: Callable[[], object]) -> int:
    """The most bytes that `step` has requested beyond what was there before it."""
    torch.cuda.synchronize()
    before = requested_bytes()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return requested_bytes("peak") - before


@pytest.mark.parametrize("activation", ["none", "relu"])
def test_one_byte_an_output_element_is_kept_for_the_backward(activation: str) -> None:
    case = BY_NAME["CIFAR64"]
    tensors = [t.requires_grad_() for t in on_gpu(*operands(case, torch.float32, DATA["signed"])[:3])]
    torch.cuda.synchronize()
    before = requested_bytes()
    output = conv_max_pool2d(*tensors, activation=activation, **case.kwargs())
    assert requested_bytes() - before == output.numel() * (output.element_size() + 1)


@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "channels_last"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_inference_allocates_the_output_and_a_small_workspace_only(precision: str, channels_last: bool) -> None:
    """And for the tensor cores the input once more, where its channels do not lie side by side."""
    dtype, torch.backends.cudnn.allow_tf32 = PRECISIONS[precision]
    case = BY_NAME["CIFAR64"].with_batch(128)
    tensors = on_gpu(*operands(case, dtype, DATA["signed"])[:3])
    if channels_last:
        tensors[0] = tensors[0].contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        peak = peak_bytes(lambda: conv_max_pool2d(*tensors, activation="relu", **case.kwargs()))
    elements = int(np.prod(case.output_shape)) + 2 * int(np.prod(case.weight_shape))
    if not channels_last and precision not in ("float32", "float64"):
        elements += tensors[0].numel()
    assert peak <= elements * tensors[0].element_size() + (1 << 20)


@pytest.mark.usefixtures("cudnn")
def test_peak_of_a_training_step_is_at_most_a_quarter_of_torchs() -> None:
    """The first layer of AlexNet at a batch of 128: torch writes the whole convolution and its gradient.

    Operands are there before, and the gradients must be written by whatever computes them; the rest counts.
    """
    need_free_memory(8)
    case = BY_NAME["KSH1"].with_batch(128)
    *tensors, grad_output = on_gpu(*operands(case, torch.float32, DATA["signed"]))

    def peak(function: Callable[..., Tensor]) -> int:
        def step() -> None:
            run(function, *tensors, grad_output, activation="relu", **case.kwargs())

        step()
        return peak_bytes(step) - sum(t.numel() * t.element_size() for t in tensors)

    assert peak(conv_max_pool2d) <= peak(reference.conv_max_pool2d) / 4


# ------------------------------------------------------------------------------------------------------------
# Beyond 2**31 elements
# ------------------------------------------------------------------------------------------------------------


def test_input_of_more_than_2_to_the_31_elements() -> None:
    """The last image, all of whose elements lie beyond, gives what it gives alone."""
    need_free_memory(40)
    N, size = 33, 8192
    input = torch.zeros(N, 1, size, size, dtype=torch.float16, device="cuda")
    assert input[:-1].numel() >= 2**31
    generator = torch.Generator("cuda").manual_seed(0)
    input[-1] = torch.randint(-2, 3, (1, size, size), generator=generator, device="cuda").half()
    weight = torch.randint(-2, 3, (8, 1, 3, 3), generator=generator, device="cuda").half()
    arguments = {"padding": 1, "pool_size": 4, "activation": "relu"}
    results = []
    for images in (input, input[-1:].clone()):
        leaves = [images.detach().requires_grad_(), weight.detach().requires_grad_()]
        output = conv_max_pool2d(*leaves, **arguments)
        # A few positions only, so that the sums of the weight's gradient are exact in float16.
        grad_output = torch.zeros_like(output)
        grad_output[-1, :, -8:, -8:] = 1
        gradients = torch.autograd.grad(output, leaves, grad_output)
        results.append((output.detach()[-1], gradients[0][-1], gradients[1]))
        del output, grad_output, gradients
    for among_others, alone, what in zip(*results, ("output", "gradient of input", "gradient of weight")):
        assert torch.equal(among_others, alone), what


def test_dropout_of_more_than_2_to_the_31_elements() -> None:
    need_free_memory(16)
    numel, tail = 2**31 + 4096, 1600
    output = torch.ops.pyconv.dropout_with_state(
        torch.ones(numel, dtype=torch.float16, device="cuda"), 0.5, False, 11, 3
    )
    blocks = np.arange((numel - tail) // 16, numel // 16, dtype=np.uint64)
    counter = np.zeros((len(blocks), 4), dtype=np.uint32)
    counter[:, 0], counter[:, 2] = blocks, 3
    draws = reference.philox4x32(counter, (11, 0)).reshape(-1).view(np.uint8)
    assert_equal(output[-tail:].cpu(), torch.from_numpy((draws >= 128).astype(np.float16)), "mask")


# ------------------------------------------------------------------------------------------------------------
# compute-sanitizer
# ------------------------------------------------------------------------------------------------------------

SANITIZER = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"

SMALL_PROGRAM = """
import torch
from pyconv.functional import bias_act_dropout, conv_max_pool2d
torch.manual_seed(0)
for dtype, tf32 in ((torch.float32, False), (torch.float32, True), (torch.bfloat16, False), (torch.float16, False),
                    (torch.float64, False)):
    torch.backends.cudnn.allow_tf32 = tf32
    for shape, filters, arguments in (
        ((2, 1, 12, 12), (20, 1, 5, 5), {}),
        ((2, 20, 12, 12), (40, 20, 5, 5), {}),
        ((2, 16, 9, 11), (33, 16, 3, 3), {"padding": 1, "pool_size": 3, "pool_stride": 2}),
        ((2, 3, 9, 9), (5, 3, 3, 3), {"pool_dilation": 2}),
    ):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(shape, device="cuda").to(dtype).contiguous(memory_format=memory_format).requires_grad_()
            w = torch.randn(filters, device="cuda").to(dtype).requires_grad_()
            b = torch.randn(filters[0], device="cuda").to(dtype).requires_grad_()
            conv_max_pool2d(x, w, b, activation="relu", **arguments).sum().backward()
    x = torch.randn(7, 133, device="cuda").to(dtype).requires_grad_()
    b = torch.randn(133, device="cuda").to(dtype).requires_grad_()
    for p in (0.5, 0.3):
        bias_act_dropout(x, b, activation="gelu", p=p).sum().backward()
torch.cuda.synchronize()
print("finished")
"""


@pytest.mark.skipif(not Path(SANITIZER).exists(), reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer_finds_nothing(tool: str) -> None:
    """Each allocation has a block of its own, so that a step beyond it is seen.

    Errors of API calls are not reported: torch tries out what a driver can do, and the operators raise on their own.
    """
    process = subprocess.run(
        [SANITIZER, "--tool", tool, "--report-api-errors", "no", "--error-exitcode", "86"]
        + [sys.executable, "-c", SMALL_PROGRAM],
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    messages = process.stdout[-4000:] + process.stderr[-4000:]
    if "Device not supported" in messages:
        pytest.skip("compute-sanitizer does not support this device")
    assert process.returncode == 0, messages
    assert "finished" in process.stdout
