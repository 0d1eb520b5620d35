"""Write the report of a study as one self-contained HTML page, which needs no network."""

from __future__ import annotations

import html
import statistics
from collections import defaultdict
from collections.abc import Sequence

import plotly.io

from orchestrator.pareto.front import Objective
from orchestrator.publishing.front_figure import front_figure
from orchestrator.publishing.metric_text import metric_label, metric_value
from orchestrator.study.candidate import Candidate
from orchestrator.study.durations import Savings
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


def report_html(results: Results, yaml_text: str, savings: Savings, cost_lines: Sequence[str] = ()) -> str:
    """Return the whole page. cost_lines: sentences about the time and cost of the study."""
    figure = plotly.io.to_html(
        front_figure(results), full_html=False, include_plotlyjs=True, config={"displaylogo": False}
    )
    title = html.escape(results.study)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}: the front</title>'
        f"<style>{STYLE}</style></head><body>\n<h1>{title}</h1>\n<p>{_summary(results)}</p>\n{figure}\n"
        f"<h2>The front, relative to the original</h2>\n{_front_table(results)}\n{_failures(results)}\n"
        f"{_predictions(results)}\n{_race(results)}\n{_sharing(savings)}\n{_time_and_cost(cost_lines)}\n"
        f"<h2>Environment</h2>\n{_environment(results)}\n<h2>Study</h2>\n"
        f"<pre>{html.escape(yaml_text)}</pre>\n</body></html>\n"
    )


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
    text = f"{len(results.candidates)} models: {', '.join(parts)}."
    limits = [_limit_text(objective) for objective in results.objectives if objective.limit is not None]
    if limits:
        text += f" Limits: {', '.join(limits)} (dotted)."
    if results.hypervolume is not None:
        text += f" Hypervolume {results.hypervolume:.3f} of 1."
    indistinguishable = indistinguishable_objectives(results)
    if indistinguishable:
        metrics_text = ", ".join(indistinguishable)
        text += f" No two models of the front differ in {metrics_text} by more than two standard errors."
    return html.escape(text + " Bars are standard errors; for timings, the spread.")


def _limit_text(objective: Objective) -> str:
    assert objective.limit is not None
    sign = {"min": "≤", "max": "≥"}[objective.goal]
    return f"{metric_label(objective.metric)} {sign} {metric_value(objective.metric, objective.limit)}"


def _front_table(results: Results) -> str:
    names = [objective.metric for objective in results.objectives]
    picks: dict[str, list[str]] = defaultdict(list)
    for name, id in results.picks.items():
        picks[id].append(name)
    by_id = {candidate.id: candidate for candidate in results.candidates}
    head = "".join(f"<th>{html.escape(metric_label(name))}</th><th>vs original</th>" for name in names)
    rows = []
    if results.original.id not in picks:
        rows.append(_row(results.original, results, [], "original"))
    rows += [_row(by_id[id], results, picks[id], "") for id in results.members]
    return f'<div class="scroll"><table><tr><th>recipe</th>{head}</tr>\n' + "\n".join(rows) + "</table></div>"


def _row(candidate: Candidate, results: Results, picks: Sequence[str], kind: str) -> str:
    """picks: the names under which the study recommends this candidate. kind: the CSS class of the row."""
    values, spread = metrics(candidate), errors(candidate)
    tags = "".join(f'<span class="name">{html.escape(name)}</span>' for name in picks)
    cells = [f"<td>{html.escape(str(candidate.recipe))}{tags}</td>"]
    for objective in results.objectives:
        name = objective.metric
        if name not in values:
            cells.append("<td>–</td><td></td>")
            continue
        error = ""
        if name in spread:
            error = f" <small>± {metric_value(name, spread[name], False)}</small>"
        relative = ""
        if kind != "original":
            relative = _relative(candidate, results.original, name)
        cells.append(f"<td>{metric_value(name, values[name])}{error}</td><td>{relative}</td>")
    return f'<tr class="{kind}">{"".join(cells)}</tr>'


def _relative(candidate: Candidate, original: Candidate, metric: str) -> str:
    """Return a metric relative to the original: size as a share, time as a speed-up, accuracy in points, other metrics
    in percent; with the standard error of the difference if both were measured on the same items."""
    value, reference = metrics(candidate)[metric], metrics(original).get(metric)
    if not reference or not value:
        return ""
    if metric.endswith("_ms"):
        if value <= reference:
            return f"{reference / value:.2f}× faster"
        return f"{value / reference:.2f}× slower"
    if metric.endswith(COSTS):
        return f"{value / reference:.0%}"
    paired = difference(candidate, original, metric)
    error = ""
    if "accuracy" in metric:
        if paired:
            error = f" <small>± {paired.error * 100:.1f}</small>"
        return f"{(value - reference) * 100:+.1f} points{error}"
    if paired:
        error = f" <small>± {paired.error / abs(reference):.1%}</small>"
    return f"{value / reference - 1:+.1%}{error}"


def _failures(results: Results) -> str:
    """Return the table of candidates that failed, exceeded a limit or were stopped, by kind."""
    messages: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for candidate in results.candidates:
        recipe = str(candidate.recipe)
        if candidate.failure is not None:
            messages[candidate.failure.kind.replace("_", " ")].append((recipe, candidate.failure.message))
        elif candidate.stopped is not None:
            messages["stopped early"].append((recipe, candidate.stopped))
        elif results.standings[candidate.id] == "over_limit" and candidate.id != results.original.id:
            messages["over a limit"].append((recipe, _exceeded_limits(candidate, results.objectives)))
    if not messages:
        return ""
    rows = []
    for kind, reasons in sorted(messages.items()):
        for recipe, message in reasons:
            cells = (html.escape(recipe), html.escape(kind), html.escape(message[:200]))
            rows.append(f"<tr><td>{'</td><td>'.join(cells)}</td></tr>")
    head = "<tr><th>recipe</th><th>kind</th><th>reason</th></tr>"
    count = ", ".join(f"{len(reasons)} {kind}" for kind, reasons in sorted(messages.items()))
    table = f'<div class="scroll text"><table>{head}{"".join(rows)}</table></div>'
    return f"<h2>Failed, over a limit or stopped: {count}</h2>{table}"


def _exceeded_limits(candidate: Candidate, objectives: Sequence[Objective]) -> str:
    """Return the metrics of a candidate that are over their limits, with their values."""
    values, texts = metrics(candidate), []
    for objective in objectives:
        metric = objective.metric
        if metric in values and objective.broken_by(values[metric]):
            texts.append(f"{metric_label(metric)} {metric_value(metric, values[metric])}")
    return ", ".join(texts)


def _predictions(results: Results) -> str:
    """Return the relative errors of the predictions of each metric that was predicted and measured."""
    errors_by_metric: dict[str, list[float]] = defaultdict(list)
    for candidate in results.candidates:
        for metric, error in prediction_errors(candidate).items():
            errors_by_metric[metric].append(abs(error))
    if not errors_by_metric:
        return ""
    texts = []
    for metric, sizes in sorted(errors_by_metric.items()):
        median = statistics.median(sizes)
        texts.append(
            f"{metric_label(metric)} {median:.1%} (median), {max(sizes):.1%} (worst of {len(sizes)})"
        )
    return (
        f"<h2>Predictions, which steered the search</h2>\n"
        f"<p>Relative errors against the measured values: {'; '.join(texts)}.</p>"
    )


def _race(results: Results) -> str:
    """Return the share of the evaluation that was used, and how well smaller shares predicted larger ones."""
    shares = [candidate.fidelity for candidate in results.candidates if candidate.measurement is not None]
    if sum(shares) == len(shares):
        return ""
    texts = [
        f"{metric_label(flips.metric)} from {flips.low:.0%} to {flips.high:.0%} of it: {flips.flipped} of {flips.pairs}"
        for flips in rank_flips(results)
    ]
    return (
        f"<h2>Evaluation on smaller shares</h2>\n<p>"
        f"{len(shares)} models were measured on {sum(shares) / len(shares):.0%} of the evaluation, on average. "
        f"Pairs whose order changed when they were measured on more: {'; '.join(texts) or 'none were'}.</p>"
    )


def _sharing(savings: Savings) -> str:
    """Return the measured seconds that sharing saved; empty if nothing was shared."""
    parts = [
        (
            f"{savings.steps} steps shared by several candidates",
            savings.steps and savings.steps_seconds,
        ),
        ("statistics reused from earlier candidates", savings.statistics_seconds),
        (f"{savings.jobs} jobs already in the store", savings.jobs and savings.jobs_seconds),
    ]
    texts = [f"{description} ({seconds:,.1f} s)" for description, seconds in parts if seconds]
    if not texts:
        return ""
    return (
        f"<h2>Time saved by sharing</h2>\n<p>{html.escape('; '.join(texts))}: {savings.seconds:,.1f} s of one slot's "
        f"time saved, measured where the same work was done.</p>"
    )


def _time_and_cost(lines: Sequence[str]) -> str:
    """Return time, nodes and money; the total is first."""
    if not lines:
        return ""
    return "<h2>Time and cost</h2>\n" + "\n".join(f"<p>{html.escape(line)}</p>" for line in lines)


def _environment(results: Results) -> str:
    measurement = results.original.measurement
    if measurement is None:
        return "<p>unknown</p>"
    versions = [f"{name} {value}" for name, value in measurement.environment.items()]
    return f"<p>{html.escape(' · '.join(versions) or 'unknown')}</p>"
