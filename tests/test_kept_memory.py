"""Memory of large results on the CPU: it is kept for the next call, up to a bound, and never shared by two tensors."""

from __future__ import annotations

import gc
import resource
import threading
from pathlib import Path

import pytest
import torch

from pyconv.functional import dropout

pytestmark = pytest.mark.cpu_only

MIB = 2**20
KEPT = 128 * MIB
LARGE = 10 * MIB
"""float32 elements: 40 MiB, more than malloc ever keeps."""


def page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def test_the_pages_of_a_freed_result_are_used_again() -> None:
    x = torch.ones(LARGE)
    dropout(x)
    before = page_faults()
    dropout(x)
    assert page_faults() - before < x.nbytes / resource.getpagesize() / 10


def test_results_that_are_alive_share_nothing() -> None:
    x = torch.ones(MIB)
    dropout(x)  # leaves a block to be used again
    results = [dropout(x, 0.5) for _ in range(4)]
    copies = [y.clone() for y in results]
    for _ in range(3):
        dropout(x, 0.3)
    assert len({y.data_ptr() for y in results}) == len(results)
    for y, copy in zip(results, copies, strict=True):
        assert torch.equal(y, copy)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux says how much memory is resident")
def test_what_is_kept_has_a_bound() -> None:
    x = torch.ones(LARGE)
    gc.collect()
    before = resident_bytes()
    results = [dropout(x) for _ in range(6)]
    assert resident_bytes() - before > KEPT
    del results
    assert resident_bytes() - before <= KEPT + 8 * MIB


def test_a_result_is_an_ordinary_tensor() -> None:
    x = torch.randn(8, 3, 256, 256).contiguous(memory_format=torch.channels_last)
    y = dropout(x)
    assert y.stride() == x.stride()
    expected = y.clone()
    y.resize_(9, 3, 256, 256, memory_format=torch.channels_last)
    assert torch.equal(y[:8], expected)
    with torch.inference_mode():
        assert dropout(x).is_inference()
    y = dropout(x)
    y.share_memory_()
    assert y.is_shared()


def test_many_threads() -> None:
    x = torch.ones(MIB)
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(20):
            y = dropout(x, 0.5)
            if int((y == 2).sum()) != int(y.sum()) // 2:
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
