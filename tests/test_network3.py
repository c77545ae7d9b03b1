"""The arithmetic of pyconv.network3 against an independent implementation in numpy.

The reference below shares nothing with pyconv but the initial weights: it has its own forward and backward
pass of every layer, in float64. In float32 the two could pick different, equally good positions of a pooling
window, or disagree whether a unit of ReLU next to zero is alive; there it is given the kernel's own choice.
Dropout masks it is given too.
"""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch

import pyconv.network3 as network3
from pyconv import functional
from pyconv.network3 import ConvPoolLayer, FullyConnectedLayer, Network, ReLU, SoftmaxLayer

# ----------------------------------------------------------------------------------------------------------
# The reference
# ----------------------------------------------------------------------------------------------------------

ACTIVATIONS = {  # function of z, and its derivative in terms of z and the output
    network3.sigmoid: (lambda z: 1 / (1 + np.exp(-z)), lambda z, a: a * (1 - a)),
    network3.tanh: (np.tanh, lambda z, a: 1 - a**2),
    network3.ReLU: (lambda z: np.maximum(z, 0), lambda z, a: (z > 0).astype(float)),
    network3.linear: (lambda z: z, lambda z, a: np.ones_like(z)),
}


class ReferenceConvPool:
    def __init__(self, layer):
        self.w, self.b = (p.detach().double().numpy().copy() for p in layer.params)
        self.image_shape, self.pool = layer.image_shape[1:], layer.poolsize
        self.relu = layer.activation_fn is ReLU
        self.act, self.derivative = ACTIVATIONS[layer.activation_fn]

    def forward(self, x, argmax=None):
        x = x.reshape(len(x), *self.image_shape)
        kernel, (ph, pw) = self.w.shape[2:], self.pool
        self.x_shape = x.shape
        self.patches = np.lib.stride_tricks.sliding_window_view(x, kernel, axis=(2, 3))  # N C OH OW kh kw
        conv = np.einsum("nchwij,kcij->nkhw", self.patches, self.w, optimize=True)
        n, k, height, width = conv.shape
        height, width = height // ph, width // pw
        windows = conv[:, :, : height * ph, : width * pw].reshape(n, k, height, ph, width, pw)
        windows = windows.transpose(0, 1, 2, 4, 3, 5).reshape(n, k, height, width, ph * pw)
        given = argmax is not None  # 255 where ReLU is dead
        self.argmax = np.where(argmax == 255, 0, argmax) if given else windows.argmax(-1)
        self.conv_shape = conv.shape
        self.z = np.take_along_axis(windows, self.argmax[..., None], -1)[..., 0] + self.b[:, None, None]
        self.out = self.act(self.z)
        self.slope = argmax != 255 if given and self.relu else self.derivative(self.z, self.out)
        return self.out

    def backward(self, grad):
        dz = grad.reshape(self.out.shape) * self.slope
        n, k, height, width = dz.shape
        rows = np.arange(height)[:, None] * self.pool[0] + self.argmax // self.pool[1]
        columns = np.arange(width) * self.pool[1] + self.argmax % self.pool[1]
        dconv = np.zeros(self.conv_shape)
        np.put_along_axis(
            dconv.reshape(n, k, -1),
            (rows * self.conv_shape[3] + columns).reshape(n, k, -1),
            dz.reshape(n, k, -1),
            axis=-1,
        )
        dw = np.einsum("nkhw,nchwij->kcij", dconv, self.patches, optimize=True)
        dx = np.zeros(self.x_shape)
        for i in range(self.w.shape[2]):
            for j in range(self.w.shape[3]):
                dx[:, :, i : i + dconv.shape[2], j : j + dconv.shape[3]] += np.einsum(
                    "nkhw,kc->nchw", dconv, self.w[:, :, i, j], optimize=True
                )
        return dx, dw, dz.sum((0, 2, 3))


class ReferenceFullyConnected:
    def __init__(self, layer):
        self.w, self.b = (p.detach().double().numpy().copy() for p in layer.params)
        softmax = isinstance(layer, SoftmaxLayer)
        self.act, self.derivative = ACTIVATIONS[network3.linear if softmax else layer.activation_fn]

    def forward(self, x, mask=None, live=None):
        x = x.reshape(len(x), -1)
        self.mask = np.ones_like(x) if mask is None else mask
        self.x = x * self.mask
        self.z = self.x @ self.w + self.b
        self.out = self.act(self.z)
        self.slope = self.derivative(self.z, self.out) if live is None else live
        return self.out

    def backward(self, grad):
        dz = grad * self.slope
        return (dz @ self.w.T) * self.mask, self.x.T @ dz, dz.sum(0)


class ReferenceNetwork:
    def __init__(self, network):
        self.layers = [
            (ReferenceConvPool if isinstance(layer, ConvPoolLayer) else ReferenceFullyConnected)(layer)
            for layer in network.layers
        ]

    @property
    def params(self):
        return [p for layer in self.layers for p in (layer.w, layer.b)]

    def logits(self, x, given=None):
        for i, layer in enumerate(self.layers):
            x = layer.forward(x, **(given[i] if given else {}))
        return x

    def cost_and_gradients(self, x, y, given=None):
        """`given`: for each layer what its forward pass is to be told, by name."""
        z = self.logits(x, given)
        z = z - z.max(1, keepdims=True)
        log_p = z - np.log(np.exp(z).sum(1, keepdims=True))
        examples = np.arange(len(y))
        grad = np.exp(log_p)
        grad[examples, y] -= 1
        grad /= len(y)
        gradients = []
        for layer in reversed(self.layers):
            grad, dw, db = layer.backward(grad)
            gradients += [db, dw]
        return -log_p[examples, y].mean(), gradients[::-1]

    def step(self, x, y, eta, lmbda, num_batches, given=None):
        cost, gradients = self.cost_and_gradients(x, y, given)
        cost += 0.5 * lmbda * sum((layer.w**2).sum() for layer in self.layers) / num_batches
        for i, layer in enumerate(self.layers):
            layer.w = layer.w - eta * (gradients[2 * i] + lmbda * layer.w / num_batches)
            layer.b = layer.b - eta * gradients[2 * i + 1]
        return cost


def worst_difference(params, reference_params):
    """The largest over the parameters of |difference| / |reference|, in the Euclidean norm."""
    return max(
        np.linalg.norm(p.detach().double().numpy() - r) / np.linalg.norm(r)
        for p, r in zip(params, reference_params, strict=True)
    )


# ----------------------------------------------------------------------------------------------------------
# Networks and data
# ----------------------------------------------------------------------------------------------------------

MB = 10


def make_network(activation_fn, dtype, p_dropout=0.0, *, small=False, seed=0):
    """Two convolutional layers, the book's or small ones on 16x16, a fully connected and a softmax layer."""
    generator = torch.Generator().manual_seed(seed)
    options = {"dtype": dtype, "generator": generator}
    if small:
        filters = (ConvPoolLayer((4, 1, 5, 5), (MB, 1, 16, 16), (2, 2), activation_fn, **options),)
        filters += (
            ConvPoolLayer((6, 4, 3, 3), (MB, 4, 6, 6), (2, 2), activation_fn, init="lecun", **options),
        )
    else:
        filters = (ConvPoolLayer((20, 1, 5, 5), (MB, 1, 28, 28), (2, 2), activation_fn, **options),)
        filters += (
            ConvPoolLayer((40, 20, 5, 5), (MB, 20, 12, 12), (2, 2), activation_fn, init="lecun", **options),
        )
    network = Network(
        [
            *filters,
            FullyConnectedLayer(filters[-1].n_out, 30, activation_fn, p_dropout, **options),
            SoftmaxLayer(30, 10, p_dropout, dtype=dtype),
        ],
        MB,
    )
    with torch.no_grad():  # from zeros, the first step would move nothing but the softmax layer
        network.layers[-1].w.normal_(0.0, 0.2, generator=generator)
        network.layers[-1].b.normal_(0.0, 0.2, generator=generator)
    return network


def make_data(network, n, seed=1):
    """Random images, so that no two positions of a pooling window tie, with random labels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, network.layers[0].n_in, generator=generator, dtype=torch.float64)
    return x.to(network.params[0].dtype), torch.randint(0, 10, (n,), generator=generator)


def batches(data):
    return list(zip(*(part.split(MB) for part in data), strict=True))


# ----------------------------------------------------------------------------------------------------------
# Agreement
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lmbda", [0.0, 5.0])
@pytest.mark.parametrize(
    ("activation_fn", "small"),
    [
        (network3.sigmoid, True),
        (network3.tanh, True),
        (network3.ReLU, True),
        (network3.linear, True),
        (network3.ReLU, False),
    ],
)
def test_fifty_mini_batches_in_float64(activation_fn, small, lmbda):
    eta = 0.03
    network = make_network(activation_fn, torch.float64, small=small)
    reference = ReferenceNetwork(network)
    start = [p.copy() for p in reference.params]
    data = make_data(network, 50 * MB)

    history = network.SGD(data, 1, MB, eta, data, None, lmbda, verbose=False)
    costs = [reference.step(x.numpy(), y.numpy(), eta, lmbda, 50) for x, y in batches(data)]

    assert worst_difference(network.params, reference.params) <= 1e-9
    assert history["train_cost"][0] == pytest.approx(np.mean(costs), rel=1e-12)
    moved = [np.linalg.norm(p - s) / np.linalg.norm(s) for p, s in zip(reference.params, start, strict=True)]
    assert min(moved) > 1e-4, "a parameter that does not move proves nothing"


def kernel_choices(network, x):
    """The position the kernel chooses in each pooling window, and the hidden units it finds alive."""
    choices = []
    for layer in network.layers[:2]:
        activation = {network3.ReLU: "relu", network3.sigmoid: "sigmoid"}[layer.activation_fn]
        x, argmax, _ = torch.ops.pyconv._conv_max_pool2d_forward(
            x.reshape(len(x), *layer.image_shape[1:]),
            layer.w.detach(),
            layer.b.detach(),
            pool_size=layer.poolsize,
            activation=activation,
        )
        choices.append({"argmax": argmax.numpy()})
    hidden = network.layers[2]
    live = {"live": (hidden(x) > 0).double().numpy()} if hidden.activation_fn is ReLU else {}
    return [*choices, live, {}]


@pytest.mark.parametrize(
    ("activation_fn", "small", "lmbda"),
    [
        (network3.ReLU, False, 0.0),
        (network3.ReLU, False, 0.1),
        (network3.sigmoid, True, 0.0),
        (network3.sigmoid, True, 0.1),
    ],
)
def test_fifty_single_steps_in_float32(activation_fn, small, lmbda):
    eta = 0.03
    network = make_network(activation_fn, torch.float32, small=small)
    reference = ReferenceNetwork(network)
    data = make_data(network, 50 * MB)
    worst_param, errors, norms = 0.0, [], []
    for x, y in batches(data):
        with torch.no_grad():
            for p, r in zip(network.params, reference.params, strict=True):
                p.copy_(torch.from_numpy(r))
        given = kernel_choices(network, x)

        gradients = torch.autograd.grad(network.cost(x, y), network.params)
        _, expected = reference.cost_and_gradients(x.double().numpy(), y.numpy(), given)
        errors.append(
            [np.linalg.norm(g.double().numpy() - e) for g, e in zip(gradients, expected, strict=True)]
        )
        norms.append([np.linalg.norm(e) for e in expected])

        network.SGD((x, y), 1, MB, eta, (x, y), None, lmbda, verbose=False)
        reference.step(x.double().numpy(), y.numpy(), eta, lmbda, 1, given)
        worst_param = max(worst_param, worst_difference(network.params, reference.params))
    assert worst_param <= 1e-5
    # Against the largest gradient of the fifty, since a sum that happens to cancel has no relative precision.
    assert (np.max(errors, axis=0) / np.max(norms, axis=0)).max() <= 1e-5


@pytest.mark.parametrize("p_dropout", [0.5, 0.3])
def test_dropout_with_the_recovered_mask(p_dropout):
    eta, lmbda = 0.03, 0.1
    network = make_network(network3.ReLU, torch.float64, p_dropout, small=True)
    reference = ReferenceNetwork(network)
    data = make_data(network, 50 * MB)
    for layer in network.layers:
        layer.generator = torch.Generator()
    dropped = []
    for i, (x, y) in enumerate(batches(data)):
        given = [{}, {}]
        for layer in network.layers[2:]:
            layer.generator.manual_seed(100 * i + layer.n_in)
            ones = torch.ones(MB, layer.n_in, dtype=torch.float64)
            mask = functional.dropout(
                ones, p_dropout, True, inverted=False, generator=layer.generator
            ).numpy()
            assert set(np.unique(mask)) == {0.0, 1.0}
            dropped.append(1 - mask.mean())
            given.append({"mask": mask})
            layer.generator.manual_seed(100 * i + layer.n_in)

        network.SGD((x, y), 1, MB, eta, (x, y), None, lmbda, verbose=False)
        reference.step(x.numpy(), y.numpy(), eta, lmbda, 1, given)
        assert worst_difference(network.params, reference.params) <= 1e-9
    assert np.mean(dropped) == pytest.approx(p_dropout, abs=0.02)


def test_inference_scales_the_input_by_one_minus_p():
    network = make_network(network3.sigmoid, torch.float64, p_dropout=0.3, small=True)
    x, _ = make_data(network, 7)
    reference = ReferenceNetwork(network)
    given = [{}, {}, {"mask": np.full((7, 24), 0.7)}, {"mask": np.full((7, 30), 0.7)}]
    z = reference.logits(x.numpy(), given)
    expected = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    np.testing.assert_allclose(network.eval()(x).detach().numpy(), expected, rtol=1e-12)
    np.testing.assert_array_equal(network.predict(x).numpy(), z.argmax(1))


def test_pooling_ignores_the_border():
    """A 6x6 map under a window of 4x3 keeps one row and two columns of windows."""
    layer = ConvPoolLayer((2, 1, 3, 3), (1, 1, 8, 8), (4, 3), network3.linear, dtype=torch.float64)
    x = torch.rand(1, 64, dtype=torch.float64)
    assert layer.output_shape == (2, 1, 2) and layer.n_out == 4
    np.testing.assert_allclose(
        layer(x).detach().numpy(), ReferenceConvPool(layer).forward(x.numpy()), rtol=1e-12
    )


def test_any_function_of_a_tensor_is_an_activation():
    """An unfused activation_fn gives the values and gradients of the fused one."""

    def own_tanh(z):
        return torch.exp(z).sub(torch.exp(-z)).div(torch.exp(z).add(torch.exp(-z)))

    fused = make_network(network3.tanh, torch.float64, small=True)
    unfused = make_network(own_tanh, torch.float64, small=True)
    x, y = make_data(fused, MB)
    gradients = [torch.autograd.grad(network.cost(x, y), network.params) for network in (fused, unfused)]
    for expected, actual in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-14)


# ----------------------------------------------------------------------------------------------------------
# Functions and layers
# ----------------------------------------------------------------------------------------------------------


def test_activation_functions():
    z = torch.tensor([-2.0, -0.0, 0.5, 3.0], dtype=torch.float64)
    for function, (expected, _) in ACTIVATIONS.items():
        np.testing.assert_allclose(function(z).numpy(), expected(z.numpy()), rtol=1e-15)


def test_dropout_layer_masks_without_rescaling():
    torch.manual_seed(0)
    layer = torch.full((1000, 100), 3.0)
    dropped = network3.dropout_layer(layer, 0.25)
    assert set(dropped.unique().tolist()) == {0.0, 3.0}
    assert (dropped == 0).double().mean().item() == pytest.approx(0.25, abs=0.01)


def test_size():
    assert network3.size((torch.rand(23, 784), torch.zeros(23, dtype=torch.int64))) == 23


@pytest.mark.parametrize(
    ("init", "conv_variance", "fc_variance", "bias_std"),
    [
        ("book", 1 / (80 * 25 // 4), 1 / 400, 1.0),
        ("lecun", 1 / (40 * 25), 1 / 300, 1.0),
        ("he", 2 / (40 * 25), 2 / 300, 0.0),
    ],
)
def test_initial_values(init, conv_variance, fc_variance, bias_std):
    generator = torch.Generator().manual_seed(0)
    conv = ConvPoolLayer((80, 40, 5, 5), (1, 40, 12, 12), init=init, generator=generator)
    fc = FullyConnectedLayer(300, 400, init=init, generator=generator)
    for layer, variance in ((conv, conv_variance), (fc, fc_variance)):
        assert layer.w.mean().item() == pytest.approx(0.0, abs=0.01 * math.sqrt(variance))
        assert layer.w.var().item() == pytest.approx(variance, rel=0.02)
        assert layer.b.std().item() == pytest.approx(bias_std, rel=0.25)


def test_book_is_the_default_and_softmax_starts_at_zero():
    layers = [
        FullyConnectedLayer(20, 10, generator=torch.Generator().manual_seed(3), **options)
        for options in ({}, {"init": "book"})
    ]
    assert torch.equal(layers[0].w, layers[1].w) and torch.equal(layers[0].b, layers[1].b)
    softmax = SoftmaxLayer(20, 10)
    assert not softmax.w.any() and not softmax.b.any()


def test_attributes():
    network = make_network(network3.ReLU, torch.float32, p_dropout=0.5)
    conv, _, fc, softmax = network.layers
    assert conv.w.shape == (20, 1, 5, 5) and conv.b.shape == (20,)
    assert fc.w.shape == (640, 30) and fc.b.shape == (30,)
    assert softmax.w.shape == (30, 10) and softmax.b.shape == (10,)
    assert (conv.n_in, conv.n_out, conv.p_dropout) == (784, 2880, 0.0)
    assert (fc.n_in, fc.n_out, fc.p_dropout) == (640, 30, 0.5)
    assert (softmax.n_in, softmax.n_out, softmax.p_dropout) == (30, 10, 0.5)
    assert network.mini_batch_size == MB and len(network.layers) == 4
    expected = [param for layer in network.layers for param in (layer.w, layer.b)]
    assert [id(p) for p in network.params] == [id(p) for p in expected]
    assert all(isinstance(p, torch.nn.Parameter) for p in network.params)
    assert [id(p) for p in fc.params] == [id(fc.w), id(fc.b)]


def test_dtype_and_device():
    layers = [
        ConvPoolLayer((2, 1, 3, 3), (1, 1, 8, 8), dtype=torch.float64, device="meta"),
        FullyConnectedLayer(4, 3, dtype=torch.float64, device="meta"),
        SoftmaxLayer(4, 3, dtype=torch.float64, device="meta"),
    ]
    for param in (param for layer in layers for param in layer.params):
        assert param.dtype == torch.float64 and param.device.type == "meta"


def test_y_out_and_accuracy_of_the_last_evaluation():
    network = make_network(network3.ReLU, torch.float32, small=True).eval()
    softmax = network.layers[-1]
    with pytest.raises(RuntimeError, match="has not evaluated"):
        _ = softmax.y_out
    x, _ = make_data(network, MB)
    probabilities = network(x)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(MB))
    assert torch.equal(softmax.y_out, probabilities.argmax(1))
    y = softmax.y_out.clone()
    y[:3] = (y[:3] + 1) % 10
    assert softmax.accuracy(y) == 0.7
    with pytest.raises(RuntimeError, match=r"expected y of shape \(10,\), but got \(3,\)"):
        softmax.accuracy(y[:3])


def test_network_accuracy_counts_every_example():
    network = make_network(network3.ReLU, torch.float32, p_dropout=0.5, small=True)
    x, _ = make_data(network, 1003)
    y = network.predict(x)
    assert y.shape == (1003,) and y.dtype == torch.int64
    y[-1] = (y[-1] + 1) % 10
    assert network.accuracy((x, y)) == 1002 / 1003
    assert network.training, "an evaluation leaves the mode as it was"


def test_one_generator_repeats_values_and_masks():
    def train():
        generator = torch.Generator().manual_seed(7)
        hidden = FullyConnectedLayer(30, 20, ReLU, 0.5, generator=generator)
        network = Network([hidden, SoftmaxLayer(20, 10)], MB)
        data = make_data(network, 5 * MB)
        network.SGD(data, 1, MB, 0.1, data, None, verbose=False)
        return network.params

    torch.manual_seed(0)
    first = train()
    torch.manual_seed(1)
    assert all(torch.equal(a, b) for a, b in zip(first, train(), strict=True))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda network: pickle.loads(pickle.dumps(network))])
def test_copies_are_independent(copied):
    network = make_network(network3.ReLU, torch.float32, p_dropout=0.5, small=True)
    data = make_data(network, MB)
    network.SGD(data, 1, MB, 0.1, data, None, verbose=False)
    other = copied(network)
    assert all(torch.equal(a, b) for a, b in zip(network.params, other.params, strict=True))
    before = [p.detach().clone() for p in network.params]
    other.SGD(data, 1, MB, 0.1, data, None, verbose=False)
    assert all(torch.equal(a, b) for a, b in zip(network.params, before, strict=True))
    assert not torch.equal(network.params[0], other.params[0])
