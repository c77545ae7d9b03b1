"""The processes that torchrun, or another launcher that sets its environment variables, runs a command in."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator

import torch


@dataclasses.dataclass(frozen=True)
class Launch:
    """Number of processes and of this one, on all machines and on this one."""

    count: int = 1
    rank: int = 0
    local_count: int = 1
    local_rank: int = 0


def launch() -> Launch:
    """How this process was launched, by $WORLD_SIZE, $RANK, $LOCAL_WORLD_SIZE and $LOCAL_RANK."""
    texts = (os.environ.get(name, "") for name in ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK"))
    count, rank, local_count, local_rank = (int(text) if text.isdecimal() else None for text in texts)
    if count is None or count < 2 or rank is None:
        return Launch()
    # A launcher that says nothing of machines is taken to run all processes on one.
    return Launch(
        count, rank, count if local_count is None else local_count, rank if local_rank is None else local_rank
    )


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[torch.distributed.ProcessGroup | None]:
    """The group of the processes, for tensors on `device`; None where there is one process."""
    if launch().count == 1:
        yield None
        return
    import torch.distributed as distributed

    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    yield distributed.group.WORLD
    # Not after an exception: other processes may have failed too, and NCCL would wait for them.
    distributed.destroy_process_group()


@contextlib.contextmanager
def only_first_prints() -> Iterator[None]:
    """Within it the processes but the first print nothing."""
    with contextlib.ExitStack() as stack:
        if launch().rank > 0:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        yield


def report(error: BaseException, line: str) -> None:
    """Print `line` about `error` to stderr. From a process but the first torchrun gets it, for its own report: mostly
    the first has printed the same."""
    rank = launch().rank
    if rank == 0:
        print(line, file=sys.stderr)
    elif "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)
    else:
        print(f"process {rank}: {line}", file=sys.__stderr__)
