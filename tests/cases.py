"""Named shapes of conv_max_pool2d, shared by the tests and the benchmarks. Plain Python: torch is not needed.

Tags:
    book         a layer of the book's program
    performance  a row of the performance table, with the batch size it is measured at
    network      a layer of another published network
    odd          small, and awkward in one respect: partial tiles, groups, dilation, overlap, ...
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

Pair = tuple[int, int]

_AFFORDABLE_FLOPS = 100_000_000


@dataclass(frozen=True)
class Case:
    """One conv_max_pool2d: input (N, C, H, W), weight (K, C / groups, *kernel).

    Every size is a pair (height, width); `padding` is a pair or 'same'; `pool_stride` None means `pool_size`.
    """

    name: str
    N: int
    C: int
    H: int
    W: int
    K: int
    kernel: Pair
    stride: Pair = (1, 1)
    padding: Pair | str = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    pool_size: Pair = (2, 2)
    pool_stride: Pair | None = None
    pool_padding: Pair = (0, 0)
    pool_dilation: Pair = (1, 1)
    ceil_mode: bool = False
    tags: frozenset[str] = field(default_factory=frozenset)

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        return self.N, self.C, self.H, self.W

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        return self.K, self.C // self.groups, *self.kernel

    @property
    def bias_shape(self) -> tuple[int]:
        return (self.K,)

    @property
    def conv_shape(self) -> tuple[int, int, int, int]:
        """Shape (N, K, OH, OW) of the convolution, which the fused operator never stores."""
        if self.padding == "same":
            return self.N, self.K, self.H, self.W
        height, width = (
            (extent + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for extent, kernel, stride, padding, dilation in zip(
                (self.H, self.W), self.kernel, self.stride, self.padding, self.dilation, strict=True
            )
        )
        return self.N, self.K, height, width

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        """Shape (N, K, PH, PW) of the result, by max_pool2d's rounding rules."""
        extents = []
        for d in (0, 1):
            stride = (self.pool_stride or self.pool_size)[d]
            padding = self.pool_padding[d]
            extent = self.conv_shape[2 + d]
            span = extent + 2 * padding - self.pool_dilation[d] * (self.pool_size[d] - 1) - 1
            out = (span + (stride - 1 if self.ceil_mode else 0)) // stride + 1
            # With ceil_mode the last window must still start inside the map or its left padding.
            if self.ceil_mode and (out - 1) * stride >= extent + padding:
                out -= 1
            extents.append(out)
        return self.N, self.K, *extents

    @property
    def flops(self) -> int:
        """Floating-point operations of the convolution over every position (a multiply-add counts as two)."""
        n, k, height, width = self.conv_shape
        return 2 * n * k * height * width * (self.C // self.groups) * self.kernel[0] * self.kernel[1]

    @property
    def window_positions(self) -> int:
        return self.pool_size[0] * self.pool_size[1]

    def kwargs(self) -> dict[str, object]:
        """The keyword arguments of `pyconv.functional.conv_max_pool2d` (all but the activation)."""
        return {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
            "pool_size": self.pool_size,
            "pool_stride": self.pool_stride,
            "pool_padding": self.pool_padding,
            "pool_dilation": self.pool_dilation,
            "ceil_mode": self.ceil_mode,
        }

    def with_batch(self, N: int) -> Case:
        return replace(self, N=N)

    def reduced(self) -> Case:
        """The case at a size that a test can afford: at most two images, or a small one."""
        small = self.with_batch(min(self.N, 2))
        if small.flops <= _AFFORDABLE_FLOPS:
            return small
        return replace(self, N=1, H=min(self.H, 47), W=min(self.W, 43))

    def reduced_to(self, flops: int) -> Case:
        """The case at no more than `flops`, as far as halving the channels gets it there."""
        small = self.reduced()
        while small.flops > flops and max(small.C, small.K) > small.groups:
            C, K = (self.groups * max(1, channels // self.groups // 2) for channels in (small.C, small.K))
            small = replace(small, C=C, K=K)
        return small


def _case(
    name: str, input: tuple[int, int, int, int], K: int, kernel: Pair, *tags: str, **arguments: object
) -> Case:
    N, C, H, W = input
    return Case(name, N, C, H, W, K, kernel, tags=frozenset(tags), **arguments)  # type: ignore[arg-type]


CASES: tuple[Case, ...] = (
    # The book's two layers (network3.py, chapter 6) at its mini-batch size.
    _case("L1", (10, 1, 28, 28), 20, (5, 5), "book", "performance"),
    _case("L2", (10, 20, 12, 12), 40, (5, 5), "book", "performance"),
    # CIFAR-10 networks.
    _case("CIFAR", (128, 3, 32, 32), 32, (3, 3), "performance", padding=(1, 1)),
    _case("CIFAR64", (128, 64, 16, 16), 64, (3, 3), "performance", padding=(1, 1)),
    # Krizhevsky, Sutskever and Hinton 2012 (AlexNet): the three layers with (overlapping) pooling.
    _case(
        "KSH1", (16, 3, 224, 224), 96, (11, 11), "performance",
        stride=(4, 4), padding=(2, 2), pool_size=(3, 3), pool_stride=(2, 2),
    ),
    _case(
        "KSH2", (16, 96, 27, 27), 256, (5, 5), "performance",
        padding=(2, 2), groups=2, pool_size=(3, 3), pool_stride=(2, 2),
    ),
    _case(
        "KSH5", (16, 384, 13, 13), 256, (3, 3), "performance",
        padding=(1, 1), groups=2, pool_size=(3, 3), pool_stride=(2, 2),
    ),
    # Simonyan and Zisserman 2014 (VGG): a middle layer.
    _case("VGG", (16, 128, 56, 56), 128, (3, 3), "performance", "network", padding=(1, 1)),
    # Espeholt et al. 2018 (IMPALA): the first block of the residual network.
    _case(
        "IMPALA", (32, 4, 84, 84), 16, (3, 3), "network",
        padding=(1, 1), pool_size=(3, 3), pool_stride=(2, 2), pool_padding=(1, 1),
    ),
    # The first convolution of Mnih et al. 2015 (DQN), followed by pooling.
    _case("DQN", (32, 4, 84, 84), 32, (8, 8), "network", stride=(4, 4)),
    # LeCun et al. 1998 (LeNet-5).
    _case("LeNet5-C1", (10, 1, 32, 32), 6, (5, 5), "network"),
    _case("LeNet5-C3", (10, 6, 14, 14), 16, (5, 5), "network"),
    # Simard, Steinkraus and Platt 2003: 5 and 50 maps of 5x5, halving at each layer.
    _case("Simard-1", (10, 1, 29, 29), 5, (5, 5), "network", ceil_mode=True),
    _case("Simard-2", (10, 5, 13, 13), 50, (5, 5), "network", ceil_mode=True),
    # A CIFAR-10 speed-run network: the shapes measured on a GPU.
    _case("speedrun-1", (2000, 24, 31, 31), 64, (3, 3), "network"),
    _case("speedrun-2", (2000, 64, 15, 15), 256, (3, 3), "network"),
    _case("speedrun-3", (2000, 256, 7, 7), 256, (3, 3), "network"),
    # Small and awkward.
    _case("tiny", (1, 1, 5, 5), 1, (5, 5), "odd", pool_size=(1, 1)),
    _case("pointwise", (2, 5, 6, 6), 7, (1, 1), "odd"),
    _case("one-channel-row", (3, 1, 4, 31), 9, (2, 3), "odd", pool_size=(1, 3)),
    _case("K-1", (2, 3, 9, 9), 1, (3, 3), "odd"),
    _case("K-13", (2, 3, 10, 11), 13, (3, 3), "odd"),
    _case("K-17", (3, 4, 11, 9), 17, (3, 3), "odd"),
    _case("K-33", (2, 8, 7, 9), 33, (3, 3), "odd"),
    _case("odd-map", (2, 2, 13, 15), 20, (5, 5), "odd"),
    _case("odd-map-ceil", (2, 2, 14, 12), 20, (4, 4), "odd", ceil_mode=True),
    _case("whole-map", (3, 4, 6, 7), 10, (6, 7), "odd", pool_size=(1, 1)),
    _case("global-pool", (2, 3, 9, 9), 8, (3, 3), "odd", pool_size=(7, 7)),
    _case("no-pool", (2, 3, 8, 8), 8, (3, 3), "odd", pool_size=(1, 1)),
    _case("kernel-2x4", (2, 3, 9, 10), 8, (2, 4), "odd"),
    _case("same", (2, 3, 8, 9), 8, (3, 3), "odd", padding="same"),
    _case("same-even", (2, 3, 8, 9), 8, (4, 2), "odd", padding="same"),
    _case("same-dilated", (2, 3, 9, 9), 8, (2, 3), "odd", padding="same", dilation=(3, 2)),
    _case("padding-asymmetric-pair", (2, 3, 8, 6), 8, (3, 3), "odd", padding=(0, 2)),
    _case("padding-beyond-kernel", (2, 3, 5, 5), 8, (3, 3), "odd", padding=(4, 3)),
    _case("kernel-beyond-map", (2, 3, 3, 4), 8, (5, 5), "odd", padding=(2, 2)),
    _case("stride-pair", (2, 3, 13, 12), 8, (3, 3), "odd", stride=(2, 3)),
    _case("stride-beyond-kernel", (2, 3, 14, 14), 8, (2, 2), "odd", stride=(3, 3)),
    _case("stride-4-kernel-11", (1, 3, 47, 43), 12, (11, 11), "odd", stride=(4, 4), padding=(2, 2)),
    # The backward unfolds these: rows of a filter as two vectors, blocks of a stride as less than half a one.
    _case("rows-of-27-channels", (2, 9, 8, 9), 12, (3, 3), "odd"),
    _case("stride-1x4", (2, 2, 12, 30), 8, (3, 5), "odd", stride=(1, 4)),
    # Wider than what it sums in registers, many k to a pixel, many bands of rows; windows that share a winner.
    _case("kernel-3x7", (2, 16, 7, 12), 8, (3, 7), "odd"),
    _case("K-130", (1, 17, 9, 9), 130, (3, 3), "odd", pool_size=(3, 3), pool_stride=(2, 2)),
    _case("tall", (1, 16, 31, 60), 8, (3, 3), "odd", pool_size=(3, 3), pool_stride=(2, 2), pool_padding=(1, 1)),
    _case("dilation", (2, 3, 12, 12), 8, (3, 3), "odd", dilation=(2, 3), padding=(1, 2)),
    _case("groups-2", (2, 6, 9, 9), 10, (3, 3), "odd", groups=2),
    _case("groups-3", (2, 6, 9, 9), 9, (3, 3), "odd", groups=3, padding=(1, 1)),
    _case("depthwise", (2, 8, 9, 9), 8, (3, 3), "odd", groups=8, padding=(1, 1)),
    _case("depthwise-multiplier", (2, 4, 9, 9), 12, (3, 3), "odd", groups=4),
    _case("pool-2x3", (2, 3, 10, 12), 8, (3, 3), "odd", pool_size=(2, 3)),
    _case("pool-overlap", (2, 3, 11, 11), 8, (3, 3), "odd", pool_size=(3, 3), pool_stride=(2, 2)),
    _case("pool-overlap-1", (2, 3, 8, 8), 8, (3, 3), "odd", pool_size=(3, 2), pool_stride=(1, 1)),
    _case("pool-gaps", (2, 3, 13, 13), 8, (3, 3), "odd", pool_size=(2, 2), pool_stride=(3, 4)),
    _case("pool-padding", (2, 3, 9, 10), 8, (3, 3), "odd", pool_size=(3, 2), pool_padding=(1, 1)),
    _case(
        "pool-padding-ceil", (2, 3, 10, 10), 8, (3, 3), "odd",
        pool_size=(3, 3), pool_stride=(2, 2), pool_padding=(1, 1), ceil_mode=True,
    ),
    _case("pool-dilation", (2, 3, 12, 12), 8, (3, 3), "odd", pool_size=(2, 3), pool_dilation=(3, 2)),
    # With padding of at most half the window, as torch demands, all windows of a map are empty or none is.
    _case(
        "empty-windows", (2, 3, 3, 3), 8, (3, 3), "odd", "empty-windows",
        pool_padding=(1, 1), pool_dilation=(2, 2),
    ),
    _case(
        "empty-windows-rows", (2, 3, 4, 9), 8, (3, 3), "odd", "empty-windows",
        pool_padding=(1, 0), pool_stride=(1, 2), pool_dilation=(3, 1),
    ),
    _case("window-255", (1, 2, 17, 19), 5, (3, 3), "odd", pool_size=(15, 17)),
    _case("window-256", (1, 2, 18, 18), 5, (3, 3), "odd", pool_size=(16, 16)),
    _case("window-300", (2, 2, 17, 22), 5, (3, 3), "odd", pool_size=(15, 20), pool_stride=(1, 1)),
    _case("batch-0", (0, 3, 8, 8), 8, (3, 3), "odd", "empty-batch"),
    # Enough channels for the CPU's Winograd kernel: filters in blocks of two and three taps, tiles partly outside the
    # map, rows that wait for a window to be complete, steps of a few tile rows, groups.
    _case("winograd-3x3", (2, 12, 12, 14), 24, (3, 3), "odd", padding=(1, 1)),
    _case("winograd-4x3", (2, 13, 11, 12), 25, (4, 3), "odd", ceil_mode=True),
    _case("winograd-5x5", (2, 17, 11, 13), 33, (5, 5), "odd", padding=(2, 2)),
    _case("winograd-6x4", (1, 16, 12, 11), 50, (6, 4), "odd", padding=(0, 3)),
    _case("winograd-7x8", (1, 20, 13, 16), 24, (7, 8), "odd", padding=(5, 1)),
    _case("winograd-9x9", (1, 12, 12, 13), 24, (9, 9), "odd", padding=(2, 2)),
    _case("winograd-same", (2, 14, 9, 9), 31, (4, 4), "odd", padding="same"),
    _case("winograd-row", (1, 16, 3, 40), 24, (3, 3), "odd", pool_size=(1, 4)),
    _case("winograd-no-pool", (1, 16, 9, 10), 24, (3, 3), "odd", pool_size=(1, 1)),
    _case("winograd-overlap", (2, 16, 12, 11), 40, (3, 3), "odd", pool_size=(3, 3), pool_stride=(2, 2)),
    _case(
        "winograd-overlap-padding", (2, 16, 13, 12), 40, (3, 3), "odd",
        padding=(1, 1), pool_size=(3, 3), pool_stride=(2, 2), pool_padding=(1, 1), ceil_mode=True,
    ),
    _case("winograd-gaps", (1, 16, 16, 17), 24, (3, 3), "odd", pool_size=(1, 2), pool_stride=(4, 3)),
    _case("winograd-dilated-pool", (1, 16, 15, 14), 24, (3, 3), "odd", pool_size=(2, 3), pool_dilation=(5, 2)),
    _case("winograd-whole-map", (2, 16, 9, 9), 24, (3, 3), "odd", pool_size=(7, 7)),
    _case("winograd-groups", (2, 36, 10, 9), 75, (3, 3), "odd", groups=3, padding=(1, 1)),
    _case("winograd-stride-2", (2, 9, 17, 18), 40, (5, 5), "odd", stride=(2, 2), padding=(2, 2)),
    _case("winograd-stride-4", (1, 3, 67, 63), 48, (11, 11), "odd", stride=(4, 4), padding=(2, 2)),
    _case(
        "winograd-stride-pair", (1, 9, 23, 31), 40, (7, 9), "odd",
        stride=(2, 3), padding=(1, 4), pool_size=(3, 3), pool_stride=(2, 2),
    ),
    _case("winograd-stride-groups", (2, 16, 21, 20), 64, (6, 8), "odd", stride=(3, 4), groups=2),
    _case("winograd-steps", (1, 48, 46, 44), 40, (3, 3), "odd", pool_size=(3, 3), pool_stride=(2, 2)),
    _case("winograd-steps-2x2", (1, 48, 46, 44), 40, (5, 5), "odd", padding=(2, 2)),
)  # fmt: skip

# Shapes that every tile of the CUDA kernels is chosen for, the smallest to the largest, with tiles partly outside the
# map, the channels or the batch; small filters keep the arithmetic small.
TILE_CASES: tuple[Case, ...] = (
    _case("tile-rows-64", (2, 8, 13, 20), 70, (3, 3)),
    _case("tile-rows-128", (8, 8, 47, 47), 60, (3, 3), padding=(1, 1), ceil_mode=True),
    _case("tile-rows-128-odd", (8, 5, 47, 47), 60, (2, 2), padding=(1, 1)),
    _case("tile-128x128", (4, 8, 64, 66), 128, (1, 1)),
    _case(
        "tile-shared-32", (3, 8, 33, 20), 70, (3, 3), padding=(1, 1), pool_size=(3, 2), pool_stride=(1, 2),
    ),
    _case("tile-shared-64", (132, 8, 16, 16), 64, (1, 1), pool_size=(3, 3), pool_stride=(2, 2)),
    _case(
        "tile-shared-64-groups", (70, 16, 16, 16), 80, (2, 2), groups=2, pool_size=(3, 3), pool_stride=(2, 2),
    ),
    _case("tile-shared-96", (132, 8, 16, 16), 96, (1, 1), pool_size=(3, 3), pool_stride=(2, 2)),
    _case(
        "tile-shared-96-odd", (60, 3, 24, 24), 90, (3, 3),
        padding=(2, 2), pool_size=(3, 3), pool_stride=(2, 2), pool_padding=(1, 1),
    ),
    # Enough channels for TF32 in NCHW to take a matrix product rather than a patch of the input in shared memory.
    _case("tile-256x64-wide", (8, 100, 48, 48), 60, (1, 1)),
    _case("tile-128x64-channels", (64, 100, 24, 8), 33, (1, 1)),
    _case("tile-128x128-channels", (16, 100, 12, 32), 192, (1, 1)),
    _case("tile-256x64-channels", (132, 100, 24, 12), 20, (1, 1), pool_size=(3, 3), pool_stride=(2, 2)),
    _case("tile-256x96-channels", (132, 99, 16, 16), 96, (1, 1), pool_size=(3, 3), pool_stride=(2, 2)),
    _case("tile-rows-64-windows", (64, 8, 24, 8), 33, (1, 1)),
    _case("tile-grad-input-128", (4, 128, 47, 32), 20, (1, 1), pool_size=(1, 1)),
    _case("tile-grad-input-256", (2, 256, 47, 47), 20, (1, 1)),
    _case("tile-grad-weight-96", (1, 8, 64, 47), 96, (3, 3), padding=(1, 1)),
    _case("tile-grad-weight-192", (1, 3, 47, 66), 192, (5, 5), padding=(2, 2)),
    _case("tile-direct-192", (2, 1, 32, 47), 256, (5, 5), padding=(2, 2)),
    _case("tile-direct-3", (32, 3, 32, 32), 33, (3, 3), padding=(1, 1)),
    _case("tile-direct-5", (32, 1, 28, 28), 20, (5, 5)),
    _case("tile-direct-no-pool", (32, 3, 30, 30), 20, (3, 3), pool_size=(1, 1)),
    _case("tile-direct-overlap", (32, 3, 30, 30), 20, (3, 3), pool_size=(3, 3), pool_stride=(2, 2)),
    _case("tile-direct-strided", (32, 3, 30, 30), 20, (3, 3), stride=(1, 2), pool_stride=(1, 2)),
    _case("small-direct-no-pool", (2, 3, 10, 10), 20, (3, 3), pool_size=(1, 1)),
    _case("small-direct-overlap", (2, 3, 10, 10), 20, (3, 3), pool_size=(3, 3), pool_stride=(2, 2)),
    _case("small-direct-strided", (2, 3, 10, 10), 20, (3, 3), stride=(2, 2)),
    _case("small-direct-3", (2, 3, 10, 10), 20, (3, 3)),
    _case("small-direct-5", (2, 30, 12, 12), 21, (5, 5)),
)  # fmt: skip

BY_NAME: dict[str, Case] = {case.name: case for case in CASES}


def tagged(*tags: str) -> list[Case]:
    """The cases that carry at least one of `tags`."""
    return [case for case in CASES if case.tags & set(tags)]


def random_case(seed: int) -> Case:
    """A small random shape over every argument; the same seed always gives the same case.

    A third of them have the arguments most networks use, which fast kernels are written for.
    """
    draw = random.Random(seed)
    if draw.random() < 1 / 3:
        return _random_plain_case(f"random-{seed}", draw)
    return _random_general_case(f"random-{seed}", draw)


def _random_plain_case(name: str, draw: random.Random) -> Case:
    kernel = draw.choice((1, 3, 3, 5, 5))
    pool = draw.choice((2, 2, 2, 3))
    conv = draw.randint(pool, 9)
    padding = draw.choice((0, 0, kernel // 2))
    H = max(conv + kernel - 1 - 2 * padding, 1)
    return Case(
        name,
        N=draw.randint(1, 4),
        C=draw.choice((1, 3, 4, 8, 16, 20)),
        H=H,
        W=H + draw.randint(0, 5),
        K=draw.choice((6, 8, 16, 20, 24, 40)),
        kernel=(kernel, kernel),
        padding=(padding, padding),
        pool_size=(pool, pool),
        ceil_mode=draw.random() < 0.2,
    )


def _random_general_case(name: str, draw: random.Random) -> Case:
    def pair(low: int, high: int) -> Pair:
        return draw.randint(low, high), draw.randint(low, high)

    groups = draw.choice((1, 1, 1, 2, 3))
    C, K = groups * draw.randint(1, 5), groups * draw.randint(1, 9)
    if draw.random() < 0.1:
        groups, K = C, C * draw.randint(1, 2)
    kernel, dilation = pair(1, 5), pair(1, 3)
    same = draw.random() < 0.15
    stride = (1, 1) if same else pair(1, 3)
    padding: Pair = pair(0, 3)
    pool_size, pool_dilation = pair(1, 4), pair(1, 3)
    pool_stride = pair(1, 4) if draw.random() < 0.7 else None
    pool_padding = draw.randint(0, pool_size[0] // 2), draw.randint(0, pool_size[1] // 2)
    extents = []
    for d in (0, 1):
        # The smallest map with one window, and the smallest input with that map; then some more.
        conv = max(1, pool_dilation[d] * (pool_size[d] - 1) + 1 - 2 * pool_padding[d])
        span = 0 if same else dilation[d] * (kernel[d] - 1) - 2 * padding[d]
        extents.append(max(1, (conv - 1) * stride[d] + 1 + span) + draw.randint(0, 8))
    return Case(
        name,
        N=draw.randint(1, 3),
        C=C,
        H=extents[0],
        W=extents[1],
        K=K,
        kernel=kernel,
        stride=stride,
        padding="same" if same else padding,
        dilation=dilation,
        groups=groups,
        pool_size=pool_size,
        pool_stride=pool_stride,
        pool_padding=pool_padding,
        pool_dilation=pool_dilation,
        ceil_mode=draw.random() < 0.4,
    )
