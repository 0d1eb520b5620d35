"""The picture of docs/search.md: how much of the front searches find after so many evaluations.

Run from the repository's root: python -m benchmarks.search_picture FILE.json [--svg docs/search.svg]
FILE.json is what `python -m benchmarks.search --json` wrote. Shares are means over problems, of means over seeds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.search_problems import problem

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 760, 400, 52, 16, 130, 40
COLOURS = ("#c0392b", "#7f8c8d", "#2471a3", "#148f77", "#85c1e9", "#76d7c4", "#a569bd", "#dc7633", "#5d6d7e")
_APART = 15


def curves(file: Path) -> dict[str, NDArray[np.float64]]:
    """Of each search, the share of the exact front's hypervolume after each evaluation."""
    found: dict[str, dict[str, list[list[float]]]] = {}
    for one in json.loads(file.read_text())["runs"]:
        if not one["missing"]:
            run = one["run"]
            found.setdefault(run["search"], {}).setdefault(run["problem"], []).append(one["hypervolumes"])
    return {
        search: np.mean(
            [np.mean(seeds, axis=0) / problem(name).best() for name, seeds in those.items()], axis=0
        )
        for search, those in found.items()
    }


def svg(found: Mapping[str, NDArray[np.float64]]) -> str:
    count = max(len(curve) for curve in found.values())

    def x(evaluations: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * evaluations / count

    def y(share: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - share)

    parts = []
    for share in np.arange(0, 1.01, 0.2):
        parts.append(
            f'<line x1="{LEFT}" x2="{x(count):.1f}" y1="{y(share):.1f}" y2="{y(share):.1f}" stroke="#ddd"/>'
        )
        parts.append(f'<text x="{LEFT - 8}" y="{y(share) + 4:.1f}" text-anchor="end">{share:.0%}</text>')
    for mark in range(0, count + 1, count // 4):
        parts.append(f'<text x="{x(mark):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{mark}</text>')
    parts.append(f'<text x="{x(count / 2):.1f}" y="{HEIGHT - 4}" text-anchor="middle">evaluations</text>')
    below = 0.0
    best_first = sorted(found, key=lambda name: -found[name][-1])
    for colour, name in zip(COLOURS, best_first, strict=False):
        curve = found[name]
        line = " ".join(f"{x(at + 1):.1f},{y(float(share)):.1f}" for at, share in enumerate(curve))
        width = 3 if name == "surrogate" else 1.5
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="{width}"/>')
        below = max(y(float(curve[-1])), below + _APART)
        parts.append(f'<text x="{x(count) + 8:.1f}" y="{below + 4:.1f}" fill="{colour}">{name}</text>')
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
    given = parser.parse_args()
    given.svg.write_text(svg(curves(given.json)))


if __name__ == "__main__":
    main()
