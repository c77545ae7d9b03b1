"""The layers of pyconv.network3 beyond the book's, against plain torch."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import nn

from pyconv import functional, network3
from pyconv.network3 import ConvLayer, ConvPoolLayer, FullyConnectedLayer, Network, PoolLayer, ReLU, SoftmaxLayer

GEOMETRIES = {
    # filter_shape, image_shape, poolsize, the other arguments, output_shape
    "book": ((4, 3, 3, 3), (2, 3, 9, 8), (2, 2), {}, (4, 3, 3)),
    "stride": ((4, 3, 3, 2), (2, 3, 9, 8), (2, 2), {"stride": 2}, (4, 2, 2)),
    "stride of two numbers": ((4, 3, 3, 2), (2, 3, 9, 8), (3, 2), {"stride": (1, 3)}, (4, 2, 1)),
    "padding": ((4, 3, 3, 3), (2, 3, 9, 8), (2, 2), {"padding": 1}, (4, 4, 4)),
    "padding of two numbers": ((4, 3, 4, 3), (2, 3, 9, 8), (2, 2), {"padding": (2, 0)}, (4, 5, 3)),
    "overlapping windows": ((4, 3, 3, 3), (2, 3, 9, 9), (3, 3), {"pool_stride": 2}, (4, 3, 3)),
    "windows with gaps": ((4, 3, 3, 3), (2, 3, 10, 9), (2, 1), {"pool_stride": (3, 2)}, (4, 3, 4)),
    "groups": ((6, 2, 3, 3), (2, 4, 9, 8), (2, 2), {"groups": 2}, (6, 3, 3)),
    "a group per map": ((3, 1, 3, 3), (2, 3, 9, 8), (2, 2), {"groups": 3}, (3, 3, 3)),
    "all": (
        (6, 2, 4, 3), (2, 4, 13, 11), (3, 2),
        {"stride": (2, 1), "padding": (2, 1), "pool_stride": (1, 2), "groups": 2},
        (6, 5, 5),
    ),
}  # fmt: skip

ACTIVATIONS = {
    network3.ReLU: torch.relu,
    network3.sigmoid: torch.sigmoid,
    network3.tanh: torch.tanh,
    torch.sin: torch.sin,
}


def pool(z, size, stride, pooling):
    windows = z.unfold(2, size[0], stride[0]).unfold(3, size[1], stride[1])
    return windows.amax((-2, -1)) if pooling == "max" else windows.square().sum((-2, -1)).sqrt()


def plain(layer, x, w, b):
    """What a layer computes, by torch's convolution and windows that are views."""
    z = F.conv2d(x, w, None, layer.stride, layer.padding, groups=layer.groups)
    z = pool(z, layer.poolsize, layer.pool_stride, layer.pooling) + b[:, None, None]
    return ACTIVATIONS[layer.activation_fn](z)


def make_layer(geometry, activation_fn=ReLU, pooling="max", dtype=torch.float64, **options):
    filter_shape, image_shape, poolsize, arguments, _ = GEOMETRIES[geometry]
    return ConvPoolLayer(
        filter_shape, image_shape, poolsize, activation_fn, pooling=pooling, dtype=dtype, **arguments, **options
    )


def assert_same_values_and_gradients(layer, reference, x):
    """Float64 on both sides: hundreds of terms of size 1 at most, so some 1e-14."""
    grad_output = torch.randn(2, *layer.output_shape, dtype=x.dtype)
    both = []
    for forward in (layer, reference):
        inputs = [x.clone().requires_grad_(), *layer.params]
        y = forward(inputs[0])
        both.append([y.detach(), *torch.autograd.grad(y, inputs, grad_output)])
    for actual, expected in zip(*both, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


# ----------------------------------------------------------------------------------------------------------
# Values and gradients
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["max", "l2"])
@pytest.mark.parametrize("activation_fn", ACTIVATIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_convolution_and_pooling(geometry, activation_fn, pooling):
    layer = make_layer(geometry, activation_fn, pooling)
    x = torch.randn(layer.image_shape, dtype=torch.float64)
    assert layer.output_shape == GEOMETRIES[geometry][-1] == tuple(layer(x.flatten(1)).shape[1:])
    assert (layer.n_in, layer.n_out) == (math.prod(layer.image_shape[1:]), math.prod(layer.output_shape))
    assert_same_values_and_gradients(layer, lambda images: plain(layer, images, *layer.params), x)


@pytest.mark.parametrize("activation_fn", ACTIVATIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("geometry", [name for name, (*_, o, _) in GEOMETRIES.items() if "pool_stride" not in o])
def test_convolution_alone(geometry, activation_fn):
    filter_shape, image_shape, _, arguments, _ = GEOMETRIES[geometry]
    layer = ConvLayer(filter_shape, image_shape, activation_fn, dtype=torch.float64, **arguments)
    x = torch.randn(image_shape, dtype=torch.float64)
    assert layer.output_shape == tuple(layer(x.flatten(1)).shape[1:]) and layer.n_out == math.prod(layer.output_shape)
    assert_same_values_and_gradients(layer, lambda images: plain(layer, images, *layer.params), x)


@pytest.mark.parametrize("pooling", ["max", "l2"])
@pytest.mark.parametrize(("poolsize", "pool_stride"), [((2, 2), None), ((3, 2), (2, 1)), (2, 3)], ids=str)
def test_pooling_alone(poolsize, pool_stride, pooling):
    layer = PoolLayer((2, 3, 9, 8), poolsize, pool_stride=pool_stride, pooling=pooling)
    assert layer.params == [] and list(layer.parameters()) == []
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    assert layer.output_shape == tuple(layer(x.flatten(1)).shape[1:]) and layer.n_out == math.prod(layer.output_shape)
    assert_same_values_and_gradients(
        layer, lambda images: pool(images, layer.poolsize, layer.pool_stride, pooling), x
    )


@pytest.mark.parametrize("pooling", ["max", "l2"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_derivatives_by_differences(geometry, pooling):
    """First and second ones, in float64. tanh, since ReLU's kink is where a difference may step over it."""
    layer = make_layer(geometry, network3.tanh, pooling, init="lecun")

    def outputs(x, w, b):
        return torch.func.functional_call(layer, {"w": w, "b": b}, (x,))

    x = torch.randn(layer.image_shape, dtype=torch.float64, requires_grad=True)
    inputs = (x, *(p.detach().requires_grad_() for p in layer.params))
    assert torch.autograd.gradcheck(outputs, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(outputs, inputs, fast_mode=True)


@pytest.mark.parametrize("pooling", ["max", "l2"])
def test_derivatives_of_pooling_by_differences(pooling):
    layer = PoolLayer((2, 3, 7, 6), (3, 2), pool_stride=(2, 1), pooling=pooling)
    x = torch.randn(2, 3, 7, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)
    assert torch.autograd.gradgradcheck(layer, x)


def test_book_arguments_give_the_fused_operator_of_the_book():
    layer = ConvPoolLayer((20, 1, 5, 5), (10, 1, 28, 28), (2, 2), ReLU)
    x = torch.rand(10, 784)
    expected = functional.conv_max_pool2d(
        x.view(10, 1, 28, 28), layer.w, layer.b, pool_size=(2, 2), activation="relu"
    )
    assert torch.equal(layer(x), expected)
    assert repr(layer) == (
        "ConvPoolLayer(filter_shape=(20, 1, 5, 5), image_shape=(10, 1, 28, 28), poolsize=(2, 2), activation_fn=ReLU)"
    )


def test_representations_name_what_is_not_the_default():
    layer = ConvPoolLayer(
        (4, 2, 3, 3), (1, 4, 9, 9), 3, ReLU, stride=1, padding=(1, 0), pool_stride=2, groups=2, pooling="l2"
    )
    assert repr(layer) == (
        "ConvPoolLayer(filter_shape=(4, 2, 3, 3), image_shape=(1, 4, 9, 9), poolsize=(3, 3), activation_fn=ReLU, "
        "padding=(1, 0), pool_stride=(2, 2), groups=2, pooling='l2')"
    )
    assert repr(ConvLayer((4, 1, 3, 3), (1, 1, 9, 9), stride=2)) == (
        "ConvLayer(filter_shape=(4, 1, 3, 3), image_shape=(1, 1, 9, 9), activation_fn=sigmoid, stride=(2, 2))"
    )
    assert repr(PoolLayer((1, 4, 9, 9), pool_stride=2)) == "PoolLayer(image_shape=(1, 4, 9, 9), poolsize=(2, 2))"


@pytest.mark.parametrize("activation_fn", list(ACTIVATIONS)[:3], ids=lambda f: f.__name__)
def test_a_convolution_and_a_pooling_layer_are_a_convolutional_layer(activation_fn):
    """The activations are monotone, so that the order of pooling and activation does not matter."""
    both = ConvPoolLayer((4, 3, 3, 3), (2, 3, 9, 9), 3, activation_fn, pool_stride=2, dtype=torch.float64)
    apart = ConvLayer((4, 3, 3, 3), (2, 3, 9, 9), activation_fn, dtype=torch.float64)
    apart.load_state_dict(both.state_dict())
    pooling = PoolLayer((2, 4, 7, 7), 3, pool_stride=2)
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(pooling(apart(x)), both(x), rtol=1e-14, atol=1e-14)


def test_the_shapes_of_ksh_2012():
    """Krizhevsky, Sutskever, Hinton 2012: 224 -> 55 -> 27 -> 27 -> 13 -> 13 -> 6, in two groups from the second on."""
    layers = [
        ConvPoolLayer((96, 3, 11, 11), (1, 3, 224, 224), 3, ReLU, stride=4, padding=2, pool_stride=2, device="meta"),
        ConvPoolLayer((256, 48, 5, 5), (1, 96, 27, 27), 3, ReLU, padding=2, pool_stride=2, groups=2, device="meta"),
        ConvLayer((384, 256, 3, 3), (1, 256, 13, 13), ReLU, padding=1, device="meta"),
        ConvLayer((384, 192, 3, 3), (1, 384, 13, 13), ReLU, padding=1, groups=2, device="meta"),
        ConvPoolLayer((256, 192, 3, 3), (1, 384, 13, 13), 3, ReLU, padding=1, pool_stride=2, groups=2, device="meta"),
        FullyConnectedLayer(9216, 4096, ReLU, 0.5, device="meta"),
        FullyConnectedLayer(4096, 4096, ReLU, 0.5, device="meta"),
        SoftmaxLayer(4096, 1000, device="meta"),
    ]
    assert [layer.output_shape for layer in layers[:5]] == [
        (96, 27, 27), (256, 13, 13), (384, 13, 13), (384, 13, 13), (256, 6, 6),
    ]  # fmt: skip
    assert sum(p.numel() for p in Network(layers, 1).params) == 60_965_224


# ----------------------------------------------------------------------------------------------------------
# L2 pooling
# ----------------------------------------------------------------------------------------------------------


def images_with_zero_windows():
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    x[0, :, :4, 2:] = 0.0
    x[1] = 0.0
    return x.requires_grad_()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own call
@pytest.mark.parametrize("pool_stride", [2, 1])
def test_windows_of_zeros_have_no_gradient(pool_stride):
    layer = PoolLayer((2, 3, 6, 6), pool_stride=pool_stride, pooling="l2")
    x = images_with_zero_windows()
    with torch.autograd.set_detect_anomaly(True):  # no NaN on the way, either
        y = layer(x)
        assert (y == 0).sum() > 0 and (y > 0).sum() > 0
        (gradient,) = torch.autograd.grad((y + y**2).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad((gradient**2).sum(), x)
    # x / y + 2 x, in the windows that a position is in and that are not all zero.
    expected = torch.zeros_like(x)
    for i, j in itertools.product(range(y.shape[2]), range(y.shape[3])):
        rows, columns = (slice(k * pool_stride, k * pool_stride + 2) for k in (i, j))
        window, norm = x[:, :, rows, columns], y[:, :, i, j, None, None]
        expected[:, :, rows, columns] += torch.where(norm > 0, window / norm, 0.0).detach() + 2 * window.detach()
    torch.testing.assert_close(gradient.detach(), expected, rtol=1e-13, atol=1e-13)
    assert gradient[1].abs().max() == 0 and second.isfinite().all()

    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(x.detach(), torch.ones_like(x)))).tangent
    assert tangent.isfinite().all() and tangent[1].abs().max() == 0


def test_an_image_without_ink_trains():
    """A linear convolution of zeros is zero in every window; the bias moves, the filters do not."""
    layer = ConvPoolLayer((2, 1, 3, 3), (1, 1, 8, 8), (2, 2), network3.linear, pooling="l2", dtype=torch.float64)
    layer(torch.zeros(1, 64, dtype=torch.float64)).sum().backward()
    assert torch.equal(layer.w.grad, torch.zeros_like(layer.w))
    assert layer.b.grad.tolist() == [9.0, 9.0]


def test_l2_pooling_keeps_what_is_not_finite():
    x = torch.zeros(1, 1, 2, 6)
    x[..., 0, 0], x[..., 0, 2], x[..., 0, 4] = math.nan, math.inf, -math.inf
    values = PoolLayer((1, 1, 2, 6), pooling="l2")(x).flatten().tolist()
    assert math.isnan(values[0]) and values[1:] == [math.inf, math.inf]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_l2_pooling_in_half_precision_rounds_once(dtype):
    """The squares of float16 numbers from 256 on overflow; those of bfloat16 would lose half of their digits."""
    x = (300 * torch.randn(2, 3, 8, 8)).to(dtype).requires_grad_()
    layer = PoolLayer((2, 3, 8, 8), 4, pooling="l2")
    y = layer(x)
    assert y.dtype == dtype and torch.equal(y, layer(x.float()).to(dtype))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    expected = x.detach().float() / y.detach().float().repeat_interleave(4, 2).repeat_interleave(4, 3)
    # The gradient rounds, and so did y, which it does not divide by.
    torch.testing.assert_close(gradient.float(), expected, rtol=2 * torch.finfo(dtype).eps, atol=0.0)


# ----------------------------------------------------------------------------------------------------------
# Initial values
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "fan_in", "fan_out"),
    [
        (lambda **o: ConvPoolLayer((8, 2, 5, 3), (1, 4, 30, 30), stride=(2, 1), groups=2, **o), 30, 4 * 15 // (2 * 4)),
        (lambda **o: ConvPoolLayer((8, 4, 5, 3), (1, 4, 30, 30), 3, pool_stride=(1, 2), **o), 60, 8 * 15 // 2),
        (lambda **o: ConvPoolLayer((8, 4, 5, 3), (1, 4, 30, 30), (3, 4), pooling="l2", **o), 60, 8 * 15 // 12),
        (lambda **o: ConvPoolLayer((1, 1, 2, 2), (1, 1, 30, 30), stride=4, **o), 4, 1),
        (lambda **o: ConvLayer((8, 2, 5, 3), (1, 4, 30, 30), stride=(2, 3), groups=2, padding=1, **o), 30, 4 * 15 // 6),
    ],
)
@pytest.mark.parametrize("init", ["book", "lecun", "he"])
def test_initial_values(make, fan_in, fan_out, init):
    layer = make(init=init, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    std = math.sqrt({"book": 1 / fan_out, "lecun": 1 / fan_in, "he": 2 / fan_in}[init])
    w = torch.empty_like(layer.w).normal_(0.0, std, generator=torch.Generator().manual_seed(3))
    assert torch.equal(layer.w, w)
    assert bool(layer.b.any()) == (init != "he")


# ----------------------------------------------------------------------------------------------------------
# Networks
# ----------------------------------------------------------------------------------------------------------


class Halved(network3.Layer):
    """A layer of the user's without parameters."""

    params = []

    def __init__(self, n):
        super().__init__()
        self.n_in = self.n_out = n

    def forward(self, inpt):
        return inpt / 2


@pytest.mark.parametrize(("lmbda", "momentum"), [(0.0, 0.0), (2.0, 0.5)])
@pytest.mark.parametrize("first", [PoolLayer((5, 1, 8, 8), pooling="l2"), PoolLayer((5, 1, 8, 8)), Halved(64)], ids=str)
def test_networks_with_layers_without_parameters(first, lmbda, momentum):
    """They train as their outputs do, in the dtype of the layers behind them."""

    def rest():
        options = {"dtype": torch.float64, "generator": torch.Generator().manual_seed(2)}
        return [FullyConnectedLayer(first.n_out, 7, **options), SoftmaxLayer(7, 3, dtype=torch.float64)]

    network, other = Network([first, *rest()], 5), Network(rest(), 5)
    assert [p.shape for p in network.params] == [p.shape for p in other.params]
    x, y = torch.rand(30, 64), torch.randint(3, (30,))
    data = [(x, y), (first(x.double()).flatten(1), y)]
    with pytest.warns(UserWarning, match=r"training is not compiled: layer 0"):
        network.SGD(data[0], 2, 5, 0.1, data[0], data[0], lmbda, momentum=momentum, verbose=False)
    other.SGD(data[1], 2, 5, 0.1, data[1], None, lmbda, momentum=momentum, verbose=False, compiled=False)
    for p, o in zip(network.params, other.params, strict=True):
        torch.testing.assert_close(p, o, rtol=1e-12, atol=1e-12)
    assert network.accuracy(data[0]) == other.accuracy(data[1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Network([PoolLayer((10, 1, 8, 8)), PoolLayer((10, 1, 4, 4))], 10),
            "expected at least one layer with parameters, but got only PoolLayer, PoolLayer",
        ),
        (
            lambda: Network([PoolLayer((20, 1, 8, 8)), SoftmaxLayer(16, 3)], 10),
            r"layer 0 \(PoolLayer\) has image_shape \(20, 1, 8, 8\), that is mini-batches of 20, but mini_batch_size "
            "is 10",
        ),
        (
            lambda: Network([ConvLayer((2, 1, 3, 3), (20, 1, 8, 8)), SoftmaxLayer(72, 3)], 10),
            r"layer 0 \(ConvLayer\) has image_shape \(20, 1, 8, 8\), that is mini-batches of 20",
        ),
        (
            lambda: Network([PoolLayer((10, 1, 8, 8)), SoftmaxLayer(64, 3)], 10),
            r"layer 1 \(SoftmaxLayer\) takes 64 inputs, but layer 0 \(PoolLayer\) gives 16",
        ),
        (
            lambda: ConvPoolLayer((4, 4, 3, 3), (10, 4, 8, 8), groups=2),
            r"filter_shape \(4, 4, 3, 3\) is for 8 input maps in 2 groups, but image_shape \(10, 4, 8, 8\) has 4",
        ),
        (
            lambda: ConvLayer((3, 2, 3, 3), (10, 4, 8, 8), groups=2),
            "expected the filters to be a multiple of groups, but got 3 and 2",
        ),
        (lambda: ConvLayer((2, 1, 3, 3), (10, 1, 8, 8), groups=0), "groups must be at least 1, but got 0"),
        (lambda: ConvLayer((2, 1, 3, 3), (10, 1, 8, 8), stride=0), "stride must be at least 1, but got 0"),
        (
            lambda: ConvLayer((2, 1, 3, 3), (10, 1, 8, 8), padding=(1, -1)),
            r"padding\[1\] must be at least 0, but got -1",
        ),
        (
            lambda: ConvPoolLayer((2, 1, 3, 3), (10, 1, 8, 8), pool_stride=(2, 2, 2)),
            r"pool_stride must have 2 entries, but got \(2, 2, 2\)",
        ),
        (
            lambda: ConvPoolLayer((2, 1, 3, 3), (10, 1, 8, 8), pooling="mean"),
            "pooling must be 'max' or 'l2', but got 'mean'",
        ),
        (lambda: PoolLayer((10, 1, 8, 8), pooling=None), "pooling must be 'max' or 'l2', but got None"),
        (lambda: PoolLayer((10, 8, 8)), r"image_shape must have 4 entries, but got \(10, 8, 8\)"),
        (
            lambda: PoolLayer((10, 1, 8, 3), (2, 4)),
            "pooling windows of 2x4 leave nothing of an image of 8x3",
        ),
        (
            lambda: ConvLayer((2, 1, 5, 11), (10, 1, 8, 8), padding=1),
            r"filters of 5x11 with padding \(1, 1\) leave nothing of an image of 8x8",
        ),
        (
            lambda: ConvPoolLayer((2, 1, 5, 5), (10, 1, 8, 8), stride=4),
            "filters of 5x5 and a pooling window of 2x2 leave nothing of an image of 8x8",
        ),
    ],
)
def test_bad_layers(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: ConvLayer((2, 1, 3, 3), (10, 1, 8, 8), padding=1.0),
            "padding must be an int or a pair of ints, but got 1.0",
        ),
        (
            lambda: ConvLayer((2, 1, 3, 3), (10, 1, 8, 8), padding="same"),
            "padding must be an int or a pair of ints, but got 'same'",
        ),
        (lambda: ConvLayer((2, 1, 3, 3), (10, 1, 8, 8), stride=True), "stride must be an int, but got bool"),
        (lambda: ConvLayer((2, 1, 3, 3), (10, 1, 8, 8), groups=1.0), "groups must be an int, but got float"),
        (
            lambda: PoolLayer((10, 1, 8, 8), pool_stride=(1, 2.0)),
            r"pool_stride\[1\] must be an int, but got float",
        ),
        (lambda: PoolLayer(8), "image_shape must be a sequence of 4 ints, but got 8"),
    ],
)
def test_arguments_of_a_wrong_type(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_a_layer_with_parameters_needs_both():
    class WithoutBiases(network3.Layer):
        def __init__(self):
            super().__init__()
            self.n_in, self.n_out, self.w = 6, 6, nn.Parameter(torch.zeros(6, 6))

        def forward(self, inpt):
            return inpt @ self.w

    with pytest.raises(TypeError, match=r"layer 0 \(WithoutBiases\) lacks b; a layer has n_in"):
        Network([WithoutBiases(), SoftmaxLayer(6, 3)], 10)
