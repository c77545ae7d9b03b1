from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor

def isa() -> str:
    """Name of the instruction set in use."""

def set_isa(name: str) -> None:
    """Choose the instruction set of the CPU kernels, for the whole process.

    Raises ValueError for a name that is not compiled in or that this CPU does not support.
    """

def compiled_isas() -> list[str]:
    """Instruction sets compiled in, slowest first; this CPU need not support all of them."""

def exact() -> bool:
    """Whether the CPU's convolutions are restricted to exact kernels."""

def set_exact(only_exact: bool) -> None:
    """Restrict the CPU's convolutions to exact kernels, or do not, for the whole process.

    An exact kernel sums products of inputs and weights as they are, so that it is exact wherever every partial sum is
    representable. The others, Winograd's, first form sums of inputs and of weights.
    """

def _load_kernel_table(path: str) -> str:
    """Load kernels from a shared library, for tests: set_isa() accepts the name returned, compiled_isas() is unchanged.

    Raises RuntimeError where the library cannot be loaded or does not export pyconv_kernel_table().
    """

def cuda_built() -> bool:
    """Whether the CUDA kernels are compiled in."""

def conv_max_pool2d_kernels() -> list[tuple[str, bool, str]]:
    """The dispatch lists of the instruction set in use, best first: name, whether it is live, what it accepts."""

def conv_max_pool2d_plan(
    input_size: Sequence[int],
    weight_size: Sequence[int],
    dtype: torch.dtype,
    format: torch.memory_format,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    pool_size: Sequence[int],
    pool_stride: Sequence[int],
    pool_padding: Sequence[int],
    pool_dilation: Sequence[int],
    ceil_mode: bool,
    activation: str,
) -> dict[str, Any]:
    """What a call on the CPU with tensors of these sizes would do; none are made. `format` is that of both.

    Returns "convolution" (N, K, OH, OW), "output" (N, K, PH, PW), and "phases", a list of "name", "writes" (names of
    tensors), "threads" and "kernels": those asked in turn, of which the last "runs" and alone has "workspace_bytes";
    each has "name", "accepts" (in words) and "exact". Raises what the call would raise.
    """

def conv_max_pool2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    groups: int,
    pool_size: int | Sequence[int],
    pool_stride: int | Sequence[int] | None,
    pool_padding: int | Sequence[int],
    pool_dilation: int | Sequence[int],
    ceil_mode: bool,
    activation: str,
    /,
) -> Tensor:
    """torch.ops.pyconv.conv_max_pool2d by a shorter way, of arguments as pyconv.functional.conv_max_pool2d takes them.

    NotImplemented where that is not the way: an argument is no tensor but a subclass, no int but a bool, unknown, ...
    or a __torch_function__ mode is active.
    """

def dropout(input: Tensor, p: float, training: bool, inverted: bool, generator: Generator | None) -> Tensor:
    """torch.ops.pyconv.dropout by a shorter way."""

def bias_act_dropout(
    input: Tensor,
    bias: Tensor | None,
    activation: str,
    p: float,
    training: bool,
    inverted: bool,
    generator: Generator | None,
) -> Tensor:
    """torch.ops.pyconv.bias_act_dropout by a shorter way."""

def random_distortion(
    images: Tensor,
    positions: Tensor,
    output: Tensor,
    seed: int,
    epoch: int,
    most: Sequence[float],
    smoothing: Tensor,
    padding: int,
    flip: float,
) -> None:
    """pyconv.RandomDistortion on the CPU: images (N, C, H, W) distorted into output (N, C, h, w), which may be images.

    `most`: shift down, shift to the right, rotation in radians, scale, shear, elastic. `smoothing` (radius + 1,)
    float64: half of the Gaussian, from its middle on. Raises ValueError for a negative position.
    """

class TrainingPlan:
    """A training step as a list of operations on memory made once; see pyconv.lowering.PlanBuilder."""

    def __init__(self, like: Tensor, batch: int, features: int, classes: int) -> None:
        """For parameters and examples of the dtype of `like`, and mini-batches of at most `batch`."""

    def add_parameter(self, tensor: Tensor, trained: bool, in_l2: bool) -> int:
        """The number of a parameter, which is trained in place; with in_l2 its squares belong to the cost."""

    def add_generator(self, generator: Generator | None) -> int: ...
    def add_conv_max_pool2d(
        self,
        weight: int,
        bias: int,
        input_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        pool_size: Sequence[int],
        pool_stride: Sequence[int],
        pool_padding: Sequence[int],
        pool_dilation: Sequence[int],
        ceil_mode: bool,
        activation: str,
    ) -> list[int]:
        """Parameters by number, a bias of -1 for none; the shape (K, PH, PW) of an example behind it."""

    def add_dense(self, matrix: int, inputs_are_rows: bool) -> None: ...
    def add_bias_act_dropout(
        self, columns: int, bias: int, activation: str, p: float, scale: float, generator: int
    ) -> None: ...
    def finish(self) -> None:
        """Make the memory. Nothing can be added any more."""

    def set_l2(self, factor: float) -> None:
        """The cost's factor of the sum of squares."""

    def set_step(
        self,
        parameter: int,
        rate: float,
        decay: float,
        momentum: float,
        dampening: float,
        nesterov: bool,
        first: bool,
        buffer: Tensor | None,
    ) -> None:
        """The settings of torch.optim.SGD for a parameter; first: its momentum buffer holds nothing yet."""

    def set_rate(self, rate: float) -> None:
        """The learning rate of all parameters."""

    def run(
        self,
        x: Tensor,
        labels: Tensor,
        order: Tensor | None,
        count: int,
        mini_batch: int,
        first: int,
        last: int,
        seconds: float,
    ) -> tuple[int, list[float], bool]:
        """Mini-batches [first, last) of the first `count` examples, in the given order, until `seconds` have passed.

        Returns how many were done, their costs before the update, and whether the next one's cost, then the last of
        the list, is finite; if it is not, that mini-batch has changed nothing.
        """

    def forget_squares(self) -> None:
        """The values of parameters may have been changed from outside."""

    def describe(self) -> list[dict[str, Any]]: ...
    @property
    def buffer_bytes(self) -> int: ...
    @property
    def mini_batches(self) -> int:
        """Done so far."""
