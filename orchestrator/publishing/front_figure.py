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
    shade = next((o for o in results.objectives if o not in pairs[0]), None) if len(pairs) > 1 else None
    groups = _groups(results)
    for number, (x, y) in enumerate(pairs):
        place = {"row": number // columns + 1, "col": number % columns + 1}
        for name, candidates in groups.items():
            shown = [one for one in candidates if x.metric in metrics(one) and y.metric in metrics(one)]
            if shown:
                figure.add_trace(_scatter(name, shown, results, x, y, shade, number == 0), **place)
        figure.update_xaxes(title_text=axis_title(x), **place)
        figure.update_yaxes(title_text=axis_title(y), **place)
        for objective, draw in ((x, figure.add_vline), (y, figure.add_hline)):
            if objective.limit is not None and _near(objective, results):
                limit = objective.limit * display_unit(objective.metric)[1]
                draw(limit, line={"color": "#c9ced4", "width": 1, "dash": "dot"}, **place)
    figure.update_xaxes(gridcolor=LINE, linecolor=LINE, zeroline=False, title_standoff=8, automargin=True)
    figure.update_yaxes(gridcolor=LINE, linecolor=LINE, zeroline=False, title_standoff=8, automargin=True)
    figure.update_layout(
        height=470 if rows == 1 else 400 * rows,
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
    better = "smaller" if objective.goal == "min" else "larger"
    return f"{name.replace('_', ' ')}{f' ({unit})' if unit else ''}, {better} is better"


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
    others: list[Candidate] = []
    front: list[Candidate] = []
    for candidate in results.candidates:
        if candidate.measurement is None or candidate.id == results.original.id:
            continue
        (front if results.standings[candidate.id] == "front" else others).append(candidate)
    front.sort(key=lambda one: results.members.index(one.id))
    found = {"not on the front": others, "front": front, "original": [results.original]}
    return {name: members for name, members in found.items() if members}


def _scatter(
    group: str,
    shown: Sequence[Candidate],
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
        factor = display_unit(shade.metric)[1]
        marker |= {"color": [metrics(one)[shade.metric] * factor for one in shown], "coloraxis": "coloraxis"}
    return go.Scatter(
        x=_values(shown, x),
        y=_values(shown, y),
        error_x=_bars(shown, x, group),
        error_y=_bars(shown, y, group),
        mode="lines+markers" if group == "front" and len(results.objectives) == 2 else "markers",
        line={"color": "#9dbfb2", "width": 1.5},
        marker=marker,
        name=group,
        legendgroup=group,
        showlegend=legend,
        text=[_hover(one, results) for one in shown],
        hovertemplate="%{text}<extra></extra>",
    )


def _values(shown: Sequence[Candidate], objective: Objective) -> list[float]:
    factor = display_unit(objective.metric)[1]
    return [metrics(one)[objective.metric] * factor for one in shown]


def _bars(shown: Sequence[Candidate], objective: Objective, group: str) -> dict[str, Any] | None:
    """Return error bars for the front and the original; more of them would hide the points."""
    factor = display_unit(objective.metric)[1]
    lengths = [errors(one).get(objective.metric, 0.0) * factor for one in shown]
    if group == "not on the front" or not any(lengths):
        return None
    return {"type": "data", "array": lengths, "color": "#8a929b", "thickness": 1, "width": 2}


def _hover(candidate: Candidate, results: Results) -> str:
    known, spread = metrics(candidate), errors(candidate)
    lines = [f"<b>{html.escape(step)}</b>" for step in str(candidate.recipe).split(" → ")]
    names = [o.metric for o in results.objectives]
    names += sorted(known.keys() - {*names})
    for name in names:
        if name in known:
            error = f" ± {metric_value(name, spread[name])}" if name in spread else ""
            lines.append(f"{metric_label(name)}: {metric_value(name, known[name])}{error}")
    standing = results.standings[candidate.id]
    return "<br>".join([*lines, "" if standing in ("front", "dominated") else standing.replace("_", " ")])


def _near(objective: Objective, results: Results) -> bool:
    """Whether a limit is within the range of the values; a distant one would squeeze the points into a corner."""
    values = [
        metrics(one)[objective.metric] for one in results.candidates if objective.metric in metrics(one)
    ]
    return bool(values) and objective.limit is not None and min(values) <= objective.limit <= max(values)
