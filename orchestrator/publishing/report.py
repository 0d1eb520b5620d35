"""Report: a study's front as one self-contained HTML page. No network, nothing to install to read it."""

from __future__ import annotations

import html
import itertools
import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
import plotly.io
from plotly.subplots import make_subplots

from orchestrator.pareto.front import Objective
from orchestrator.study.candidate import Candidate
from orchestrator.study.front_snapshot import Difference
from orchestrator.study.results import (
    COSTS,
    Results,
    difference,
    errors,
    indistinguishable_objectives,
    metrics,
    prediction_errors,
    rank_flips,
)
from orchestrator.study.savings import Savings

UNITS = {"_bytes": ("MB", 1e-6), "_ms": ("ms", 1.0), "_gib": ("GiB", 1.0), "_joules": ("J", 1.0)}
INK, GREY, LINE = "#1b1f24", "#b3b9c1", "#e6e8eb"
SHADES = "Viridis"

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: #1b1f24;
  max-width: 1240px; margin: 0 auto; padding: 28px 32px 64px; background: #fff; }
h1 { font-size: 24px; font-weight: 650; margin: 0; letter-spacing: -0.01em; }
h2 { font-size: 17px; font-weight: 650; margin: 36px 0 8px; }
p { margin: 4px 0 0; color: #57606a; max-width: 80ch; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14px; }
th { text-align: right; font-weight: 600; color: #57606a; border-bottom: 1px solid #c9ced4; padding: 6px 10px;
  vertical-align: bottom; }
td { text-align: right; padding: 6px 10px; border-bottom: 1px solid #eceef0; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; white-space: normal; }
td small { color: #8a929b; font-size: 12px; }
.text th, .text td { text-align: left; white-space: normal; }
tr.original td { color: #b42318; }
.name { display: inline-block; margin-left: 8px; padding: 0 7px; border-radius: 9px; background: #e7f0ec;
  color: #21634a; font-size: 12px; white-space: nowrap; }
pre { background: #f6f7f8; padding: 14px 16px; border-radius: 6px; overflow-x: auto;
  font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.scroll { overflow-x: auto; }
"""


def report_html(results: Results, yaml_text: str, savings: Savings, spent: Sequence[str] = ()) -> str:
    """The whole page. spent: what the study took, in words."""
    figure = plotly.io.to_html(
        front_figure(results), full_html=False, include_plotlyjs=True, config={"displaylogo": False}
    )
    title = html.escape(results.study)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}: the front</title>'
        f"<style>{STYLE}</style></head><body>\n<h1>{title}</h1>\n<p>{_summary(results)}</p>\n{figure}\n"
        f"<h2>The front, relative to the original</h2>\n{_front_table(results)}\n{_failures(results)}\n"
        f"{_predictions(results)}\n{_race(results)}\n{_sharing(savings)}\n{_took(spent)}\n"
        f"<h2>Measured on</h2>\n{_environment(results)}\n<h2>Study</h2>\n"
        f"<pre>{html.escape(yaml_text)}</pre>\n</body></html>\n"
    )


def front_figure(results: Results) -> go.Figure:
    """One scatter for each pair of objectives, of all that was measured; colour is a third objective.

    Front members are coloured and joined by a line where there are two objectives, the others grey, the
    original is a star. Bars are standard errors, for timings the spread.
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
                limit = objective.limit * _unit(objective.metric)[1]
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
    """`size_bytes` is `size (MB), smaller is better` to a reader."""
    unit = _unit(objective.metric)[0]
    name = objective.metric
    for suffix in UNITS:
        name = name.removesuffix(suffix)
    better = "smaller" if objective.goal == "min" else "larger"
    return f"{name.replace('_', ' ')}{f' ({unit})' if unit else ''}, {better} is better"


def _pairs(objectives: Sequence[Objective]) -> list[tuple[Objective, Objective]]:
    """Costs on the x axis; what a cost buys in quality comes before what two costs have to do with each other."""
    ordered = sorted(objectives, key=_is_quality)
    if len(ordered) == 1:
        return [(ordered[0], ordered[0])]
    return sorted(
        itertools.combinations(ordered, 2), key=lambda pair: _is_quality(pair[0]) or not _is_quality(pair[1])
    )


def _is_quality(objective: Objective) -> bool:
    return not objective.metric.endswith(COSTS)


def _groups(results: Results) -> dict[str, list[Candidate]]:
    """What is drawn, in the order of drawing: the original last, on top."""
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
        factor = _unit(shade.metric)[1]
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
    factor = _unit(objective.metric)[1]
    return [metrics(one)[objective.metric] * factor for one in shown]


def _bars(shown: Sequence[Candidate], objective: Objective, group: str) -> dict[str, Any] | None:
    """Error bars; only where it matters, on the front and the original, or the picture drowns in them."""
    factor = _unit(objective.metric)[1]
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
            error = f" ± {_number(name, spread[name])}" if name in spread else ""
            lines.append(f"{_label(name)}: {_number(name, known[name])}{error}")
    standing = results.standings[candidate.id]
    return "<br>".join([*lines, "" if standing in ("front", "dominated") else standing.replace("_", " ")])


def _summary(results: Results) -> str:
    counts: dict[str, int] = defaultdict(int)
    for standing in results.standings.values():
        counts[standing] += 1
    words = {
        "front": "on the front", "dominated": "dominated", "over_limit": "over a limit", "failed": "failed",
        "unreliable": "too noisy to compare", "other_environment": "measured in another environment, not compared",
        "incomplete": "measured in part", "eliminated": "adds little by a part of the evaluation",
        "stopped": "stopped early", "waiting": "not measured",
    }  # fmt: skip
    parts = [f"{counts[standing]} {text}" for standing, text in words.items() if counts[standing]]
    limits = [
        f"{_label(o.metric)} {'≤' if o.goal == 'min' else '≥'} {_number(o.metric, o.limit)}"
        for o in results.objectives
        if o.limit is not None
    ]
    volume, alike = results.hypervolume, indistinguishable_objectives(results)
    text = f"{len(results.candidates)} models: {', '.join(parts)}."
    text += f" Limits: {', '.join(limits)} (dotted)." if limits else ""
    text += f" Hypervolume {volume:.3f} of 1." if volume is not None else ""
    if alike:
        text += f" No two models of the front differ in {', '.join(alike)} by more than chance may do."
    return html.escape(text + " Bars are standard errors; for timings, the spread.")


def _front_table(results: Results) -> str:
    names = [objective.metric for objective in results.objectives]
    named: dict[str, list[str]] = defaultdict(list)
    for name, id in results.picks.items():
        named[id].append(name)
    by_id = {candidate.id: candidate for candidate in results.candidates}
    head = "".join(f"<th>{html.escape(_label(n))}</th><th>vs original</th>" for n in names)
    rows = [_row(results.original, results, [], "original")] if results.original.id not in named else []
    rows += [_row(by_id[id], results, named[id], "") for id in results.members]
    return f'<div class="scroll"><table><tr><th>recipe</th>{head}</tr>\n' + "\n".join(rows) + "</table></div>"


def _row(candidate: Candidate, results: Results, named: Sequence[str], kind: str) -> str:
    known, spread, original = metrics(candidate), errors(candidate), metrics(results.original)
    tags = "".join(f'<span class="name">{html.escape(name)}</span>' for name in named)
    cells = [f"<td>{html.escape(str(candidate.recipe))}{tags}</td>"]
    for objective in results.objectives:
        name = objective.metric
        if name not in known:
            cells.append("<td>–</td><td></td>")
            continue
        error = f" <small>± {_number(name, spread[name], False)}</small>" if name in spread else ""
        apart = None if kind == "original" else difference(candidate, results.original, name)
        relative = "" if kind == "original" else _relative(name, known[name], original.get(name), apart)
        cells.append(f"<td>{_number(name, known[name])}{error}</td><td>{relative}</td>")
    return f'<tr class="{kind}">{"".join(cells)}</tr>'


def _relative(metric: str, value: float, original: float | None, apart: Difference | None) -> str:
    """Size as a share, time as how many times faster, accuracy in points, anything else in percent; with the
    standard error of the difference where both were measured on the same items."""
    if not original or not value:
        return ""
    if metric.endswith("_ms"):
        return f"{original / value:.2f}× faster" if value <= original else f"{value / original:.2f}× slower"
    if metric.endswith(COSTS):
        return f"{value / original:.0%}"
    if "accuracy" in metric:
        error = f" <small>± {apart.error * 100:.1f}</small>" if apart else ""
        return f"{(value - original) * 100:+.1f} points{error}"
    error = f" <small>± {apart.error / abs(original):.1%}</small>" if apart else ""
    return f"{value / original - 1:+.1%}{error}"


def _failures(results: Results) -> str:
    """What failed, by kind, what a limit kept out and what was stopped."""
    kinds: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for one in results.candidates:
        if one.failure is not None:
            kinds[one.failure.kind.replace("_", " ")].append((str(one.recipe), one.failure.message))
        elif one.stopped is not None:
            kinds["stopped early"].append((str(one.recipe), one.stopped))
        elif results.standings[one.id] == "over_limit" and one.id != results.original.id:
            broken = [o for o in results.objectives if o.metric in metrics(one)]
            broken = [o for o in broken if o.broken_by(metrics(one)[o.metric])]
            texts = [f"{_label(o.metric)} {_number(o.metric, metrics(one)[o.metric])}" for o in broken]
            kinds["over a limit"].append((str(one.recipe), ", ".join(texts)))
    if not kinds:
        return ""
    rows = [
        f"<tr><td>{html.escape(recipe)}</td><td>{html.escape(kind)}</td><td>{html.escape(message[:200])}</td></tr>"
        for kind, found in sorted(kinds.items())
        for recipe, message in found
    ]
    head = "<tr><th>recipe</th><th>kind</th><th>reason</th></tr>"
    count = ", ".join(f"{len(found)} {kind}" for kind, found in sorted(kinds.items()))
    table = f'<div class="scroll text"><table>{head}{"".join(rows)}</table></div>'
    return f"<h2>Failed, over a limit or stopped: {count}</h2>{table}"


def _predictions(results: Results) -> str:
    """How far predictions were off, of every metric that was predicted and measured."""
    off: dict[str, list[float]] = defaultdict(list)
    for one in results.candidates:
        for metric, error in prediction_errors(one).items():
            off[metric].append(abs(error))
    if not off:
        return ""
    texts = [
        f"{_label(metric)} by {statistics.median(found):.1%} (median), {max(found):.1%} (worst of {len(found)})"
        for metric, found in sorted(off.items())
    ]
    return (
        f"<h2>Predictions, which steered the search</h2>\n<p>Off what was measured: {'; '.join(texts)}.</p>"
    )


def _race(results: Results) -> str:
    """How much of the evaluation was read, and how well the smaller shares of it foretold the larger."""
    read = sum(one.fidelity for one in results.candidates if one.measurement is not None)
    every = sum(one.measurement is not None for one in results.candidates)
    if read == every:
        return ""
    texts = [
        f"{_label(flips.metric)} from {flips.low:.0%} to {flips.high:.0%} of it: {flips.flipped} of {flips.pairs}"
        for flips in rank_flips(results)
    ]
    return (
        f"<h2>The race</h2>\n<p>{every} models were measured on {read / every:.0%} of the evaluation, on average. "
        f"Pairs whose order changed when they were measured on more: {'; '.join(texts) or 'none were'}.</p>"
    )


def _sharing(savings: Savings) -> str:
    """What sharing saved, in seconds that were measured; nothing where nothing was shared."""
    parts = [
        (
            f"{savings.steps} steps of one candidate were another's too",
            savings.steps and savings.steps_seconds,
        ),
        ("statistics of a model were there for its next candidates", savings.statistics_seconds),
        (f"{savings.jobs} jobs were done in the store already", savings.jobs and savings.jobs_seconds),
    ]
    texts = [f"{what} ({seconds:,.1f} s)" for what, seconds in parts if seconds]
    if not texts:
        return ""
    return (
        f"<h2>What was shared</h2>\n<p>{html.escape('; '.join(texts))}: {savings.seconds:,.1f} s of one slot's "
        f"time saved, by what the same work took where it was done.</p>"
    )


def _took(spent: Sequence[str]) -> str:
    """Time, nodes and money, the sum first."""
    if not spent:
        return ""
    return "<h2>What it took</h2>\n" + "\n".join(f"<p>{html.escape(one)}</p>" for one in spent)


def _environment(results: Results) -> str:
    measurement = results.original.measurement
    known = measurement.environment if measurement else {}
    return (
        f"<p>{html.escape(' · '.join(f'{name} {value}' for name, value in known.items()) or 'unknown')}</p>"
    )


def _near(objective: Objective, results: Results) -> bool:
    """Whether a limit lies among what is drawn; a far one would squeeze the picture into a corner."""
    values = [
        metrics(one)[objective.metric] for one in results.candidates if objective.metric in metrics(one)
    ]
    return bool(values) and objective.limit is not None and min(values) <= objective.limit <= max(values)


def _unit(metric: str) -> tuple[str, float]:
    """The unit that a metric is shown in, and what to multiply it by."""
    return next((unit for suffix, unit in UNITS.items() if metric.endswith(suffix)), ("", 1.0))


def _label(metric: str) -> str:
    for suffix in UNITS:
        metric = metric.removesuffix(suffix)
    return metric.replace("_", " ")


def _number(metric: str, value: float, with_unit: bool = True) -> str:
    unit, factor = _unit(metric)
    scaled = value * factor
    digits = 1 if abs(scaled) >= 100 else 2 if abs(scaled) >= 10 or unit else 3
    return f"{scaled:,.{digits}f}{f' {unit}' if unit and with_unit else ''}"
