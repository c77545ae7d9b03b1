"""bias_act_dropout: values and gradients against float64, threads, derivatives, tracing and errors."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from backends import also_emulated, device, every_isa, supported_isas, use_isa
from dropout_support import default_generator, kept, new_generator, next_state, next_state_in_a_transform
from numerics import ACTIVATIONS, DTYPES, accumulator_eps, assert_equal, dtype_name, integers
from torch import Tensor

import pyconv
from pyconv import reference
from pyconv.functional import bias_act_dropout

MODES = {
    "dropped": {"p": 0.3},
    "dropped-bytes": {"p": 0.5},
    "original-form": {"p": 0.25, "inverted": False},
    "original-form-inference": {"p": 0.25, "inverted": False, "training": False},
    "inference": {"p": 0.25, "training": False},
    "no-dropout": {"p": 0.0},
    "all-dropped": {"p": 1.0},
}

EVERY_ISA = pytest.mark.parametrize("isa", every_isa())
CPU_ISAS = pytest.mark.parametrize("isa", supported_isas())

SHAPES = ((1, 1), (3, 7), (10, 100), (4, 5, 33), (70, 130), (2, 1030))


def leaves(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.detach().clone().requires_grad_() for t in tensors]


def run(
    function: Callable[..., Tensor],
    input: Tensor,
    bias: Tensor | None,
    grad_output: Tensor,
    **arguments: object,
) -> tuple[Tensor, ...]:
    """Output and gradients."""
    tensors = leaves(input, bias)
    output = function(*tensors, **arguments)
    return output.detach(), *torch.autograd.grad(output, [t for t in tensors if t is not None], grad_output)


def both(
    input: Tensor, bias: Tensor | None, grad_output: Tensor, **arguments: object
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What pyconv gives, and the float64 reference with the same mask."""
    state = next_state(default_generator())
    actual = run(bias_act_dropout, input, bias, grad_output, **arguments)
    double = [None if t is None else t.double() for t in (input, bias)]
    expected = run(reference.bias_act_dropout, *double, grad_output.double(), **state, **arguments)
    return actual, expected


# ------------------------------------------------------------------------------------------------------------
# Values and gradients
# ------------------------------------------------------------------------------------------------------------


@EVERY_ISA
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_against_float64(isa: str, dtype: torch.dtype, activation: str, mode: str) -> None:
    use_isa(isa)
    arguments = {"activation": activation, **MODES[mode]}
    scale = 1 / (1 - arguments["p"]) if mode.startswith("dropped") else 1
    eps_out, eps = torch.finfo(dtype).eps, accumulator_eps(dtype)
    for shape in SHAPES:
        input, grad_output = (torch.randn(shape).to(dtype) for _ in range(2))
        # Next to 0 a rounded sum could fall on the other side of relu's kink.
        input = torch.where(input.abs() < 0.1, 0.5, input)
        for bias in (None, 0.01 * torch.randn(shape[-1]).to(dtype)):
            actual, expected = both(input, bias, grad_output, **arguments)
            for tensor in actual:
                assert tensor.dtype == dtype
            pre_activation = input.double().abs() + (0 if bias is None else bias.double().abs())
            # Sum, activation (4 ulp) and scaling, then the rounding of the result.
            error = (actual[0].double() - expected[0]).abs()
            bound = 8 * eps * scale * (1 + pre_activation) + eps_out * expected[0].abs()
            assert (error <= bound).all(), "output"
            # The derivative is taken at a saved value, which is rounded to the type.
            one = grad_output.double().abs() * scale
            element = one * (
                4 * eps_out * (1 + pre_activation) if activation not in ("none", "relu") else 2 * eps
            )
            error = (actual[1].double() - expected[1]).abs()
            assert (error <= element + eps_out * expected[1].abs()).all(), "gradient of input"
            if bias is not None:
                rows = (-1, shape[-1])
                total = element.reshape(rows).sum(0)
                terms = one.reshape(rows).shape[0]
                total += (2 + math.sqrt(terms)) * 2 * eps * one.reshape(rows).sum(0)
                error = (actual[2].double() - expected[2]).abs()
                assert (error <= total + eps_out * expected[2].abs()).all(), "gradient of bias"


@EVERY_ISA
@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_exact_on_small_integers(isa: str, dtype: torch.dtype, activation: str) -> None:
    use_isa(isa)
    generator = torch.Generator("cpu").manual_seed(1)
    for shape in ((1, 1), (20, 7), (33, 64), (18, 600), (5, 3, 17)):
        input, grad_output = (integers(shape, dtype, generator) for _ in range(2))
        bias = integers(shape[-1:], dtype, generator)
        actual, expected = both(input, bias, grad_output, activation=activation, p=0.5)
        for name, tensor, exact in zip(("output", "gradient of input", "gradient of bias"), actual, expected):
            assert_equal(tensor.double(), exact, name)


@also_emulated
@pytest.mark.parametrize("activation", ["sigmoid", "tanh"])
@pytest.mark.parametrize("p", [0.0, 0.3, 0.5])
def test_saturated_activations_have_no_negative_slope(activation: str, p: float) -> None:
    for dtype in DTYPES:
        input = torch.linspace(-40, 40, 999).to(dtype).requires_grad_()
        gradient = torch.autograd.grad(bias_act_dropout(input, activation=activation, p=p).sum(), input)[0]
        assert (gradient >= 0).all()


@EVERY_ISA
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_not_finite(isa: str, activation: str) -> None:
    """Values follow torch; a dropped element is activation * 0."""
    use_isa(isa)
    input = torch.tensor([math.nan, math.inf, -math.inf, 1.0, -1.0, 0.0] * 20)
    actual, expected = both(input, None, torch.ones(120), activation=activation, p=0.5)
    assert torch.equal(actual[0].isnan(), expected[0].isnan())
    assert torch.equal(actual[0].isinf(), expected[0].isinf())
    finite = expected[0].isfinite()
    torch.testing.assert_close(actual[0][finite], expected[0][finite].float())
    if activation == "relu":
        assert_equal(actual[1].double()[~expected[1].isnan()], expected[1][~expected[1].isnan()], "gradient")
        kept_nan = input.isnan() & (expected[1] != 0)
        assert kept_nan.any() and (actual[1][kept_nan] == 2).all(), "relu of NaN is live"


@pytest.mark.cpu_only
@CPU_ISAS
@pytest.mark.parametrize("activation", ["none", "relu", "tanh", "gelu"])
def test_same_bits_for_any_number_of_threads(isa: str, activation: str) -> None:
    use_isa(isa)
    for shape in ((3000, 100), (64, 5000), (2, 200_000)):
        input, grad_output, bias = torch.randn(shape), torch.randn(shape), torch.randn(shape[-1])
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            torch.manual_seed(3)
            results.append(run(bias_act_dropout, input, bias, grad_output, activation=activation, p=0.3))
        for name, one, two in zip(("output", "gradient of input", "gradient of bias"), *results):
            assert torch.equal(one, two), name


@pytest.mark.cpu_only
@CPU_ISAS
@pytest.mark.parametrize("activation", ["none", "relu"])
def test_every_isa_gives_the_bits_of_scalar(isa: str, activation: str) -> None:
    use_isa(isa)
    input, grad_output, bias = torch.randn(50, 77), torch.randn(50, 77), torch.randn(77)
    results = []
    for name in (isa, "scalar"):
        pyconv.set_isa(name)
        torch.manual_seed(3)
        results.append(run(bias_act_dropout, input, bias, grad_output, activation=activation, p=0.3))
    for what, actual, scalar in zip(("output", "gradient of input", "gradient of bias"), *results):
        assert torch.equal(actual, scalar), what


@also_emulated
@pytest.mark.parametrize("activation", ["relu", "sigmoid", "gelu"])
def test_layouts(activation: str) -> None:
    base = torch.randn(4, 6, 5, 8)
    grad_output = torch.randn(4, 6, 5, 8)
    wide_bias = torch.randn(16)
    for input in (
        base.contiguous(memory_format=torch.channels_last),
        base.transpose(0, 1).contiguous().transpose(0, 1),
        torch.randn(4, 6, 5, 17)[..., 1::2],
        torch.randn(1, 1, 5, 8).expand(4, 6, 5, 8),
    ):
        for grad in (grad_output, grad_output.contiguous(memory_format=torch.channels_last)):
            arguments = {"activation": activation, "p": 0.3}
            torch.manual_seed(5)
            tensors = leaves(None, wide_bias[::2])
            leaf = input.detach().requires_grad_()
            output = bias_act_dropout(leaf, tensors[1], **arguments)
            assert output.stride() == torch.empty_like(input).stride()
            gradients = torch.autograd.grad(output, (leaf, tensors[1]), grad)
            torch.manual_seed(5)
            plain = run(
                bias_act_dropout,
                input.contiguous(),
                wide_bias[::2].contiguous(),
                grad.contiguous(),
                **arguments,
            )
            for name, actual, expected in zip(
                ("output", "gradient of input", "gradient of bias"), (output.detach(), *gradients), plain
            ):
                assert_equal(actual, expected, name)


@also_emulated
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0,), (3, 0, 2)])
def test_empty(shape: tuple[int, ...]) -> None:
    output, grad_input, grad_bias = run(
        bias_act_dropout,
        torch.ones(shape),
        torch.ones(shape[-1]),
        torch.ones(shape),
        activation="gelu",
        p=0.5,
    )
    assert output.shape == grad_input.shape == shape
    assert torch.equal(grad_bias, torch.zeros(shape[-1]))


@also_emulated
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("wanted", ["input", "bias"])
def test_only_the_gradient_asked_for(activation: str, wanted: str) -> None:
    input, bias = torch.randn(5, 9), torch.randn(9)
    both_gradients = []
    for needs in (("input", "bias"), (wanted,)):
        torch.manual_seed(1)
        x = input.clone().requires_grad_("input" in needs)
        b = bias.clone().requires_grad_("bias" in needs)
        bias_act_dropout(x, b, activation=activation, p=0.3).sum().backward()
        both_gradients.append({"input": x.grad, "bias": b.grad})
    assert torch.equal(both_gradients[0][wanted], both_gradients[1][wanted])
    assert both_gradients[1]["bias" if wanted == "input" else "input"] is None


@pytest.mark.parametrize(("activation", "tensors"), [(name, int(name != "none")) for name in ACTIVATIONS])
@pytest.mark.parametrize("bias", [True, False])
def test_what_is_saved(activation: str, tensors: int, bias: bool) -> None:
    """At most one tensor, and the 16 bytes of the seed."""
    sizes = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    input = torch.randn(10, 20, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        bias_act_dropout(input, torch.randn(20) if bias else None, activation=activation, p=0.5)
    assert sorted(sizes) == [16] + [10 * 20 * 4] * tensors


def test_changing_a_saved_output_in_place_is_an_error() -> None:
    output = bias_act_dropout(torch.randn(5, requires_grad=True), activation="relu", p=0.5)
    output.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


# ------------------------------------------------------------------------------------------------------------
# Derivatives
# ------------------------------------------------------------------------------------------------------------


def seeded(activation: str, p: float = 0.3, **arguments: bool) -> Callable[..., Tensor]:
    """The same mask in every call, which finite differences need."""
    return lambda input, bias=None: bias_act_dropout(
        input, bias, activation=activation, p=p, generator=new_generator(8), **arguments
    )


def off_the_kink(*shape: int) -> Tensor:
    x = torch.randn(shape, dtype=torch.float64)
    return torch.where(x.abs() < 0.2, 0.5, x).requires_grad_()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation: str, bias: bool, mode: str) -> None:
    function = seeded(activation, **MODES[mode])
    inputs = (off_the_kink(3, 4), *((0.1 * off_the_kink(4)).detach().requires_grad_() for _ in range(bias)))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
        assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(
            function, inputs, check_fwd_over_rev=True, check_rev_over_rev=True, check_batched_grad=True
        )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradient_penalty_added_to_another_loss(activation: str, bias: bool) -> None:
    x0 = torch.linspace(-2, 3, 30, dtype=torch.float64).reshape(5, 6)
    b0 = torch.linspace(0.5, 1, 6, dtype=torch.float64) if bias else None
    state = next_state(new_generator(8))

    def gradients(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        tensors = [t for t in leaves(x0, b0) if t is not None]
        output = function(tensors[0] ** 2, *tensors[1:])
        slopes = torch.autograd.grad(output.pow(2).sum(), tensors, create_graph=True)
        return torch.autograd.grad(output.sum() + sum(s.pow(2).sum() for s in slopes), tensors)

    def expected(input: Tensor, bias: Tensor | None = None) -> Tensor:
        return reference.bias_act_dropout(input, bias, activation=activation, p=0.3, **state)

    torch.testing.assert_close(gradients(seeded(activation)), gradients(expected), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_func_transforms(activation: str) -> None:
    x, b = torch.randn(4, 6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    tangents = torch.randn(4, 6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    torch.manual_seed(2)
    state = next_state_in_a_transform()

    def ours(input: Tensor, bias: Tensor) -> Tensor:
        return bias_act_dropout(input, bias, activation=activation, p=0.3)

    def expected(input: Tensor, bias: Tensor) -> Tensor:
        return reference.bias_act_dropout(input, bias, activation=activation, p=0.3, **state)

    def check(transformed: Callable[[Callable[..., Tensor]], object]) -> None:
        torch.manual_seed(2)
        torch.testing.assert_close(transformed(ours), transformed(expected))

    check(lambda f: torch.func.grad(lambda *t: f(*t).sum(), argnums=(0, 1))(x, b))
    check(lambda f: torch.func.jvp(f, (x, b), tangents))
    check(lambda f: torch.func.jacrev(f, argnums=(0, 1))(x, b))
    # With a permission to draw, since jacfwd runs the function under vmap.
    check(lambda f: torch.func.jacfwd(f, argnums=(0, 1), randomness="same")(x, b))
    check(lambda f: torch.func.jacfwd(torch.func.grad(lambda *t: f(*t).sum(), 1), 1, randomness="same")(x, b))


def test_vmap() -> None:
    x, b = torch.randn(3, 4, 6), torch.randn(6)

    def gradient(t: Tensor) -> Tensor:
        return torch.func.grad(lambda u: bias_act_dropout(u, b, activation="tanh", p=0.5).sum())(t)

    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(gradient)(x)
    slope = 2 * (1 - torch.tanh(x + b) ** 2)
    different = torch.vmap(gradient, randomness="different")(x)
    torch.testing.assert_close(different, torch.where(different == 0, 0, slope))
    same = torch.vmap(gradient, randomness="same")(x)
    assert torch.equal(same == 0, (same == 0)[:1].expand(3, 4, 6))
    assert not torch.equal(different == 0, (different == 0)[:1].expand(3, 4, 6))
    # Over the bias, and without randomness.
    biases = torch.randn(5, 6)
    output = torch.vmap(lambda t: bias_act_dropout(x, t, activation="silu"))(biases)
    torch.testing.assert_close(output, torch.nn.functional.silu(x + biases[:, None, None]))


# ------------------------------------------------------------------------------------------------------------
# Tracing and types
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_compile(backend: str, activation: str) -> None:
    torch._dynamo.reset()  # every activation is another compilation of the same lambda
    function = torch.compile(
        lambda x, b: bias_act_dropout(x, b, activation=activation, p=0.3),
        fullgraph=True,
        dynamic=True,
        backend=backend,
    )
    for n in (3, 5):
        input, bias, grad_output = torch.randn(n, 20), torch.randn(20), torch.randn(n, 20)
        torch.manual_seed(n)
        compiled = run(function, input, bias, grad_output)
        torch.manual_seed(n)
        eager = run(bias_act_dropout, input, bias, grad_output, activation=activation, p=0.3)
        torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_opcheck(activation: str, bias: bool) -> None:
    input = torch.randn(3, 5).T.requires_grad_()
    b = torch.randn(3, requires_grad=True) if bias else None
    state = torch.tensor([7, 0])
    public = torch.ops.pyconv.bias_act_dropout.default
    torch.library.opcheck(public, (input, b, activation, 0.5))
    torch.library.opcheck(public, (input, b, activation, 0.5, False))
    for given in (state, None):
        arguments = (b, given, activation, 0.5, 2.0)
        torch.library.opcheck(torch.ops.pyconv._bias_act_dropout.default, (input, *arguments))
        detached = (input.detach(), None if b is None else b.detach(), *arguments[1:])
        torch.library.opcheck(torch.ops.pyconv._bias_act_dropout_forward.default, detached)
        saved = None if activation == "none" else torch.rand(5, 3)
        torch.library.opcheck(
            torch.ops.pyconv._bias_act_dropout_backward.default,
            (torch.randn(5, 3), saved, given, activation, 0.5, 2.0, [True, bias]),
        )


def test_internal_operators_have_no_silent_gradient() -> None:
    x = torch.randn(4, requires_grad=True)
    output = torch.ops.pyconv._bias_act_dropout_forward(x, None, None, "relu", 0.0, 1.0)[0]
    with pytest.raises(RuntimeError, match="not implemented"):
        output.sum().backward()


def test_autocast_casts_the_bias() -> None:
    module = pyconv.LinearActDropout(8, 6, activation="relu", p=0.5)
    with torch.autocast(device().type, torch.bfloat16):
        output = module(torch.randn(3, 8))
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert module.bias.grad.dtype == torch.float32


def test_meta() -> None:
    module = pyconv.LinearActDropout(8, 6, activation="gelu", p=0.5, device="meta")
    output = module(torch.empty(3, 8, device="meta"))
    assert output.shape == (3, 6) and output.device.type == "meta"


# ------------------------------------------------------------------------------------------------------------
# Errors
# ------------------------------------------------------------------------------------------------------------


def test_errors() -> None:
    input = torch.randn(3, 5)
    with pytest.raises(RuntimeError, match=r"expected bias of size \[5\].* but got bias of size \[4\]"):
        bias_act_dropout(input, torch.randn(4))
    with pytest.raises(RuntimeError, match="expected bias of size"):
        bias_act_dropout(input, torch.randn(1, 5))
    with pytest.raises(RuntimeError, match="expected bias of size"):
        bias_act_dropout(torch.tensor(1.0), torch.randn(1))
    with pytest.raises(RuntimeError, match="same dtype and device"):
        bias_act_dropout(input, torch.randn(5).double())
    with pytest.raises(RuntimeError, match="expected dtype float32, float64, bfloat16 or float16, but got"):
        bias_act_dropout(torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="activation must be one of 'none', 'relu', .*, but got 'swish'"):
        bias_act_dropout(input, activation="swish")
    with pytest.raises(ValueError, match="activation must be one of"):
        torch.ops.pyconv.bias_act_dropout(input, None, "swish")
    with pytest.raises(TypeError, match="'activation' must be str, not NoneType"):
        bias_act_dropout(input, activation=None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="'bias' must be Tensor, not float"):
        bias_act_dropout(input, 1.0)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------
# The module
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_module_equals_linear_activation_dropout(bias: bool) -> None:
    linear = torch.nn.Linear(8, 6, bias=bias)
    module = pyconv.LinearActDropout(8, 6, bias=bias, activation="sigmoid", p=0.25)
    assert {k: v.shape for k, v in module.state_dict().items()} == {
        k: v.shape for k, v in linear.state_dict().items()
    }
    module.load_state_dict(linear.state_dict())
    x = torch.randn(2, 5, 8)
    mask = kept((2, 5, 6), 0.25)
    torch.testing.assert_close(module(x), torch.sigmoid(linear(x)) * mask / 0.75)
    torch.testing.assert_close(module.eval()(x), torch.sigmoid(linear(x)))


def test_module_initialisation_is_that_of_linear() -> None:
    torch.manual_seed(4)
    linear = torch.nn.Linear(8, 6)
    torch.manual_seed(4)
    module = pyconv.LinearActDropout(8, 6)
    assert torch.equal(module.weight, linear.weight) and torch.equal(module.bias, linear.bias)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_module_can_be_copied(clone: Callable[[torch.nn.Module], torch.nn.Module]) -> None:
    module = pyconv.LinearActDropout(8, 6, activation="relu", p=0.25, inverted=False)
    twin = clone(module)
    assert (
        repr(twin)
        == repr(module)
        == (
            "LinearActDropout(in_features=8, out_features=6, bias=True, activation='relu', p=0.25, "
            "inverted=False)"
        )
    )
    x = torch.randn(3, 8)
    torch.manual_seed(1)
    expected = module(x)
    torch.manual_seed(1)
    assert torch.equal(twin(x), expected)
