"""The page that shows a study contains all that its readers need."""

from __future__ import annotations

import re
from typing import Any

import pytest

from jobs import techniques
from jobs.job import Failure
from jobs.measurement.measurement import Measurement
from jobs.recipe import Origin, Recipe
from orchestrator.pareto.front import Objective
from orchestrator.publishing.front_figure import axis_title, front_figure
from orchestrator.publishing.report import report_html
from orchestrator.study.candidate import Candidate
from orchestrator.study.durations import Savings
from orchestrator.study.results import Results, judge

SIZE, SPEED = Objective("size_bytes", "min", limit=120e6), Objective("decode_ms", "min")
ACCURACY, PERPLEXITY = Objective("accuracy", "max"), Objective("perplexity", "min")
ORIGINAL = Recipe(Origin("model", "data", 0))


def candidate(dropped: int, megabytes: float, accuracy: float, decode: float, **changes: Any) -> Candidate:
    measurement = Measurement(
        {"size_bytes": megabytes * 1e6, "accuracy": accuracy, "decode_ms": decode, "perplexity": 40.0},
        {"accuracy": 0.012},
        environment={"cpu": "Xeon", "threads": "2"},
    )
    recipe = ORIGINAL.then(techniques.load("drop_layers").of({"count": dropped}))
    fields = {"state": "measured", "measurement": measurement, **changes}
    return Candidate(recipe, size_bytes=int(megabytes * 1e6), **fields)


def results(*objectives: Objective) -> Results:
    broken = Failure("out_of_memory", "killed at <3.1 GiB>")
    return judge(
        "laptop",
        objectives,
        candidate(0, 200, 0.8, 10.0),
        [
            candidate(1, 100, 0.7, 5.0),
            candidate(2, 100, 0.6, 6.0),
            candidate(3, 50, 0.5, 4.0),
            candidate(4, 90, 0.0, 0.0, state="failed", measurement=None, failure=broken),
            candidate(5, 150, 0.0, 0.0, state="over_limit", measurement=None),
            candidate(6, 80, 0.0, 0.0, state="stopped", measurement=None, stopped="hopeless <by now>"),
        ],
    )


def test_the_page_reports_the_savings_of_shared_work() -> None:
    page = report_html(results(SIZE), "", Savings(3, 30.0, 12.4, 0, 0.0))
    assert "3 steps shared by several candidates (30.0 s)" in page
    assert "(12.4 s): 42.4 s of one slot's time saved" in page
    assert "already in the store" not in page
    assert "Time saved by sharing" not in report_html(results(SIZE), "", Savings())


def test_the_page_reports_the_time_and_cost_of_the_study() -> None:
    page = report_html(
        results(SIZE), "", Savings(), ["2.00 node-hours, 1.80 USD", "g6 <spot>: 2.00 node-hours"]
    )
    assert (
        "<h2>Time and cost</h2>\n<p>2.00 node-hours, 1.80 USD</p>\n<p>g6 &lt;spot&gt;: 2.00 node-hours</p>"
        in page
    )
    assert "Time and cost" not in report_html(results(SIZE), "", Savings())


def test_the_page_shows_the_errors_of_predictions() -> None:
    candidates = [
        candidate(dropped, 100, 0.7, 5.0, predicted={"decode_ms": predicted_ms})
        for dropped, predicted_ms in ((1, 5.5), (2, 5.1), (3, 4.9))
    ]
    page = report_html(
        judge("laptop", [SIZE, SPEED], candidate(0, 200, 0.8, 10.0), candidates), "", Savings()
    )
    assert "decode 2.0% (median), 10.0% (worst of 3)" in page
    assert "Predictions" not in report_html(results(SIZE, SPEED), "", Savings())


@pytest.fixture(scope="module")
def page() -> str:
    return report_html(results(SIZE, SPEED, ACCURACY), "name: laptop\nnote: <b>&\n", Savings())


def test_the_page_needs_no_network(page: str) -> None:
    assert not re.search(r"<(script|link|img|iframe)[^>]+(src|href)=", page)
    assert "Plotly.newPlot" in page


def test_the_table_compares_each_member_with_the_original(page: str) -> None:
    (row,) = re.findall(r"<tr[^>]*><td>drop_layers\(count=1\).*?</tr>", page)
    assert "100.0 MB" in row
    assert "50%" in row
    assert "2.00× faster" in row
    assert "-10.0 points" in row
    assert "± 0.012" in row


def test_dominated_candidates_are_not_in_the_table(page: str) -> None:
    assert "<td>drop_layers(count=2)" not in page


def test_failures_are_listed_by_kind_with_escaped_reasons(page: str) -> None:
    assert "Failed, over a limit or stopped: 1 out of memory, 1 over a limit, 1 stopped early" in page
    assert "hopeless &lt;by now&gt;" in page
    assert "killed at &lt;3.1 GiB&gt;" in page
    assert "size 150.0 MB" in page


def test_the_page_states_the_environment_and_the_study(page: str) -> None:
    assert "cpu Xeon · threads 2" in page
    assert "note: &lt;b&gt;&amp;" in page


@pytest.mark.parametrize(
    ("objectives", "pairs"),
    [
        ((ACCURACY,), 1),
        ((SIZE, ACCURACY), 1),
        ((SIZE, SPEED, ACCURACY), 3),
        ((SIZE, SPEED, ACCURACY, PERPLEXITY), 6),
    ],
)
def test_every_pair_of_objectives_has_its_plot(objectives: tuple[Objective, ...], pairs: int) -> None:
    figure = front_figure(results(*objectives))
    assert len({trace.xaxis for trace in figure.data}) == pairs
    assert sum(trace.name == "original" for trace in figure.data) == pairs


def test_the_first_plot_is_size_against_accuracy_coloured_by_the_third_objective() -> None:
    figure = front_figure(results(SIZE, SPEED, ACCURACY))
    front = next(trace for trace in figure.data if trace.name == "front")
    assert list(front.x) == [50.0, 100.0]
    assert list(front.y) == [0.5, 0.7]
    assert list(front.marker.color) == [4.0, 5.0]
    assert list(front.error_y.array) == [0.012, 0.012]
    assert figure.layout.coloraxis.colorbar.title.text == "decode (ms), smaller is better"


def test_hover_text_shows_the_recipe_with_its_metrics_and_errors() -> None:
    figure = front_figure(results(SIZE, ACCURACY))
    front = next(trace for trace in figure.data if trace.name == "front")
    assert "drop_layers(count=3)" in front.text[0]
    assert "accuracy: 0.500 ± 0.012" in front.text[0]
    assert "size: 50.00 MB" in front.text[0]


@pytest.mark.parametrize(
    ("objective", "title"),
    [
        (SIZE, "size (MB), smaller is better"),
        (SPEED, "decode (ms), smaller is better"),
        (ACCURACY, "accuracy, larger is better"),
        (Objective("peak_memory_gib"), "peak memory (GiB), smaller is better"),
    ],
)
def test_axes_state_units_and_direction(objective: Objective, title: str) -> None:
    assert axis_title(objective) == title


def test_a_study_without_a_front_has_a_page() -> None:
    original = candidate(0, 200, 0.8, 10.0, state="running", measurement=None)
    assert "200.0 MB" in report_html(judge("laptop", [SIZE, ACCURACY], original, []), "", Savings())
