"""What `import pyconv` brings into a process: modules, OpenMP runtimes, threads. In fresh processes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import pyconv

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def ask(program: str, *options: str) -> Any:
    """Run `program` in a fresh interpreter; it prints one line of JSON."""
    process = subprocess.run(
        [sys.executable, *options, "-c", program], capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def test_exactly_one_openmp_runtime_is_mapped() -> None:
    """Two runtimes fight for the cores, and oversubscribe them."""
    maps = ask("import json, pyconv; print(json.dumps(open('/proc/self/maps').read()))")
    runtimes = set()
    for line in maps.splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6:
            device, inode, path = fields[3], fields[4], fields[5]
            if any(name in path.rsplit("/", 1)[-1] for name in ("libgomp", "libomp", "libiomp")):
                runtimes.add((device, inode, path))
    assert len(runtimes) == 1, f"OpenMP runtimes in the process: {sorted(runtimes)}"


def test_package_that_is_not_built_says_so(tmp_path: Path) -> None:
    package = tmp_path / "pyconv"
    shutil.copytree(Path(pyconv.__file__).parent, package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    process = subprocess.run(
        [sys.executable, "-c", "import pyconv"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert process.returncode == 1
    assert process.stderr.splitlines()[-1].startswith(f"ImportError: pyconv is not built in {package}: run ")


def test_import_pulls_in_torch_and_numpy_only() -> None:
    program = """
import json, sys
import torch, numpy
before = {name.partition(".")[0] for name in sys.modules}
import pyconv
after = {name.partition(".")[0] for name in sys.modules}
print(json.dumps(sorted(after - before - set(sys.stdlib_module_names))))
"""
    assert ask(program) == ["pyconv"]


def test_import_starts_no_thread_and_computes_nothing_in_torch() -> None:
    program = """
import json, os, torch
threads = len(os.listdir("/proc/self/task"))
torch_threads, rng = torch.get_num_threads(), torch.get_rng_state()
import pyconv
print(json.dumps([
    len(os.listdir("/proc/self/task")) - threads,
    torch.get_num_threads() == torch_threads,
    torch.equal(rng, torch.get_rng_state()),
    torch.get_default_dtype() == torch.float32,
    torch.is_grad_enabled(),
]))
"""
    assert ask(program) == [0, True, True, True, True]


def test_import_warns_about_nothing() -> None:
    # torch itself may warn while it is imported.
    program = """
import json, warnings, torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import pyconv
print(json.dumps([str(w.message) for w in caught]))
"""
    assert ask(program) == []


def test_without_docstrings_and_asserts() -> None:
    program = """
import json, torch, pyconv
print(json.dumps(list(pyconv.ConvMaxPool2d(1, 2, 3)(torch.zeros(1, 1, 6, 6)).shape)))
"""
    assert ask(program, "-OO") == [1, 2, 2, 2]


BUSY_THREADS = """
import json, os, torch, pyconv

def busy():
    ticks = {}
    for task in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{task}/schedstat") as file:
            ticks[task] = int(file.read().split()[0])
    return ticks

torch.set_num_threads(THREADS)
input, weight, bias = torch.randn(10, 20, 12, 12), torch.randn(40, 20, 5, 5), torch.randn(40)
input.requires_grad_(TRAINING); weight.requires_grad_(TRAINING)

def step():
    output = pyconv.functional.conv_max_pool2d(input, weight, bias, activation="relu")
    if TRAINING:
        output.backward(torch.ones_like(output))

step()
before = busy()
for _ in range(300):
    step()
after = busy()
used = sorted((after[task] - before.get(task, 0) for task in after), reverse=True)
print(json.dumps(used))
"""


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("threads", [1, 2])
def test_kernels_run_on_the_threads_they_are_given(threads: int, training: bool) -> None:
    """Counts the threads that did a fair share of the work, by the processor time each was given."""
    used = ask(BUSY_THREADS.replace("THREADS", str(threads)).replace("TRAINING", str(training)))
    working = [time for time in used if time > 0.2 * used[0]]
    assert len(working) == threads, f"processor time of each thread in ns: {used}"
