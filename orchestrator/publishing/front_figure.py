"""The figure of the report: scatter plots of the measured candidates."""

from __future__ import annotations

import html
import itertools
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from orchestrator.pareto.front import Objective
from orchestrator.publishing.metric_text import UNITS, display_unit, metric_label, metric_value
from orchestrator.study.candidate import Candidate
from orchestrator.study.results import COSTS, Results, errors, metrics

INK, GREY, LINE = "#1b1f24", "#b3b9c1", "#e6e8eb"
SHADES = "Viridis"


def front_figure(results: Results) -> go.Figure:
    """Return one scatter plot of all measured candidates for each pair of objectives.

    Members of the front are coloured by a third objective, or joined by a line if there are only two. Other
    candidates are grey, the original is a star. Error bars are standard errors; for timings, the spread.
    """
    pairs = _pairs(results.objectives)
    columns = min(len(pairs), 3)
    rows = -(-len(pairs) // columns)
    figure = make_subplots(rows, columns, horizontal_spacing=0.085, vertical_spacing=0.16)
    shade = None
    if len(pairs) > 1:
        shade = next((objective for objective in results.objectives if objective not in pairs[0]), None)
    groups = _groups(results)
    for number, (x, y) in enumerate(pairs):
        cell = {"row": number // columns + 1, "col": number % columns + 1}
        for name, candidates in groups.items():
            plotted = [
                candidate for candidate in candidates if {x.metric, y.metric} <= metrics(candidate).keys()
            ]
            if plotted:
                figure.add_trace(_scatter(name, plotted, results, x, y, shade, number == 0), **cell)
        figure.update_xaxes(title_text=axis_title(x), **cell)
        figure.update_yaxes(title_text=axis_title(y), **cell)
        for objective, draw in ((x, figure.add_vline), (y, figure.add_hline)):
            if objective.limit is not None and _within_range(objective, results):
                limit = objective.limit * display_unit(objective.metric)[1]
                draw(limit, line={"color": "#c9ced4", "width": 1, "dash": "dot"}, **cell)
    figure.update_xaxes(gridcolor=LINE, linecolor=LINE, zeroline=False, title_standoff=8, automargin=True)
    figure.update_yaxes(gridcolor=LINE, linecolor=LINE, zeroline=False, title_standoff=8, automargin=True)
    figure.update_layout(
        height={1: 470}.get(rows, 400 * rows),
        margin={"l": 10, "r": 10, "t": 56, "b": 10},
        font={"family": "system-ui, -apple-system, Segoe UI, Roboto, sans-serif", "size": 13, "color": INK},
        plot_bgcolor="#fff",
        paper_bgcolor="#fff",
        hoverlabel={"bgcolor": "#fff", "bordercolor": "#c9ced4", "align": "left"},
        legend={"orientation": "h", "x": 0, "y": 1, "xanchor": "left", "yref": "container", "yanchor": "top"},
    )
    if shade is not None:
        bar = {"title": {"text": axis_title(shade), "side": "right"}, "thickness": 12, "outlinewidth": 0}
        figure.update_layout(coloraxis={"colorscale": SHADES, "colorbar": bar})
    return figure


def axis_title(objective: Objective) -> str:
    """Return the title of an axis, such as `size (MB), smaller is better`."""
    unit = display_unit(objective.metric)[0]
    name = objective.metric
    for suffix in UNITS:
        name = name.removesuffix(suffix)
    title = name.replace("_", " ")
    if unit:
        title += f" ({unit})"
    better = {"min": "smaller", "max": "larger"}[objective.goal]
    return f"{title}, {better} is better"


def _pairs(objectives: Sequence[Objective]) -> list[tuple[Objective, Objective]]:
    """Return the pairs of objectives, costs on the x axis; pairs of a cost and a quality come first."""
    ordered = sorted(objectives, key=_is_quality)
    if len(ordered) == 1:
        return [(ordered[0], ordered[0])]
    return sorted(
        itertools.combinations(ordered, 2), key=lambda pair: _is_quality(pair[0]) or not _is_quality(pair[1])
    )


def _is_quality(objective: Objective) -> bool:
    return not objective.metric.endswith(COSTS)


def _groups(results: Results) -> dict[str, list[Candidate]]:
    """Return the candidates of each group in drawing order; the original is last, on top."""
    dominated: list[Candidate] = []
    front: list[Candidate] = []
    for candidate in results.candidates:
        if candidate.measurement is None or candidate.id == results.original.id:
            continue
        if results.standings[candidate.id] == "front":
            front.append(candidate)
        else:
            dominated.append(candidate)
    front.sort(key=lambda candidate: results.members.index(candidate.id))
    groups = {"not on the front": dominated, "front": front, "original": [results.original]}
    return {name: members for name, members in groups.items() if members}


def _scatter(
    group: str,
    plotted: Sequence[Candidate],
    results: Results,
    x: Objective,
    y: Objective,
    shade: Objective | None,
    legend: bool,
) -> go.Scatter:
    marker: dict[str, Any] = {
        "not on the front": {"color": GREY, "size": 7, "opacity": 0.7},
        "front": {"color": "#21634a", "size": 11, "line": {"color": "#fff", "width": 1}},
        "original": {"color": "#b42318", "size": 16, "symbol": "star", "line": {"color": "#fff", "width": 1}},
    }[group]
    if group == "front" and shade is not None:
        marker |= {"color": _values(plotted, shade), "coloraxis": "coloraxis"}
    mode = "markers"
    if group == "front" and len(results.objectives) == 2:
        mode = "lines+markers"
    return go.Scatter(
        x=_values(plotted, x),
        y=_values(plotted, y),
        error_x=_bars(plotted, x, group),
        error_y=_bars(plotted, y, group),
        mode=mode,
        line={"color": "#9dbfb2", "width": 1.5},
        marker=marker,
        name=group,
        legendgroup=group,
        showlegend=legend,
        text=[_hover(candidate, results) for candidate in plotted],
        hovertemplate="%{text}<extra></extra>",
    )


def _values(plotted: Sequence[Candidate], objective: Objective) -> list[float]:
    factor = display_unit(objective.metric)[1]
    return [metrics(candidate)[objective.metric] * factor for candidate in plotted]


def _bars(plotted: Sequence[Candidate], objective: Objective, group: str) -> dict[str, Any] | None:
    """Return error bars for the front and the original; more of them would hide the points."""
    factor = display_unit(objective.metric)[1]
    lengths = [errors(candidate).get(objective.metric, 0.0) * factor for candidate in plotted]
    if group == "not on the front" or not any(lengths):
        return None
    return {"type": "data", "array": lengths, "color": "#8a929b", "thickness": 1, "width": 2}


def _hover(candidate: Candidate, results: Results) -> str:
    values, spread = metrics(candidate), errors(candidate)
    lines = [f"<b>{html.escape(step)}</b>" for step in str(candidate.recipe).split(" → ")]
    names = [objective.metric for objective in results.objectives]
    names += sorted(values.keys() - {*names})
    for name in names:
        if name not in values:
            continue
        line = f"{metric_label(name)}: {metric_value(name, values[name])}"
        if name in spread:
            line += f" ± {metric_value(name, spread[name])}"
        lines.append(line)
    standing = results.standings[candidate.id]
    if standing not in ("front", "dominated"):
        lines.append(standing.replace("_", " "))
    return "<br>".join(lines)


def _within_range(objective: Objective, results: Results) -> bool:
    """Whether a limit is within the range of the values. A distant one would squeeze the points into a corner."""
    measured = [metrics(candidate) for candidate in results.candidates]
    values = [values[objective.metric] for values in measured if objective.metric in values]
    return bool(values) and objective.limit is not None and min(values) <= objective.limit <= max(values)
