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
