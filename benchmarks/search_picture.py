"""Draw the picture of docs/search.md: the share of the front's hypervolume that searches reach by evaluations.

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
LEFT_MARGIN, TOP_MARGIN, RIGHT_MARGIN, BOTTOM_MARGIN = 52, 16, 130, 40
COLOURS = ("#c0392b", "#7f8c8d", "#2471a3", "#148f77", "#85c1e9", "#76d7c4", "#a569bd", "#dc7633", "#5d6d7e")
_LABEL_DISTANCE = 15
"""Smallest vertical distance of two labels, in pixels."""


def curves(file: Path) -> dict[str, NDArray[np.float64]]:
    """Return for each search the share of the exact front's hypervolume after each evaluation."""
    hypervolumes: dict[str, dict[str, list[list[float]]]] = {}
    for result in json.loads(file.read_text())["runs"]:
        if not result["missing"]:
            run = result["run"]
            by_problem = hypervolumes.setdefault(run["search"], {})
            by_problem.setdefault(run["problem"], []).append(result["hypervolumes"])
    shares = {}
    for search, by_problem in hypervolumes.items():
        problem_means = [np.mean(seeds, axis=0) / problem(name).best() for name, seeds in by_problem.items()]
        shares[search] = np.mean(problem_means, axis=0)
    return shares


def svg(shares: Mapping[str, NDArray[np.float64]]) -> str:
    """Return the picture of these curves."""
    count = max(len(curve) for curve in shares.values())

    def x(evaluations: float) -> float:
        return LEFT_MARGIN + (WIDTH - LEFT_MARGIN - RIGHT_MARGIN) * evaluations / count

    def y(share: float) -> float:
        return TOP_MARGIN + (HEIGHT - TOP_MARGIN - BOTTOM_MARGIN) * (1 - share)

    parts = []
    for share in np.arange(0, 1.01, 0.2):
        parts.append(
            f'<line x1="{LEFT_MARGIN}" x2="{x(count):.1f}" y1="{y(share):.1f}" y2="{y(share):.1f}" stroke="#ddd"/>'
        )
        parts.append(
            f'<text x="{LEFT_MARGIN - 8}" y="{y(share) + 4:.1f}" text-anchor="end">{share:.0%}</text>'
        )
    for mark in range(0, count + 1, count // 4):
        parts.append(
            f'<text x="{x(mark):.1f}" y="{HEIGHT - BOTTOM_MARGIN + 18}" text-anchor="middle">{mark}</text>'
        )
    parts.append(f'<text x="{x(count / 2):.1f}" y="{HEIGHT - 4}" text-anchor="middle">evaluations</text>')
    label_y = 0.0
    best_first = sorted(shares, key=lambda name: -shares[name][-1])
    for colour, name in zip(COLOURS, best_first, strict=False):
        curve = shares[name]
        line = " ".join(f"{x(at + 1):.1f},{y(float(share)):.1f}" for at, share in enumerate(curve))
        width = 1.5
        if name == "surrogate":
            width = 3
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="{width}"/>')
        label_y = max(y(float(curve[-1])), label_y + _LABEL_DISTANCE)
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
