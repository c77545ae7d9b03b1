"""The operators as nn.Modules: parameters, initialisation, representation; no arithmetic."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyconv import functional


def _as_pair(value: int | Sequence[int]) -> tuple[int, ...]:
    return (value, value) if isinstance(value, int) else tuple(value)


class ConvMaxPool2d(nn.Module):
    """Convolution, max-pooling, bias and activation as one layer; see :func:`pyconv.functional.conv_max_pool2d`.

    Equivalent to ``nn.Sequential(nn.Conv2d(in_channels, out_channels, kernel_size), nn.MaxPool2d(pool_size),
    activation)``. Parameters have the names, shapes and initialisation of ``nn.Conv2d``, whose state_dict loads.

    Args:
        in_channels, out_channels: C and K.
        kernel_size: an int or a pair (height, width).
        pool_size: an int or a pair.
        bias: whether there is a bias of shape (out_channels,).
        Others: as in :func:`pyconv.functional.conv_max_pool2d`.

    Shape:
        (N, in_channels, H, W) or (in_channels, H, W) -> (N, out_channels, PH, PW) or (out_channels, PH, PW).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        pool_size: int | Sequence[int] = 2,
        *,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        pool_stride: int | Sequence[int] | None = None,
        pool_padding: int | Sequence[int] = 0,
        pool_dilation: int | Sequence[int] = 1,
        ceil_mode: bool = False,
        activation: str = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if groups <= 0:
            raise ValueError("groups must be a positive integer")
        if in_channels % groups != 0:
            raise ValueError("in_channels must be divisible by groups")
        if out_channels % groups != 0:
            raise ValueError("out_channels must be divisible by groups")
        functional._check_activation(activation, "ConvMaxPool2d")
        if isinstance(padding, str) and padding not in ("same", "valid"):
            raise ValueError(f"Invalid padding string {padding!r}, should be one of 'same', 'valid'")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = _as_pair(kernel_size)
        self.stride = _as_pair(stride)
        self.padding = padding if isinstance(padding, str) else _as_pair(padding)
        if self.padding == "same" and any(s != 1 for s in self.stride):
            raise ValueError("padding='same' is not supported for strided convolutions")
        self.dilation = _as_pair(dilation)
        self.groups = groups
        self.pool_size = _as_pair(pool_size)
        self.pool_stride = self.pool_size if pool_stride is None else _as_pair(pool_stride)
        self.pool_padding = _as_pair(pool_padding)
        self.pool_dilation = _as_pair(pool_dilation)
        self.ceil_mode = ceil_mode
        self.activation = activation
        shape = (out_channels, in_channels // groups, *self.kernel_size)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As nn.Conv2d: uniform with bound 1 / sqrt(fan_in)."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            fan_in = self.weight.shape[1:].numel()
            bound = 1 / math.sqrt(fan_in) if fan_in > 0 else 0
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, input: Tensor) -> Tensor:
        # nn.Module.__getattr__ takes a microsecond to find these two. Where one is parametrized or pruned, it is no
        # parameter of this module but an attribute.
        parameters = self._parameters
        return functional.conv_max_pool2d(
            input,
            parameters["weight"] if "weight" in parameters else self.weight,
            parameters["bias"] if "bias" in parameters else self.bias,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            pool_size=self.pool_size,
            pool_stride=self.pool_stride,
            pool_padding=self.pool_padding,
            pool_dilation=self.pool_dilation,
            ceil_mode=self.ceil_mode,
            activation=self.activation,
        )

    def extra_repr(self) -> str:
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, pool_size={self.pool_size}"]
        defaults = {
            "stride": (1, 1),
            "padding": (0, 0),
            "dilation": (1, 1),
            "groups": 1,
            "pool_stride": self.pool_size,
            "pool_padding": (0, 0),
            "pool_dilation": (1, 1),
            "ceil_mode": False,
            "activation": "none",
        }
        parts += [f"{name}={getattr(self, name)!r}" for name, value in defaults.items() if getattr(self, name) != value]
        if self.bias is None:
            parts.append("bias=False")
        return ", ".join(parts)


def _check_probability(p: float) -> None:
    if not 0 <= p <= 1:
        raise ValueError(f"dropout probability p has to be between 0 and 1, but got {p}")


class Dropout(nn.Module):
    """Dropout with a counter-based mask that is not saved; see :func:`pyconv.functional.dropout`.

    Equivalent to ``nn.Dropout(p)``.

    Args:
        p: probability of an element to be dropped.
        inverted: whether training rather than inference rescales.

    Shape:
        any -> the same.
    """

    def __init__(self, p: float = 0.5, *, inverted: bool = True) -> None:
        super().__init__()
        _check_probability(p)
        self.p = p
        self.inverted = inverted

    def forward(self, input: Tensor) -> Tensor:
        return functional.dropout(input, self.p, self.training, inverted=self.inverted)

    def extra_repr(self) -> str:
        return f"p={self.p}" + ("" if self.inverted else ", inverted=False")


class LinearActDropout(nn.Module):
    """A fully connected layer whose bias, activation and dropout are one pass; see
    :func:`pyconv.functional.bias_act_dropout`.

    Equivalent to ``nn.Sequential(nn.Linear(in_features, out_features, bias), activation, nn.Dropout(p))``.
    Parameters have the names, shapes and initialisation of ``nn.Linear``, whose state_dict loads.

    Args:
        in_features, out_features: sizes of the last dimension of input and output.
        bias: whether there is a bias of shape (out_features,).
        activation: 'none', 'relu', 'sigmoid', 'tanh', 'gelu' (with erf) or 'silu'.
        p: probability of an element of the output to be dropped, after the activation.
        inverted: whether training rather than inference rescales.

    Shape:
        (*, in_features) -> (*, out_features).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        activation: str = "none",
        p: float = 0.0,
        inverted: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        functional._check_activation(activation, "LinearActDropout")
        _check_probability(p)
        self.in_features = in_features
        self.out_features = out_features
        self.activation = activation
        self.p = p
        self.inverted = inverted
        self.weight = nn.Parameter(torch.empty((out_features, in_features), device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As nn.Linear: uniform with bound 1 / sqrt(in_features)."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features) if self.in_features > 0 else 0
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, input: Tensor) -> Tensor:
        return functional.bias_act_dropout(
            nn.functional.linear(input, self.weight),
            self.bias,
            activation=self.activation,
            p=self.p,
            training=self.training,
            inverted=self.inverted,
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, activation={self.activation!r}, p={self.p}"
            + ("" if self.inverted else ", inverted=False")
        )
