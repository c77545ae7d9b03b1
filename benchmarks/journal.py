"""What a suite has measured so far, written as it goes: a GPU's fault may end the process at any moment.

A journal is a file of JSON lines; the process that measures appends, the one that started it reads.

    {"machine_info": {...}}                                   once per process
    {"trying": CANDIDATE, "test": TEST}                       about to run it for the first time
    {"fatal": CANDIDATE, "test": TEST, "reason": WHY}         it took the process down, which ends itself
    {"benchmark": {...}}                                      an entry of pytest-benchmark
    {"not_measured": TEST, "reason": WHY}                     skipped or failed without an entry
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

DIED = "the process died in it"
ROUNDS = "rounds"
"""Stands for a candidate once all have run and are timed in turn."""


@dataclasses.dataclass
class Progress:
    """A journal's content.

    Attributes:
        fatal: by test, the candidates that ended a process, and why.
        not_measured: by test, why.
    """

    machine_info: dict[str, Any] | None = None
    benchmarks: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    fatal: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)
    not_measured: dict[str, str] = dataclasses.field(default_factory=dict)

    def done(self) -> set[str]:
        return {benchmark["fullname"] for benchmark in self.benchmarks} | set(self.not_measured)


class Journal:
    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, **record: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def read(self) -> Progress:
        """The content so far. What was being tried at the end of a process that left no further word is fatal."""
        progress = Progress()
        trying: dict[str, str] | None = None
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        for line in text.splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue  # the process died while it wrote
            if "machine_info" in record:
                progress.machine_info = record["machine_info"]
                self._take_fatal(progress, trying)
                trying = None
            elif "trying" in record:
                trying = record
            else:
                trying = None
                if "benchmark" in record:
                    progress.benchmarks.append(record["benchmark"])
                elif "fatal" in record:
                    progress.fatal.setdefault(record["test"], {})[record["fatal"]] = record["reason"]
                elif "not_measured" in record:
                    progress.not_measured[record["not_measured"]] = record["reason"]
        self._take_fatal(progress, trying)
        return progress

    @staticmethod
    def _take_fatal(progress: Progress, trying: dict[str, str] | None) -> None:
        if trying is None:
            return
        if trying["trying"] == ROUNDS:
            progress.not_measured[trying["test"]] = "the process died, or was ended, while all were timed in turn"
        else:
            progress.fatal.setdefault(trying["test"], {})[trying["trying"]] = DIED
