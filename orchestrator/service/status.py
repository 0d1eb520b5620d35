"""The status of a study: the content of status.json, and its display on a terminal."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
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

if TYPE_CHECKING:
    from orchestrator.study.results import Results
    from orchestrator.study.study import Study


@dataclass(frozen=True)
class Status:
    """The content of status.json."""

    study: str
    stage: str
    at: float
    """The time of this status, in seconds since 1970."""
    candidates: int
    """The number of candidates that the search may propose."""
    measured: int
    running: int
    failed: int
    over_limit: int
    """The number of proposals that break a limit by their known size, and were not run."""
    steps_shared: int
    """The number of steps that were reused from other candidates."""
    front: int
    """The number of candidates on the front."""
    hypervolume: float | None
    seconds: float
    """The time since this process started."""
    seconds_left: float | None
    """The estimated time until the search ends; None while there is no estimate."""
    exhausted: str | None = None
    """Why the search ended before it proposed all candidates; None if it did not."""
    stopped: int = 0
    timings_left: int = 0
    """The largest number of timings that may still follow."""
    node_hours: float = 0.0
    """Of all nodes that were up while the study ran."""
    cost: float | None = None
    """Of these nodes, in `currency`; None without prices."""
    currency: str = ""
    spent: str = ""
    """The cost as a phrase; empty without a price or a budget."""
    bill: Sequence[str] = ()
    """The cost as lines, one for each kind of node."""

    @property
    def ended(self) -> int:
        """The number of candidates that are finished, except for timings."""
        return self.measured + self.failed + self.stopped


def status_of(name: str, study: Study, results: Results | None, began: float, ended_before: int) -> Status:
    """The status now. The remaining time is estimated from the candidates that ended since this process started.

    began: in seconds since 1970; ended_before: the number of candidates that ended before.
    """
    states = study.states
    ended = ended_of(study)
    elapsed = time.time() - began
    ended_since = ended - ended_before
    seconds_left = None
    if ended_since > 0 and study.stage == "searching":
        seconds_left = elapsed / ended_since * max(0, study.allowed + 1 - ended)
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
        seconds_left=seconds_left,
        exhausted=study.exhausted,
        stopped=states["stopped"],
        timings_left=study.timings_left,
    )


def ended_of(study: Study) -> int:
    """See `Status.ended`."""
    return study.states["measured"] + study.states["failed"] + study.states["stopped"]


class Display:
    """Shows statuses: as one live line on a terminal, else as one plain line for each change."""

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
    """The status as one line: running, failed and stopped candidates, the front, the remaining time."""
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
