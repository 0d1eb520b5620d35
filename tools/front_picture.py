"""Draw the front of a study as an SVG: quality against size, with the time per token as colour.

Run from the repository's root: python -m tools.front_picture runs/quickstart/front.json docs/front.svg
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt  # the backend is chosen first

from orchestrator.persistence.front_file import read_front
from orchestrator.study.front_snapshot import FrontSnapshot


def draw(front: FrontSnapshot, metric: str, path: Path) -> None:
    """Write the picture of a front whose objectives are `size_bytes`, `decode_ms` and `metric`."""
    models = [front.original, *(member.measured for member in front.members)]
    sizes = [model.metrics["size_bytes"] / 1e6 for model in models]
    qualities = [model.metrics[metric] for model in models]
    errors = [model.errors.get(metric, 0.0) for model in models]
    times = [model.metrics["decode_ms"] for model in models]
    # Fixed identifiers and no date: the same front gives the same bytes.
    plt.rcParams.update({"svg.hashsalt": "slimfront", "svg.fonttype": "none", "font.size": 11})
    figure, axes = plt.subplots(figsize=(7.6, 4.2), layout="constrained")
    axes.errorbar(sizes, qualities, yerr=errors, fmt="none", ecolor="#b3b9c1", elinewidth=1, zorder=1)
    members = sorted(zip(sizes[1:], qualities[1:], strict=True))
    axes.plot(*zip(*members, strict=True), color="#b3b9c1", linestyle="--", linewidth=1, zorder=1)
    dots = axes.scatter(sizes, qualities, c=times, cmap="RdYlGn_r", edgecolors="#1b1f24", s=60, zorder=2)
    axes.annotate(
        "original", (sizes[0], qualities[0]), xytext=(0, 10), textcoords="offset points", ha="center"
    )
    axes.set(xlabel="size of the weight files, MB", ylabel=f"{metric}, with its standard error")
    axes.spines[["top", "right"]].set_visible(False)
    figure.colorbar(dots, label="ms per generated token")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Read a front and write its picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("front", type=Path, help="front.json of a study")
    parser.add_argument("svg", type=Path, help="the picture to write")
    parser.add_argument(
        "--metric", default="accuracy", help="the metric of the vertical axis (default: %(default)s)"
    )
    arguments = parser.parse_args()
    draw(read_front(arguments.front), arguments.metric, arguments.svg)


if __name__ == "__main__":
    main()
