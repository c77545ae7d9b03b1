"""A page as data, and as Markdown with its figures beside it or HTML with everything inside.

The templates are report_page.md and report_page.html (Jinja2), the latter with report_page.css.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import jinja2
from markupsafe import Markup, escape

from pyconv.book import figures


@dataclasses.dataclass(frozen=True)
class Text:
    """A paragraph; backticks enclose code. It holds no text out of a file.

    Attributes:
        marks: what must not be overlooked beside it.
    """

    kind: ClassVar[str] = "text"
    text: str
    marks: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Commands:
    kind: ClassVar[str] = "commands"
    lines: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Facts:
    """(term, what there is to say of it)."""

    kind: ClassVar[str] = "facts"
    pairs: Sequence[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class Cell:
    """Of a table.

    Attributes:
        marks: as of a `Text`.
        shade: 0 to 4, how dark the cell is.
    """

    text: str
    marks: Sequence[str] = ()
    shade: int = 0


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells in rows.

    Attributes:
        title: for those who cannot see where the table stands.
        columns: titles; one that begins with ">" is a column of numbers.
        rows: the first cell of each is its heading.
        style: class in the style sheet.
    """

    kind: ClassVar[str] = "table"
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    style: str = ""


@dataclasses.dataclass(frozen=True)
class Picture:
    """A figure; `name` is that of its file, and its class in the style sheet; `marks` as of a `Text`."""

    name: str
    svg: str
    alt: str
    caption: str
    marks: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Figures that stand side by side where there is room."""

    kind: ClassVar[str] = "pictures"
    pictures: Sequence[Picture]


Block = Text | Commands | Facts | Table | Pictures


@dataclasses.dataclass(frozen=True)
class Section:
    title: str
    blocks: Sequence[Block]
    level: int = 2


def render(sections: Sequence[Section]) -> dict[str, str]:
    """The files of the page by their paths: figures/NAME.svg, report.md and report.html."""
    pictures = [
        picture for section in sections for block in section.blocks if isinstance(block, Pictures)
        for picture in block.pictures
    ]  # fmt: skip
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=lambda name: name == "report_page.html",
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "markdown": _markdown,
        "markdown_text": _markdown_text,
        "html_text": _html_text,
        "themed": lambda picture: Markup(figures.themed(picture.svg, picture.name)),
    }
    return {
        **{f"figures/{picture.name}.svg": picture.svg for picture in pictures},
        "report.md": environment.get_template("report_page.md").render(sections=sections),
        "report.html": environment.get_template("report_page.html").render(sections=sections),
    }


def _markdown(text: str) -> str:
    """Markdown that shows `text` as it is, on one line."""
    return re.sub(r"([\\`*_\[\]<>|&~])", r"\\\1", re.sub(r"\s", " ", text))


def _markdown_text(text: str) -> str:
    """Markdown for a `Text`."""
    return "`".join(part if i % 2 else _markdown(part) for i, part in enumerate(text.split("`")))


def _html_text(text: str) -> Markup:
    """HTML for a `Text`."""
    parts = (escape(part) for part in text.split("`"))
    return Markup("").join(Markup(f"<code>{part}</code>") if i % 2 else part for i, part in enumerate(parts))
