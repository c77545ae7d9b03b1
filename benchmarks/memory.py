"""What a training step keeps and how high memory rises: saved bytes per element, peak of a block."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.shapes import PHASES, case_named

_CLEAR_PEAK = "5"
"""Written to /proc/self/clear_refs it resets the peak of the resident set (proc(5))."""


def saved_bytes(forward: Callable[[], Tensor], not_counted: Sequence[Tensor]) -> int:
    """Bytes of the storages that autograd saves in `forward`, but for its result and `not_counted`."""
    storages: dict[int, int] = {}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)  # a freed storage's address could come back as another's
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    for tensor in (output, *not_counted):
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def peak_bytes(
    shape: str,
    batch: int,
    implementation: str,
    device: str,
    *,
    precision: str = "float32",
    cudnn_benchmark: bool = False,
) -> int:
    """Peak memory of forward + backward above x, w, b and the gradients asked for.

    On the CPU this is the resident set of a fresh process, since libraries allocate their scratch outside torch; on a
    GPU it is torch's allocator, which cuDNN takes its workspaces from.

    Args:
        cudnn_benchmark: on a GPU, whether cuDNN tries its algorithms and takes the fastest, with what that one needs.
    """
    if device == "cuda":
        return _cuda_peak(shape, batch, implementation, precision, cudnn_benchmark)
    arguments = [shape, str(batch), implementation, precision]
    child = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", *arguments],
        cwd=Path(__file__).resolve().parent.parent,
        capture_output=True,
        text=True,
    )
    if child.returncode != 0:
        raise RuntimeError(
            f"measuring the peak of {implementation} failed: {child.stderr.strip().splitlines()[-1]}"
        )
    return int(child.stdout)


class _Step:
    """Forward and backward of one implementation, by its name."""

    def __init__(self, shape: str, batch: int, implementation: str, device: str, precision: str) -> None:
        problem = peers.make_problem(case_named(shape, batch), precision, device)
        found, _ = peers.implementations(problem, PHASES["full"], graphs=False)
        self._chosen = next(i for i in found if i.name == implementation)
        self._wanted = [self._chosen.x, *self._chosen.parameters]
        self.gradient_bytes = sum(t.numel() * t.element_size() for t in self._wanted)

    def run(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self._chosen.call(), self._wanted, self._chosen.grad_output)


def _cuda_peak(shape: str, batch: int, implementation: str, precision: str, cudnn_benchmark: bool) -> int:
    step = _Step(shape, batch, implementation, "cuda", precision)
    torch.backends.cudnn.benchmark = cudnn_benchmark
    step.run()  # cuDNN tries its algorithms, each with its workspace; libraries allocate what they keep
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step.run()
    torch.cuda.synchronize()
    return max(0, torch.cuda.max_memory_allocated() - before - step.gradient_bytes)


def _cpu_peak(shape: str, batch: int, implementation: str, precision: str) -> int:
    torch.set_num_threads(1)
    # A first image brings in code, thread pools and caches, which are not the block's.
    _Step(shape, 1, implementation, "cpu", precision).run()
    step = _Step(shape, batch, implementation, "cpu", precision)
    Path("/proc/self/clear_refs").write_text(_CLEAR_PEAK, encoding="ascii")
    before = _resident("VmRSS")
    gradients = step.run()
    peak = _resident("VmHWM")
    del gradients
    return max(0, peak - before - step.gradient_bytes)


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


if __name__ == "__main__":
    print(_cpu_peak(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]))
