"""Draw the picture of docs/search.md: the share of the front that each search reaches, by evaluations.

Run from the repository's root: python -m benchmarks.search_picture FILE.json [--svg docs/search.svg]
FILE.json is the output of `python -m benchmarks.search --json`. Shares are means over problems, of means over seeds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.search_problems import problem

WIDTH, HEIGHT = 760, 400
MARGIN_LEFT, MARGIN_TOP, MARGIN_RIGHT, MARGIN_BOTTOM = 52, 16, 130, 40
COLOURS = ("#c0392b", "#7f8c8d", "#2471a3", "#148f77", "#85c1e9", "#76d7c4", "#a569bd", "#dc7633", "#5d6d7e")
_LABEL_SPACING = 15


def curves(file: Path) -> dict[str, NDArray[np.float64]]:
    """Return the share of the exact front's hypervolume after each evaluation, by search."""
    hypervolumes: dict[str, dict[str, list[list[float]]]] = {}
    for result in json.loads(file.read_text())["runs"]:
        if not result["missing"]:
            run = result["run"]
            problems = hypervolumes.setdefault(run["search"], {})
            problems.setdefault(run["problem"], []).append(result["hypervolumes"])
    mean_shares = {}
    for search, problems in hypervolumes.items():
        shares = [np.mean(seeds, axis=0) / problem(name).best() for name, seeds in problems.items()]
        mean_shares[search] = np.mean(shares, axis=0)
    return mean_shares


def svg(curve_of: Mapping[str, NDArray[np.float64]]) -> str:
    count = max(len(curve) for curve in curve_of.values())

    def x(evaluations: float) -> float:
        return MARGIN_LEFT + (WIDTH - MARGIN_LEFT - MARGIN_RIGHT) * evaluations / count

    def y(share: float) -> float:
        return MARGIN_TOP + (HEIGHT - MARGIN_TOP - MARGIN_BOTTOM) * (1 - share)

    parts = []
    for share in np.arange(0, 1.01, 0.2):
        parts.append(
            f'<line x1="{MARGIN_LEFT}" x2="{x(count):.1f}" y1="{y(share):.1f}" y2="{y(share):.1f}" stroke="#ddd"/>'
        )
        parts.append(
            f'<text x="{MARGIN_LEFT - 8}" y="{y(share) + 4:.1f}" text-anchor="end">{share:.0%}</text>'
        )
    for mark in range(0, count + 1, count // 4):
        parts.append(
            f'<text x="{x(mark):.1f}" y="{HEIGHT - MARGIN_BOTTOM + 18}" text-anchor="middle">{mark}</text>'
        )
    parts.append(f'<text x="{x(count / 2):.1f}" y="{HEIGHT - 4}" text-anchor="middle">evaluations</text>')
    label_y = 0.0
    best_first = sorted(curve_of, key=lambda name: -curve_of[name][-1])
    for colour, name in zip(COLOURS, best_first, strict=False):
        curve = curve_of[name]
        line = " ".join(f"{x(index + 1):.1f},{y(float(share)):.1f}" for index, share in enumerate(curve))
        width = 1.5
        if name == "surrogate":
            width = 3
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="{width}"/>')
        label_y = max(y(float(curve[-1])), label_y + _LABEL_SPACING)
        parts.append(f'<text x="{x(count) + 8:.1f}" y="{label_y + 4:.1f}" fill="{colour}">{name}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12"><rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("json", type=Path)
    parser.add_argument("--svg", type=Path, default=Path("docs/search.svg"))
    options = parser.parse_args()
    options.svg.write_text(svg(curves(options.json)))


if __name__ == "__main__":
    main()
