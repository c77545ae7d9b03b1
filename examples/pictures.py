"""Tables of small grey images as SVG, which every browser shows: no library is needed to write them."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

import torch
from torch import Tensor

Cell = tuple[Tensor, str]
"""An image (H, W) with values from 0 (black) to 1 (white), and what is written below it."""

_SIDE = 112
_GAP = 12
_LINE = 16


def png(image: Tensor) -> bytes:
    """A PNG file of an image (H, W) of 8-bit grey values, from 0 (black) to 1 (white); what is beyond is clamped.

    Source: Portable Network Graphics Specification, https://www.w3.org/TR/png.
    """
    if image.dim() != 2 or image.numel() == 0:
        raise ValueError(f"expected an image of shape (H, W) with pixels, but got {tuple(image.shape)}")
    pixels = image.detach().cpu().clamp(0.0, 1.0).mul(255).round().to(torch.uint8).numpy()

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)  # 8 bits of grey, not interlaced
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)  # each after the number of its filter: none
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def write_table(path: Path, headings: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
    """Write an SVG file with `rows` of images below `headings`, one for each column."""
    for row in rows:
        if len(row) != len(headings):
            raise ValueError(f"expected rows of {len(headings)} images, one for each heading, but got {len(row)}")
    pitch_x, pitch_y = _SIDE + _GAP, _SIDE + _LINE + _GAP
    width, height = _GAP + pitch_x * len(headings), _GAP + _LINE + pitch_y * len(rows)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        'font-size="11" text-anchor="middle">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]

    def text(column: int, y: int, words: str) -> str:
        return f'<text x="{_GAP + pitch_x * column + _SIDE // 2}" y="{y}">{escape(words)}</text>'

    lines += [text(column, _GAP + 4, words) for column, words in enumerate(headings)]
    for i, row in enumerate(rows):
        top = _GAP + _LINE + pitch_y * i
        for column, (image, caption) in enumerate(row):
            data = base64.b64encode(png(image)).decode("ascii")
            lines.append(
                f'<image x="{_GAP + pitch_x * column}" y="{top}" width="{_SIDE}" height="{_SIDE}" '
                f'style="image-rendering:pixelated" href="data:image/png;base64,{data}"/>'
            )
            lines.append(text(column, top + _SIDE + _LINE - 4, caption))
    path.write_text("\n".join([*lines, "</svg>", ""]), encoding="utf-8")
