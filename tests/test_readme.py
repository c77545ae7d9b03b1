"""The README's Python code runs as it is printed, and what the pages name exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", ["README.md", "docs/network3.md"])
def test_code_of_a_page_runs(
    page: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """All blocks in order in one namespace, as a reader would paste them; on the embedded digits."""
    monkeypatch.delenv("PYCONV_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    text = (ROOT / page).read_text()
    blocks = list(PYTHON_BLOCK.finditer(text))
    assert len(blocks) == text.count("```python")
    namespace: dict[str, object] = {"__name__": "page"}
    for block in blocks:
        line = text[: block.start(1)].count("\n")
        exec(compile("\n" * line + block.group(1), page, "exec"), namespace)
    assert "Finished training network." in capsys.readouterr().out


def test_readme_names_only_targets_of_the_makefile() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    pages = [(ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md")]
    pages += [path.read_text() for path in (ROOT / "docs").glob("*.md")]
    named = set(
        re.findall(
            r"\bmake (?:[A-Z]+=\S+ )*([a-z-]+)",
            "\n".join(re.findall(r"`[^`]+`|```sh.*?```", "\n".join(pages), re.DOTALL)),
        )
    )
    assert named and named <= targets


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "benchmarks/README.md",
        "docs/design.md",
        "docs/cuda.md",
        "docs/network3.md",
        "docs/performance.md",
    ],
)
def test_relative_links_lead_somewhere(page: str) -> None:
    path = ROOT / page
    links = re.findall(r"\]\(([^)#]+)\)", path.read_text())
    missing = [link for link in links if "://" not in link and not (path.parent / link).exists()]
    assert missing == []


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_cuda_kernels_are_listed_in_the_order_of_dispatch(direction: str) -> None:
    table = (ROOT / "cuda" / "kernel_table.cu").read_text()
    page = (ROOT / "docs" / "cuda.md").read_text()
    section = page.split(f"## conv_max_pool2d, {direction}")[1].split("\n## ")[0]
    listed = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
    assert listed and listed == re.findall(rf"^ +conv_max_pool2d_{direction}_(\w+),$", table, re.MULTILINE)
