"""A bar chart as SVG: text and rectangles, and a thin line from min to max."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from bench.report import Spread

LEFT, LENGTH, RIGHT = 150, 420, 90
ROW, TOP = 26, 40
GREY, BLUE = "#9aa5b1", "#2f6fde"


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar: as long as the median."""

    name: str
    value: Spread


def bars(title: str, shown: Sequence[Bar], logarithmic: bool, marked: str = "Rowlock") -> str:
    """The document. Every value should be above 0."""
    longest = max(bar.value.max for bar in shown)
    # A logarithmic scale has no zero: it begins at the power of ten below the smallest.
    start = 10.0 ** (math.ceil(math.log10(min(bar.value.min for bar in shown))) - 1)

    def x(value: float) -> float:
        part = math.log(value / start) / math.log(longest / start) if logarithmic else value / longest
        return LEFT + LENGTH * part

    height = TOP + ROW * len(shown) + 10
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + LENGTH + RIGHT}" height="{height}"'
        ' font-family="sans-serif" font-size="13" style="background:white">',
        f'<text x="8" y="22" font-weight="bold">{escape(title)}</text>',
    ]
    for number, bar in enumerate(shown):
        y = TOP + ROW * number
        colour = BLUE if bar.name == marked else GREY
        lines += [
            f'<text x="{LEFT - 8}" y="{y + 14}" text-anchor="end">{escape(bar.name)}</text>',
            f'<rect x="{LEFT}" y="{y}" width="{x(bar.value.median) - LEFT:.1f}" height="18" fill="{colour}"/>',
            f'<line x1="{x(bar.value.min):.1f}" x2="{x(bar.value.max):.1f}" y1="{y + 9}" y2="{y + 9}" stroke="black"/>',
            f'<text x="{x(bar.value.max) + 6:.1f}" y="{y + 14}">{bar.value.median:.4g}</text>',
        ]
    return "\n".join([*lines, "</svg>"]) + "\n"
