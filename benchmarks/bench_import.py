"""What `import pyconv` costs over `import torch`, in fresh processes."""

from __future__ import annotations

import subprocess
import sys
import tempfile

from benchmarks.timing import Candidate


def importer(module: str) -> Candidate:
    def run() -> None:
        # From an empty folder, so that only an installed package is found.
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([sys.executable, "-c", f"import {module}"], cwd=folder, check=True)

    return Candidate(f"import {module}", "ours" if module == "pyconv" else "bound", run, warm_up=False)


def test_import(measure) -> None:
    measure([importer("pyconv"), importer("torch")], "import", phase="a fresh process")
