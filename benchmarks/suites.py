"""The suites: which cells each of them measures. A cell is one (shape, batch, precision, phase)."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator

from benchmarks.shapes import CASES, PHASES, Case, Phase, case_named


@dataclasses.dataclass(frozen=True)
class Cell:
    """One row of the report; on the CPU it is measured at every thread count of the suite."""

    shape: str
    batch: int
    precision: str = "float32"
    phase_name: str = "full"
    compile_modes: tuple[str, ...] = ()

    @property
    def case(self) -> Case:
        return case_named(self.shape, self.batch)

    @property
    def phase(self) -> Phase:
        return PHASES[self.phase_name]

    def id(self) -> str:
        return f"{self.shape}-N{self.batch}-{self.precision}-{self.phase_name}"


@dataclasses.dataclass(frozen=True)
class Suite:
    """
    Attributes:
        files: the bench_*.py it runs.
        cells: of conv_max_pool2d.
        scaling_shapes: measured on two threads against one.
        dropout_elements, dropout_phases: sizes of the tensors that dropout is measured on, and which of "forward" (of a
            training step), "backward" and "full".
        memory_shapes: whose saved bytes are counted.
        budget_seconds: time of the interleaved rounds of one benchmark; checks and compilation come on top.
        device: "cpu" or "cuda".
        compile_modes: of the peers that are not layers (dropout, whole steps).
        network3_steps: whole training steps: (number of the experiment, mini-batch size).
        ksh_batches: mini-batch sizes of training steps of KSH's network.
        limit_seconds: after which the suite ends, with what it has; None for no limit.
    """

    name: str
    description: str
    files: tuple[str, ...]
    cells: tuple[Cell, ...]
    scaling_shapes: tuple[str, ...]
    dropout_elements: tuple[int, ...]
    memory_shapes: tuple[str, ...]
    budget_seconds: float
    device: str = "cpu"
    compile_modes: tuple[str, ...] = ()
    dropout_phases: tuple[str, ...] = ("full",)
    network3_steps: tuple[tuple[int, int], ...] = ()
    ksh_batches: tuple[int, ...] = ()
    limit_seconds: float | None = None

    @property
    def thread_counts(self) -> tuple[int, ...]:
        """1 and 2, as far as the machine has them; on a GPU the host's threads play no part."""
        if self.device == "cuda":
            return (1,)
        return tuple(sorted({1, min(2, len(os.sched_getaffinity(0)))}))


NETWORK3_SHAPES = ("L1", "L2")

_COMMITTED_BATCHES = {
    "L1": (1, 10, 128),
    "L2": (1, 10, 128),
    "CIFAR": (1, 10, 128),
    "CIFAR64": (1, 10, 128),
    "KSH1": (1, 10),
    "KSH2": (1, 10),
    "KSH5": (1, 10),
    "VGG": (1, 10),
    "IMPALA": (1, 10),
    "DQN": (1, 10),
    "LeNet5-C1": (10,),
    "LeNet5-C3": (10,),
    "Simard-1": (10,),
    "Simard-2": (10,),
}
_OTHER_PRECISION_SHAPES = ("L2", "CIFAR64", "KSH2")
_AUTOTUNED_SHAPES = (*NETWORK3_SHAPES, "CIFAR64", "KSH2")
_FORWARD_SHAPES = ("CIFAR", "CIFAR64", "KSH1", "KSH2", "KSH5", "VGG", "IMPALA")
_MAX_COMMITTED_CELLS = 60
_GPU_SPEEDRUN_SHAPES = ("speedrun-1", "speedrun-2", "speedrun-3")
_LARGEST_BATCH = 1024
_LARGEST_FLOPS = 2e11
"""Of one forward in the suite "all": minutes for a whole cell on two cores."""


def _committed_cells() -> Iterator[Cell]:
    """The list that "never below 0.95x of the best peer" speaks of."""

    def modes(shape: str, batch: int) -> tuple[str, ...]:
        return ("default", "max-autotune") if shape in _AUTOTUNED_SHAPES and batch == 10 else ("default",)

    for shape, batches in _COMMITTED_BATCHES.items():
        for batch in batches:
            yield Cell(shape, batch, compile_modes=modes(shape, batch))
    for shape in NETWORK3_SHAPES:
        for phase in PHASES:
            if phase != "full":
                yield Cell(shape, 10, phase_name=phase, compile_modes=("default",))
    for shape in _FORWARD_SHAPES:
        yield Cell(shape, 10, phase_name="forward_inference", compile_modes=("default",))
    yield Cell("KSH1", 10, phase_name="full_no_input_grad", compile_modes=("default",))
    for shape in _OTHER_PRECISION_SHAPES:
        for precision in ("float64", "bfloat16", "float16"):
            # One image: a single call of PyTorch's float16 takes seconds at ten.
            batch = 1 if (shape, precision) == ("KSH2", "float16") else 10
            yield Cell(shape, batch, precision, compile_modes=("default",))


def _all_cells() -> Iterator[Cell]:
    for case in CASES:
        if not case.tags & {"book", "performance", "network"}:
            continue
        for batch in (1, 10, 128, _LARGEST_BATCH):
            if case.with_batch(batch).flops > _LARGEST_FLOPS:
                continue
            for precision in ("float32", "float64", "bfloat16", "float16"):
                for phase in PHASES:
                    yield Cell(case.name, batch, precision, phase, ("default",))


def _quick_cells() -> Iterator[Cell]:
    for shape in NETWORK3_SHAPES:
        for phase in PHASES:
            yield Cell(shape, 10, phase_name=phase)


def _gpu_cells() -> Iterator[Cell]:
    """Those of the goals first, since the time may not suffice for all."""
    both = ("max-autotune", "default")
    for phase in ("forward_inference", "full", "full_no_input_grad"):
        yield Cell("KSH1", 128, "tf32", phase, both)
    for shape in _GPU_SPEEDRUN_SHAPES:
        yield Cell(shape, 2000, "float16", "full", both)
    for phase in ("forward_inference", "full", "full_no_input_grad"):
        yield Cell("KSH1", 128, "float32", phase, ("max-autotune",))
    for shape in NETWORK3_SHAPES:
        yield Cell(shape, 10, "float32", "full")


_COMMITTED = tuple(_committed_cells())
if len(_COMMITTED) > _MAX_COMMITTED_CELLS:
    raise ValueError(f"the committed list may hold {_MAX_COMMITTED_CELLS} cells, but has {len(_COMMITTED)}")

_LAYER_FILES = ("bench_stack.py", "bench_dropout.py", "bench_memory.py", "bench_conv_max_pool2d.py")
_CPU_FILES = (
    "bench_network3.py", "bench_augmentation.py", "bench_overhead.py", "bench_import.py", *_LAYER_FILES
)  # fmt: skip
"""The many layers last: what compiles may use up the time of a suite that has a limit."""

_BOOK_STEPS = ((1, 10), (2, 10), (4, 10), (6, 10), (10, 10), (6, 1), (6, 32), (6, 128))

_BOOK_DROPOUT = 10 * 1000
_MIBI = 2**20

SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            name="quick",
            description="the book's layers against eager peers; under 2 minutes",
            files=_LAYER_FILES,
            cells=tuple(_quick_cells()),
            scaling_shapes=("L2",),
            dropout_elements=(_BOOK_DROPOUT, _MIBI),
            memory_shapes=NETWORK3_SHAPES,
            budget_seconds=0.8,
        ),
        Suite(
            name="full",
            description="the committed list, with compiled peers; under 30 minutes",
            files=_CPU_FILES,
            cells=_COMMITTED,
            scaling_shapes=("L1", "L2", "CIFAR64", "KSH2"),
            dropout_elements=(_BOOK_DROPOUT, _MIBI, 16 * _MIBI),
            memory_shapes=("L1", "L2", "CIFAR64", "KSH1"),
            budget_seconds=1.0,
            compile_modes=("default",),
            network3_steps=_BOOK_STEPS,
            limit_seconds=29 * 60.0,
        ),
        Suite(
            name="all",
            description="every network shape, precision and phase, N up to 1024; hours",
            files=("bench_ksh.py", *_CPU_FILES),
            cells=tuple(_all_cells()),
            scaling_shapes=tuple(_COMMITTED_BATCHES),
            dropout_elements=(_BOOK_DROPOUT, _MIBI, 16 * _MIBI),
            memory_shapes=tuple(_COMMITTED_BATCHES),
            budget_seconds=3.0,
            compile_modes=("default",),
            network3_steps=_BOOK_STEPS,
            ksh_batches=(8,),
        ),
        Suite(
            name="gpu",
            description="the shapes of the GPU's goals; under 6 minutes",
            # Cheap ones first: what compiles may use up the time.
            files=(
                "bench_peaks.py",
                "bench_memory.py",
                "bench_dropout.py",
                "bench_conv_max_pool2d.py",
                "bench_network3.py",
            ),
            cells=tuple(_gpu_cells()),
            scaling_shapes=(),
            dropout_elements=(64 * _MIBI,),
            memory_shapes=("L2", "KSH1"),
            budget_seconds=1.5,
            device="cuda",
            compile_modes=("default",),
            dropout_phases=("forward", "backward"),
            network3_steps=((6, 10), (10, 10)),
            limit_seconds=340.0,
        ),
    )
}
