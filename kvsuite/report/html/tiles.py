"""A map as SVG: a tile for each batch and length, its colour the ratio. Colours are the page's, by classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from kvsuite.analysis.figure import Map, Tile
from kvsuite.report.html.svg import rules, text

WIDE, HIGH, LEFT, TOP, FOOT = 46, 24, 46, 26, 44
STRONGEST = math.log(2)
"""Ratios from 2 on, and up to a half, have the full colour."""
LEGEND = (
    "Blue: faster than bf16, orange: slower. Pale: K and V of one layer",
    "lie in the L2 (* both formats', ' the compressed alone).",
    "i: interpolated. ~ and dashed: modelled, not measured.",
)


def size(shown: Map) -> tuple[int, int]:
    """Width and height."""
    return max(LEFT + WIDE * len(shown.x.rows) + 6, 460), TOP + HIGH * len(shown.y.rows) + FOOT


def draw(shown: Map, name: str) -> str:
    """One ``<svg>``; ``name`` begins its ids."""
    width, height = size(shown)
    said = "; ".join(f"{shown.y.rows[t.row]} × {shown.x.rows[t.column]}: {_ratio(t)}" for t in shown.tiles)
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-labelledby="{name}-t {name}-d">'
        f'<title id="{name}-t">{escape(shown.title)}</title><desc id="{name}-d">{escape(said)}</desc>'
        f"{_inside(shown)}</svg>"
    )


def picture(title: str, maps: Sequence[Map], style: str) -> str:
    """Maps below each other as one file that stands by itself, with what the page's ``style`` says of drawings."""
    sizes = [size(shown) for shown in maps]
    width, at, gap = max(w for w, _ in sizes), 30, 22
    parts = [text(8, 20, title, "label")]
    for shown, (_, height) in zip(maps, sizes, strict=True):
        parts.append(text(8, at + 14, shown.title, "axis"))
        parts.append(f'<g transform="translate(0 {at + gap})">{_inside(shown)}</g>')
        at += height + gap
    for line in LEGEND:
        parts.append(text(8, at + 4, line, "tick"))
        at += 18
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {at}" width="{width}" height="{at}" '
        f'font-family="system-ui, sans-serif"><title>{escape(title)}</title>'
        f"<style>{escape(rules(style), quote=False)}</style>"
        f'<rect width="{width}" height="{at}" class="paper"/>{"".join(parts)}</svg>\n'
    )


def _inside(shown: Map) -> str:
    parts = [text(4, 13, shown.y.name, "axis")]
    foot = TOP + HIGH * len(shown.y.rows)
    for at, name in enumerate(shown.x.rows):
        parts.append(text(LEFT + WIDE * (at + 0.5), foot + 15, name, "tick", "middle"))
    parts.append(text(LEFT + WIDE * len(shown.x.rows) / 2, foot + 31, shown.x.name, "axis", "middle"))
    for at, name in enumerate(shown.y.rows):
        parts.append(text(LEFT - 7, TOP + HIGH * at + 16, name, "tick", "end"))
    return "".join([*parts, *map(_tile, shown.tiles)])


def _tile(tile: Tile) -> str:
    x, y = LEFT + WIDE * tile.column, TOP + HIGH * tile.row
    strength = min(abs(math.log(tile.ratio)) / STRONGEST, 1.0)
    opacity = (0.12 + 0.68 * strength) * (0.35 if tile.faint else 1) * (1 if tile.measured else 0.5)
    kind = "c0" if tile.ratio >= 1 else "c1"
    edge = "" if tile.measured else " dashed"
    return (
        f'<g class="{kind}"><rect class="tile{edge}" x="{x + 1}" y="{y + 1}" width="{WIDE - 2}" height="{HIGH - 2}" '
        f'rx="3" fill-opacity="{opacity:.2f}"/>'
        + text(x + WIDE / 2, y + 16, _ratio(tile), "tick" if tile.faint else "ratio", "middle")
        + "</g>"
    )


def _ratio(tile: Tile) -> str:
    return f"{'' if tile.measured else '~'}{tile.ratio:.2f}{tile.mark}"
