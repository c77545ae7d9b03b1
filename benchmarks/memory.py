"""What a training step keeps and how high memory rises: saved bytes per element, peak of a block."""

from __future__ import annotations

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


def peak_bytes(shape: str, batch: int, implementation: str, device: str) -> int:
    """Peak memory of forward + backward above x, w, b and the gradients asked for, in a fresh process.

    On the CPU this is the process's resident set, since libraries allocate their scratch outside torch; on a
    GPU it is torch's allocator.
    """
    arguments = [shape, str(batch), implementation, device]
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


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def _measure(shape: str, batch: int, implementation_name: str, device: str) -> int:
    torch.set_num_threads(1)
    phase = PHASES["full"]

    def build(batch: int) -> tuple[peers.Implementation, list[Tensor]]:
        problem = peers.make_problem(case_named(shape, batch), "float32", device)
        found, _ = peers.implementations(problem, phase)
        chosen = next(i for i in found if i.name == implementation_name)
        return chosen, [chosen.x, *chosen.parameters]

    # A first image brings in code, thread pools and caches, which are not the block's.
    warm, wanted = build(1)
    torch.autograd.grad(warm.call(), wanted, warm.grad_output)
    del warm

    chosen, wanted = build(batch)
    asked_for = sum(t.numel() * t.element_size() for t in wanted)
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        gradients = torch.autograd.grad(chosen.call(), wanted, chosen.grad_output)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text(_CLEAR_PEAK, encoding="ascii")
        before = _resident("VmRSS")
        gradients = torch.autograd.grad(chosen.call(), wanted, chosen.grad_output)
        peak = _resident("VmHWM")
    del gradients
    return max(0, peak - before - asked_for)


if __name__ == "__main__":
    print(_measure(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]))
