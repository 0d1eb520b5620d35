"""Progress: how far a study is, on a terminal as a live line, elsewhere as plain lines, and in status.json."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from orchestrator.persistence.atomic_files import write_json

if TYPE_CHECKING:
    from orchestrator.study.results import Results
    from orchestrator.study.study import Study


@dataclass(frozen=True)
class Status:
    """What `slimfront status` shows. at: seconds since 1970; seconds_left: None where nothing is known yet; exhausted:
    why the search ended before it had tried as many candidates as it might; to_time: the timings left, at most.
    node_hours, cost: of the nodes that were up while it ran, in `currency`; spent: the same in words, where there is a
    price or a budget; bill: with each kind of node and its price."""

    study: str
    stage: str
    at: float
    candidates: int
    measured: int
    running: int
    failed: int
    over_limit: int
    steps_shared: int
    front: int
    hypervolume: float | None
    seconds: float
    seconds_left: float | None
    exhausted: str | None = None
    stopped: int = 0
    timings_left: int = 0
    node_hours: float = 0.0
    cost: float | None = None
    currency: str = ""
    spent: str = ""
    bill: Sequence[str] = ()

    @property
    def ended(self) -> int:
        """How many candidates nothing more will come of, but for timings."""
        return self.measured + self.failed + self.stopped


def status_of(name: str, study: Study, results: Results | None, began: float, ended_before: int) -> Status:
    """The status now. Time left is judged by the candidates that ended since this process took over."""
    states = study.states
    ended = ended_of(study)
    elapsed = time.time() - began
    since = ended - ended_before
    left = max(0, study.allowed + 1 - ended)
    return Status(
        study=name,
        stage=study.stage,
        at=time.time(),
        candidates=study.allowed,
        measured=states["measured"],
        running=study.running,
        failed=states["failed"],
        over_limit=states["over_limit"],
        steps_shared=study.reused,
        front=0 if results is None else len(results.members),
        hypervolume=None if results is None else results.hypervolume,
        seconds=elapsed,
        seconds_left=elapsed / since * left if since > 0 and study.stage == "searching" else None,
        exhausted=study.exhausted,
        stopped=states["stopped"],
        timings_left=study.timings_left,
    )


def ended_of(study: Study) -> int:
    """See `Status.ended`."""
    return study.states["measured"] + study.states["failed"] + study.states["stopped"]


def write_status(folder: Path, status: Status) -> None:
    write_json(folder / "status.json", asdict(status))


class Display:
    """Shows statuses: one live line on a terminal, one plain line a change elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last: tuple[object, ...] = ()
        self._progress: Progress | None = None
        if console.is_terminal:
            self._progress = Progress(
                SpinnerColumn(),
                TextColumn("[bold]{task.fields[study]}[/] {task.fields[stage]}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[line]}"),
                TimeElapsedColumn(),
                console=console,
            )
            self._task = self._progress.add_task("study", total=None, study="", stage="starting", line="")

    def __enter__(self) -> Display:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def show(self, status: Status) -> None:
        ended = status.ended
        if self._progress is not None:
            self._progress.update(
                self._task,
                completed=ended,
                total=status.candidates + 1,
                study=status.study,
                stage=status.stage,
                line=line(status),
            )
            return
        changed = (status.stage, ended, status.running, status.timings_left, status.front)
        if changed != self._last:
            self._last = changed
            self._console.print(
                f"[{status.seconds:6.0f} s] {status.stage}: {ended}/{status.candidates + 1} ended, {line(status)}",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )


def line(status: Status) -> str:
    """The status in a line: what runs, what failed or was stopped, the front, the time left."""
    parts = [f"{status.running} running"]
    if status.failed:
        parts.append(f"{status.failed} failed")
    if status.stopped:
        parts.append(f"{status.stopped} stopped")
    if status.timings_left:
        parts.append(f"at most {status.timings_left} to time")
    parts.append(f"front {status.front}")
    if status.hypervolume is not None:
        parts.append(f"hypervolume {status.hypervolume:.4g}")
    if status.seconds_left is not None:
        parts.append(f"about {status.seconds_left / 60:.0f} min left")
    if status.spent:
        parts.append(status.spent)
    return ", ".join(parts)
