"""dropout: the mask against a numpy Philox, the generator, values, derivatives, tracing and errors."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from backends import device, every_isa, supported_isas, use_isa
from dropout_support import default_generator, kept, mask_of, new_generator, next_state, next_state_in_a_transform
from numerics import DTYPES, assert_equal, dtype_name
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import pyconv
from pyconv import reference
from pyconv.functional import bias_act_dropout, dropout

PROBABILITIES = (0.5, 0.25, 1 / 256, 255 / 256, 0.3, 1e-3, 0.999)
"""The first four draw 8 bits an element, the others 32."""

EVERY_ISA = pytest.mark.parametrize("isa", every_isa())
CPU_ISAS = pytest.mark.parametrize("isa", supported_isas())


# ------------------------------------------------------------------------------------------------------------
# The mask
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF, 0xFFFFFFFF),
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_reference_philox_known_answers(
    counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    """The vectors of Random123, tests/kat_vectors."""
    words = reference.philox4x32(np.array([counter], dtype=np.uint32), key)
    assert words[0].tolist() == list(expected)


@EVERY_ISA
@pytest.mark.parametrize("p", PROBABILITIES)
@pytest.mark.parametrize("numel", [1, 3, 4, 15, 16, 17, 511, 2049, 70001])
def test_mask_is_that_of_numpy_philox(isa: str, numel: int, p: float) -> None:
    use_isa(isa)
    seed, offset = -0x123456789ABCDEF1, 0x7FEDCBA987654321
    output = torch.ops.pyconv.dropout_with_state(torch.ones(numel), p, False, seed, offset)
    assert_equal(output, mask_of((numel,), p, seed, offset).float(), "mask")


@EVERY_ISA
@pytest.mark.parametrize("p", [0.5, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_mask_does_not_depend_on_the_type(isa: str, dtype: torch.dtype, p: float) -> None:
    use_isa(isa)
    ones = torch.ones(3, 1001, dtype=dtype)
    output = torch.ops.pyconv.dropout_with_state(ones, p, False, 5, 0)
    assert output.dtype == dtype
    assert_equal(output, mask_of((3, 1001), p, 5).to(dtype), "mask")


@EVERY_ISA
def test_a_tiny_probability_drops_nothing_and_one_that_rounds_to_1_everything(isa: str) -> None:
    use_isa(isa)
    ones = torch.ones(1000)
    assert torch.equal(torch.ops.pyconv.dropout_with_state(ones, 1e-12, False, 1, 0), ones)
    assert not torch.ops.pyconv.dropout_with_state(ones, 1 - 1e-12, False, 1, 0).any()


@pytest.mark.parametrize("p", PROBABILITIES)
def test_fraction(p: float) -> None:
    n = 400_000
    dropped = (dropout(torch.ones(n), p) == 0).sum().item()
    assert abs(dropped - n * p) < 5 * math.sqrt(n * p * (1 - p))


@pytest.mark.parametrize("p", [0.5, 0.3])
def test_masks_and_neighbours_are_independent(p: float) -> None:
    n = 200_000
    a, b = ((dropout(torch.ones(n), p) == 0).double() - p for _ in range(2))
    bound = 5 * math.sqrt(n) * p * (1 - p)
    assert abs((a * b).sum().item()) < bound, "two calls"
    for distance in (1, 2, 4, 16, 64):
        assert abs((a[distance:] * a[:-distance]).sum().item()) < bound, f"elements {distance} apart"


# ------------------------------------------------------------------------------------------------------------
# The generator
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("default", [True, False])
def test_the_state_comes_from_the_generator(default: bool) -> None:
    """On the CPU the seed is one draw of 64 bits; on a GPU seed and offset are the generator's own."""
    generator = default_generator() if default else new_generator(11)
    input = torch.ones(1000)
    for _ in range(2):
        expected = kept((1000,), 0.5, generator).float() * 2
        assert torch.equal(dropout(input, generator=None if default else generator), expected)


@pytest.mark.cpu_only
def test_a_call_advances_the_generator_by_its_draw_only() -> None:
    generator, twin = (new_generator(4) for _ in range(2))
    dropout(torch.ones(10_000), 0.3, generator=generator)
    torch.empty((), dtype=torch.int64).random_(-(2**63), None, generator=twin)
    assert torch.equal(generator.get_state(), twin.get_state())


@pytest.mark.parametrize(
    ("p", "training", "inverted"),
    [(0.0, True, True), (0.0, True, False), (1.0, True, True), (0.5, False, True), (0.5, False, False)],
)
def test_no_draw_where_nothing_is_random(p: float, training: bool, inverted: bool) -> None:
    generator = new_generator(4)
    before = generator.get_state()
    dropout(torch.ones(10), p, training, inverted=inverted, generator=generator)
    torch.ops.pyconv.dropout(torch.ones(10), p, training, inverted, generator)
    torch.ops.pyconv.bias_act_dropout(torch.ones(10), None, "relu", p, training, inverted, generator)
    assert torch.equal(generator.get_state(), before)


def test_manual_seed_and_rng_state() -> None:
    input = torch.ones(1000)
    torch.manual_seed(3)
    state = default_generator().get_state()
    first, second = dropout(input), dropout(input)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(dropout(input), first)
    default_generator().set_state(state)
    assert torch.equal(dropout(input), first)
    with torch.random.fork_rng():
        assert torch.equal(dropout(input), second)
    assert torch.equal(dropout(input), second)


# ------------------------------------------------------------------------------------------------------------
# Values
# ------------------------------------------------------------------------------------------------------------


@EVERY_ISA
@pytest.mark.parametrize("inverted", [True, False])
@pytest.mark.parametrize("p", [0.5, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_values_and_gradient(isa: str, dtype: torch.dtype, p: float, inverted: bool) -> None:
    use_isa(isa)
    input = torch.randn(7, 300).to(dtype).requires_grad_()
    grad_output = torch.randn(7, 300).to(dtype)
    mask = kept((7, 300), p)
    output = dropout(input, p, inverted=inverted)
    output.backward(grad_output)
    # The factor is not rounded to the tensor's type.
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    factor = mask.to(accumulator) * (1 / (1 - p) if inverted else 1)
    assert_equal(output, (input.detach().to(accumulator) * factor).to(dtype), "output")
    assert_equal(input.grad, (grad_output.to(accumulator) * factor).to(dtype), "gradient")


def test_inference_of_the_original_form_multiplies_by_1_minus_p() -> None:
    input = torch.randn(50, requires_grad=True)
    output = dropout(input, 0.25, training=False, inverted=False)
    assert torch.equal(output, input * 0.75)
    output.sum().backward()
    assert torch.equal(input.grad, torch.full((50,), 0.75))


@pytest.mark.parametrize("inverted", [True, False])
def test_input_itself_where_nothing_changes(inverted: bool) -> None:
    input = torch.randn(5)
    assert dropout(input, 0.0, inverted=inverted) is input
    if inverted:
        assert dropout(input, 0.5, training=False) is input
    output = torch.ops.pyconv.dropout(input, 0.0, True, inverted)
    assert torch.equal(output, input)
    assert output.data_ptr() != input.data_ptr(), "the operator itself never aliases its input"


@pytest.mark.parametrize("inverted", [True, False])
def test_p_1_drops_everything(inverted: bool) -> None:
    input = torch.tensor([1.0, -2.0, 0.0, math.inf, math.nan], requires_grad=True)
    output = dropout(input, 1.0, inverted=inverted)
    assert_equal(output, torch.nn.functional.dropout(input.detach(), 1.0), "output")
    assert torch.equal(torch.autograd.grad(output, input, torch.ones(5))[0], torch.zeros(5))


@EVERY_ISA
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_a_dropped_element_is_input_times_0(isa: str, dtype: torch.dtype) -> None:
    use_isa(isa)
    input = torch.tensor([math.inf, -math.inf, math.nan, -0.0, -3.0] * 40, dtype=dtype, requires_grad=True)
    mask = kept((200,), 0.5)
    output = dropout(input)
    expected = input.detach() * (mask.to(dtype) * 2)
    assert expected.isnan().any() and expected.isinf().any()
    assert_equal(output, expected, "output")
    assert torch.equal(output.signbit()[~output.isnan()], expected.signbit()[~expected.isnan()])
    assert_equal(torch.autograd.grad(output, input, input.detach())[0], expected, "gradient")


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "contiguous": lambda: torch.randn(4, 6, 5, 7),
    "channels_last": lambda: torch.randn(4, 6, 5, 7).contiguous(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(4, 7, 5, 6).transpose(1, 3),
    "strided": lambda: torch.randn(4, 6, 5, 14)[..., ::2],
    "offset": lambda: torch.randn(4 * 6 * 5 * 7 + 1)[1:].view(4, 6, 5, 7),
    "expanded": lambda: torch.randn(4, 1, 5, 7).expand(4, 6, 5, 7),
    "channels_last_3d": lambda: torch.randn(2, 3, 4, 5, 6).contiguous(memory_format=torch.channels_last_3d),
    "scalar": lambda: torch.randn(()),
    "empty": lambda: torch.randn(3, 0, 2),
}


@pytest.mark.parametrize("grad_layout", ["same", "other"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, grad_layout: str) -> None:
    """The mask goes by the logical index; the output has the strides torch's dropout gives it."""
    input = LAYOUTS[layout]().requires_grad_()
    mask = kept(tuple(input.shape), 0.5)
    output = dropout(input)
    assert_equal(output, input.detach() * mask * 2, "output")
    assert output.stride() == torch.nn.functional.dropout(input).stride()
    grad_output = torch.randn_like(output)
    if grad_layout == "other":
        backwards = tuple(reversed(range(input.dim())))
        grad_output = grad_output.permute(backwards).contiguous().permute(backwards)
    gradient = torch.autograd.grad(output, input, grad_output)[0]
    assert_equal(gradient, grad_output * mask * 2, "gradient")


@pytest.mark.cpu_only
@CPU_ISAS
@pytest.mark.parametrize("p", [0.5, 0.3])
def test_same_bits_for_any_number_of_threads(isa: str, p: float) -> None:
    use_isa(isa)
    input, grad_output = torch.randn(2, 300_001)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(1)
        leaf = input.clone().requires_grad_()
        output = dropout(leaf, p)
        results.append((output.detach(), torch.autograd.grad(output, leaf, grad_output)[0]))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.cpu_only
@EVERY_ISA
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_every_isa_gives_the_bits_of_scalar(isa: str, dtype: torch.dtype) -> None:
    use_isa(isa)
    input = torch.randn(5003).to(dtype)
    output = torch.ops.pyconv.dropout_with_state(input, 0.3, True, 9, 0)
    pyconv.set_isa("scalar")
    assert torch.equal(output, torch.ops.pyconv.dropout_with_state(input, 0.3, True, 9, 0))


# ------------------------------------------------------------------------------------------------------------
# Derivatives
# ------------------------------------------------------------------------------------------------------------


def seeded(p: float = 0.3, **arguments: bool) -> Callable[[Tensor], Tensor]:
    """dropout with the same mask in every call, which finite differences need."""
    return lambda x: dropout(x, p, generator=new_generator(8), **arguments)


@pytest.mark.parametrize("inverted", [True, False])
@pytest.mark.parametrize("p", [0.3, 1.0])
def test_gradcheck(p: float, inverted: bool) -> None:
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    function = seeded(p, inverted=inverted)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
        assert torch.autograd.gradcheck(function, (x,), check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(lambda t: function(t) ** 2, (x,), check_fwd_over_rev=True)


def test_gradient_penalty_added_to_another_loss() -> None:
    def gradient(function: Callable[[Tensor], Tensor]) -> Tensor:
        x = torch.linspace(-1, 2, 40, dtype=torch.float64).requires_grad_()
        output = function(x**2)
        slope = torch.autograd.grad(output.pow(2).sum(), x, create_graph=True)[0]
        (output.sum() + slope.pow(2).sum()).backward()
        return x.grad

    state = next_state(new_generator(8))
    expected = gradient(lambda t: reference.dropout(t, 0.3, **state))
    torch.testing.assert_close(gradient(seeded()), expected, rtol=1e-12, atol=1e-12)


def test_double_backward_of_a_linear_function_is_zero_but_connected() -> None:
    x = torch.randn(10, requires_grad=True)
    grad_output = torch.randn(10, requires_grad=True)
    mask = kept((10,), 0.5).float()
    gradient = torch.autograd.grad(dropout(x), x, grad_output, create_graph=True)[0]
    assert torch.equal(torch.autograd.grad(gradient.sum(), grad_output)[0], 2 * mask)


def test_forward_ad() -> None:
    x, tangent = torch.randn(2, 50)
    mask = kept((50,), 0.5).float()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        output = torch.autograd.forward_ad.unpack_dual(dropout(dual))
    assert torch.equal(output.primal, x * mask * 2)
    assert torch.equal(output.tangent, tangent * mask * 2)


def test_func_grad_jvp_and_vjp_use_the_mask_of_the_generator() -> None:
    """On the CPU that of eager mode."""
    x, tangent = torch.randn(2, 30)
    torch.manual_seed(1)
    mask = mask_of((30,), 0.3, **next_state_in_a_transform()).float() / 0.7
    torch.testing.assert_close(torch.func.grad(lambda t: dropout(t, 0.3).sum())(x), mask)
    torch.manual_seed(1)
    primal, derivative = torch.func.jvp(lambda t: dropout(t, 0.3), (x,), (tangent,))
    torch.testing.assert_close((primal, derivative), (x * mask, tangent * mask))
    torch.manual_seed(1)
    primal, pullback = torch.func.vjp(lambda t: dropout(t, 0.3), x)
    torch.testing.assert_close((primal, pullback(tangent)[0]), (x * mask, tangent * mask))


@pytest.mark.parametrize("function", [torch.func.jacrev, torch.func.jacfwd, torch.func.hessian])
def test_func_jacobians(function: Callable[..., Callable[[Tensor], Tensor]]) -> None:
    state = next_state(new_generator(8))
    x = torch.randn(6, dtype=torch.float64)

    def ours(t: Tensor) -> Tensor:
        return (torch.ops.pyconv.dropout_with_state(t, 0.3, True, **state) ** 3).sum()

    def expected(t: Tensor) -> Tensor:
        return (reference.dropout(t, 0.3, **state) ** 3).sum()

    torch.testing.assert_close(function(ours)(x), function(expected)(x))


@pytest.mark.parametrize(
    "call", [dropout, bias_act_dropout, torch.ops.pyconv.dropout, torch.ops.pyconv.bias_act_dropout]
)
@pytest.mark.parametrize("batched", [True, False])
def test_vmap_obeys_randomness(batched: bool, call: Any) -> None:
    x = torch.ones(4, 64)

    def function(t: Tensor) -> Tensor:
        return call(t, p=0.5) if batched else call(torch.ones(64), p=0.5) + 0 * t

    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(function)(x)

    same = torch.vmap(function, randomness="same")(x)
    assert set(same.unique().tolist()) == {0.0, 2.0}
    assert (same == same[0]).all()

    different = torch.vmap(function, randomness="different")(x)
    assert set(different.unique().tolist()) == {0.0, 2.0}
    assert len({tuple(row) for row in different.tolist()}) == 4


def test_vmap_without_randomness_needs_no_permission() -> None:
    x = torch.randn(4, 10)
    assert torch.equal(torch.vmap(lambda t: dropout(t, 0.5, training=False, inverted=False))(x), x * 0.5)
    assert torch.equal(torch.vmap(lambda t: dropout(t, 1.0))(x), x * 0)


def test_vmap_of_grad_has_the_mask_of_its_own_forward() -> None:
    x = torch.randn(5, 40)

    def value_and_grad(t: Tensor) -> tuple[Tensor, Tensor]:
        gradient, output = torch.func.grad(lambda u: (lambda y: (y.sum(), y))(dropout(u)), has_aux=True)(t)
        return gradient, output

    gradient, output = torch.vmap(value_and_grad, randomness="different")(x)
    assert_equal(output, x * gradient, "output")
    assert len({tuple(row) for row in gradient.tolist()}) == 5


def test_batched_gradients() -> None:
    x = torch.randn(20, requires_grad=True)
    mask = kept((20,), 0.5).float()
    output = dropout(x)
    grad_outputs = torch.randn(3, 20)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
        gradients = torch.autograd.grad(output, x, grad_outputs, is_grads_batched=True)[0]
    assert torch.equal(gradients, grad_outputs * mask * 2)


# ------------------------------------------------------------------------------------------------------------
# What is saved, and what may happen in between
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("numel", [10, 100_000])
def test_16_bytes_are_saved_per_call(numel: int) -> None:
    sizes = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        dropout(torch.ones(numel, requires_grad=True))
    assert sum(sizes) == 16


def test_input_and_output_may_change_in_place_before_the_backward() -> None:
    leaf = torch.ones(20, requires_grad=True)
    input = leaf * 1
    output = dropout(input)
    expected = output.detach().clone()
    input.mul_(3)
    output.mul_(5)
    assert torch.equal(torch.autograd.grad(output.sum(), leaf)[0], 5 * expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(use_reentrant: bool) -> None:
    x = torch.ones(300, requires_grad=True)

    def block(t: Tensor) -> Tensor:
        return dropout(dropout(t, 0.5) * t, 0.3)

    torch.manual_seed(2)
    block(x).sum().backward()
    expected, x.grad = x.grad, None
    torch.manual_seed(2)
    checkpoint(block, x, use_reentrant=use_reentrant).sum().backward()
    assert torch.equal(x.grad, expected)


def test_retain_graph_gives_the_same_mask_again() -> None:
    x = torch.ones(100, requires_grad=True)
    output = dropout(x)
    first = torch.autograd.grad(output.sum(), x, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(output.sum(), x)[0], first)
    assert torch.equal(first, output.detach())


def test_no_grad_and_inference_mode() -> None:
    x = torch.ones(100, requires_grad=True)
    expected = kept((100,), 0.5).float() * 2
    with torch.no_grad():
        output = dropout(x)
    assert torch.equal(output, expected) and not output.requires_grad
    expected = kept((100,), 0.5).float() * 2
    with torch.inference_mode():
        output = dropout(torch.ones(100))
        assert torch.equal(output, expected) and output.is_inference()


def test_autocast_leaves_the_type_alone() -> None:
    with torch.autocast(device().type, torch.bfloat16):
        for dtype in DTYPES:
            assert dropout(torch.ones(8, dtype=dtype)).dtype == dtype


# ------------------------------------------------------------------------------------------------------------
# Tracing
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend: str) -> None:
    """Every run draws anew, two calls in a graph differ, the gradient has the mask of its forward."""

    @torch.compile(fullgraph=True, dynamic=True, backend=backend)
    def function(t: Tensor) -> tuple[Tensor, Tensor]:
        return dropout(t, 0.5), dropout(t, 0.5)

    for n in (3, 5):
        x = torch.ones(n, 64, requires_grad=True)
        torch.manual_seed(n)
        first, second = function(x)
        torch.manual_seed(n)
        assert torch.equal(first, dropout(x)) and torch.equal(second, dropout(x))
        assert not torch.equal(first, second)
        assert torch.equal(torch.autograd.grad(first.sum() + 3 * second.sum(), x)[0], first + 3 * second)
        assert not torch.equal(function(x)[0], first)
        with torch.no_grad():
            first, second = function(x)
        assert not torch.equal(first, second)


def test_compile_refuses_a_generator() -> None:
    function = torch.compile(
        lambda t: dropout(t, generator=new_generator()), fullgraph=True, backend="eager"
    )
    with pytest.raises(Exception, match="Generator"):
        function(torch.ones(4))


def test_compile_of_transforms() -> None:
    function = torch.compile(
        torch.vmap(torch.func.grad(lambda t: dropout(t).sum()), randomness="different"),
        fullgraph=True,
        backend="aot_eager",
    )
    gradient = function(torch.ones(4, 64))
    assert set(gradient.unique().tolist()) == {0.0, 2.0}
    assert len({tuple(row) for row in gradient.tolist()}) == 4


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided", "expanded", "scalar", "empty"])
def test_opcheck(layout: str) -> None:
    input = LAYOUTS[layout]()
    for operator, arguments in (
        (torch.ops.pyconv.dropout_with_state.default, (0.5, True, 3, 0)),
        (torch.ops.pyconv.dropout.default, (0.5,)),
        (torch.ops.pyconv.dropout.default, (0.0,)),
        (torch.ops.pyconv.dropout.default, (1.0,)),
        (torch.ops.pyconv.dropout.default, (0.5, False, False)),
    ):
        torch.library.opcheck(operator, (input.detach().requires_grad_(), *arguments))


def test_opcheck_of_the_mask() -> None:
    for state in (torch.tensor([3, 0]), torch.tensor([[3, 0], [4, 0]])):
        torch.library.opcheck(torch.ops.pyconv._dropout_mask.default, (state, (5, 3), 0.5))


def test_drawing_operators_are_tagged() -> None:
    for operator in (torch.ops.pyconv.dropout, torch.ops.pyconv.bias_act_dropout):
        assert torch.Tag.nondeterministic_seeded in operator.default.tags
    assert torch.Tag.nondeterministic_seeded not in torch.ops.pyconv.dropout_with_state.default.tags


def test_export() -> None:
    module = pyconv.Dropout(0.5)
    program = torch.export.export(module, (torch.ones(100),))
    torch.manual_seed(1)
    first, second = (program.module()(torch.ones(100)) for _ in range(2))
    assert set(first.unique().tolist()) == {0.0, 2.0}
    assert not torch.equal(first, second)


def test_meta() -> None:
    input = torch.empty(2, 3, 4, 5, device="meta").contiguous(memory_format=torch.channels_last)
    output = dropout(input)
    assert output.device.type == "meta"
    assert (output.shape, output.stride()) == (input.shape, input.stride())


# ------------------------------------------------------------------------------------------------------------
# Errors
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [-0.1, 1.1, math.nan, math.inf])
def test_probability_out_of_range(p: float) -> None:
    input = torch.ones(3)
    calls: tuple[Callable[[], object], ...] = (
        lambda: dropout(input, p),
        lambda: dropout(input, p, training=False),
        lambda: torch.ops.pyconv.dropout(input, p),
        lambda: torch.ops.pyconv.dropout_with_state(input, p, True, 0, 0),
        lambda: pyconv.functional.bias_act_dropout(input, p=p),
        lambda: pyconv.Dropout(p),
        lambda: pyconv.LinearActDropout(2, 2, p=p),
    )
    for call in calls:
        with pytest.raises(ValueError, match=r"dropout probability p has to be between 0 and 1, but got"):
            call()


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64])
def test_unsupported_dtype(dtype: torch.dtype) -> None:
    for p in (0.5, 1.0):
        with pytest.raises(
            RuntimeError, match="expected dtype float32, float64, bfloat16 or float16, but got"
        ):
            dropout(torch.ones(3).to(dtype), p)


def test_wrong_python_types() -> None:
    with pytest.raises(TypeError, match="'input' must be Tensor, not list"):
        dropout([1.0])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="'p' must be float, not str"):
        dropout(torch.ones(3), "0.5")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="'generator' must be torch.Generator, not int"):
        dropout(torch.ones(3), generator=1)  # type: ignore[arg-type]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a generator of another device")
def test_generator_of_another_device() -> None:
    with pytest.raises(RuntimeError, match="Expected a 'cpu' device type for generator but found 'cuda'"):
        dropout(torch.ones(3, device="cpu"), generator=torch.Generator("cuda"))


def test_a_bad_state_is_refused() -> None:
    for state in (torch.zeros(3, dtype=torch.int64), torch.zeros(2)):
        with pytest.raises(RuntimeError, match="dropout state of 2 int64"):
            torch.ops.pyconv._bias_act_dropout(torch.ones(4), None, state, "none", 0.5, 2.0)


# ------------------------------------------------------------------------------------------------------------
# The module
# ------------------------------------------------------------------------------------------------------------


def test_module() -> None:
    module = pyconv.Dropout(0.25)
    input = torch.ones(1000)
    expected = kept((1000,), 0.25) / 0.75
    torch.testing.assert_close(module(input), expected)
    assert module.eval()(input) is input
    assert repr(module) == "Dropout(p=0.25)"
    assert not module.state_dict()

    original = pyconv.Dropout(0.25, inverted=False)
    assert set(original(input).unique().tolist()) == {0.0, 1.0}
    assert torch.equal(original.eval()(input), input * 0.75)
    assert repr(original) == "Dropout(p=0.25, inverted=False)"


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_module_can_be_copied(clone: Callable[[torch.nn.Module], torch.nn.Module]) -> None:
    twin = clone(pyconv.Dropout(0.25, inverted=False))
    assert (twin.p, twin.inverted) == (0.25, False)
