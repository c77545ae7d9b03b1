from collections.abc import Sequence

from torch import Generator, Tensor

def isa() -> str:
    """Name of the instruction set in use."""

def set_isa(name: str) -> None:
    """Choose the instruction set of the CPU kernels, for the whole process.

    Raises ValueError for a name that is not compiled in or that this CPU does not support.
    """

def compiled_isas() -> list[str]:
    """Instruction sets compiled in, slowest first; this CPU need not support all of them."""

def _load_kernel_table(path: str) -> str:
    """Load kernels from a shared library, for tests: set_isa() accepts the name returned, compiled_isas() is unchanged.

    Raises RuntimeError where the library cannot be loaded or does not export pyconv_kernel_table().
    """

def cuda_built() -> bool:
    """Whether the CUDA kernels are compiled in."""

def conv_max_pool2d_kernels() -> list[tuple[str, bool, str]]:
    """The dispatch lists of the instruction set in use, best first: name, whether it is live, what it accepts."""

def conv_max_pool2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
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
) -> Tensor:
    """torch.ops.pyconv.conv_max_pool2d by a shorter way; padding is top, bottom, left, right."""

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
