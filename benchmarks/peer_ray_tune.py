"""Run Ray Tune on a slimfront study, for benchmarks/front.py: OptunaSearch proposes, and a trial runs the same jobs.

python -m benchmarks.peer_ray_tune STUDY.yaml SEED UNTIL OUT: UNTIL is in seconds since the epoch. Each completed trial
is a line of JSON in OUT. Trials run one after the other in warm actors, one actor for each slot. An actor reads model
and texts once and keeps them. All actors share one folder of statistics, which `jobs` offers to every caller. Tune
cannot share a prefix of steps between trials, so each trial makes all steps of its recipe.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs import run
from jobs.job import Failure, Job
from jobs.knobs import Domain, Range
from jobs.materials import Materials
from jobs.measurement.measurement import Measurement
from jobs.recipe import Recipe
from orchestrator.config.load import load
from orchestrator.planning.job_resources import local_slots
from orchestrator.planning.prepare import prepare
from orchestrator.planning.prepared_study import PreparedStudy
from orchestrator.planning.search_space import SKIP, SearchSpace


@dataclass(frozen=True)
class Task:
    """The inputs that all trials share."""

    space: SearchSpace
    materials: Materials
    original: Recipe
    meters: tuple[str, ...]
    folder: Path
    """Holds the files of actors and the shared statistics."""

    @staticmethod
    def of(prepared: PreparedStudy, folder: Path) -> Task:
        plan = prepared.plan
        return Task(prepared.space, prepared.materials, plan.original, plan.meters, folder)


class Steps:
    """Makes and measures recipes one after the other, each step by step."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._scratch = Path(tempfile.mkdtemp(dir=task.folder))
        self._original = self._scratch / "original"
        self._attempt(task.original, (), None, self._original)

    def measured(self, recipe: Recipe) -> Measurement:
        """Measure the recipe's model by the study's meters. Raises RuntimeError if a step fails."""
        with tempfile.TemporaryDirectory(dir=self._scratch) as trial:
            *prefixes, last = recipe.lineage()
            if not prefixes:
                return self._attempt(last, self._task.meters, None, Path(trial) / "model").measurement
            parent = self._original
            for number, prefix in enumerate(prefixes[1:]):
                folder = Path(trial) / str(number)
                self._attempt(prefix, (), parent, folder)
                parent = folder
            return self._attempt(last, self._task.meters, parent, Path(trial) / "model").measurement

    def remove(self) -> None:
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _attempt(
        self, recipe: Recipe, meters: tuple[str, ...], parent: Path | None, folder: Path
    ) -> run.JobOutput:
        dirs = run.JobDirs(folder, self._task.folder / "statistics")
        request = run.WorkRequest(Job(recipe, meters, ""), self._task.materials, dirs, parent=parent)
        output = run.attempt(request, lambda share, activity: None)
        if isinstance(output, Failure):
            raise RuntimeError(f"{recipe} failed: {output.message}\n{output.traceback}")
        assert isinstance(output, run.JobOutput)  # this process is the only rank
        return output


@dataclass(frozen=True)
class ConditionalSpace:
    """The space as Optuna's users define one: options are suggested only for the chosen technique. Picklable."""

    space: SearchSpace

    def __call__(self, trial: Any) -> None:
        for stage, options in self.space.stages.items():
            names = [option.technique.name() for option in options]
            chosen = trial.suggest_categorical(stage, [SKIP, *names])
            for option, name in zip(options, names, strict=True):
                if name != chosen:
                    continue
                for knob, domain in option.knobs().items():
                    _suggest(trial, f"{stage}.{name}.{knob}", domain)


def _suggest(trial: Any, knob: str, domain: Domain) -> None:
    if not isinstance(domain, Range):
        trial.suggest_categorical(knob, list(domain.values))
    elif domain.integer:
        trial.suggest_int(knob, int(domain.low), int(domain.high), log=domain.log)
    else:
        trial.suggest_float(knob, domain.low, domain.high, log=domain.log)


def search(task: Task, slots: int, seed: int, until: float, out: Path) -> None:
    from cluster.on_ray.connection import connect

    ray, _ = connect(None, slots, None)
    from ray import tune
    from ray.tune.search.optuna import OptunaSearch

    class Trial(tune.Trainable):
        def setup(self, config: dict[str, Any], task: Task) -> None:  # type: ignore[override]
            self._task = task
            self._steps = Steps(task)

        def step(self) -> dict[str, Any]:
            recipe = self._task.space.recipe(self._task.original.origin, self.config)
            metrics = self._steps.measured(recipe).metrics
            return {**metrics, "recipe": str(recipe), "ended": time.time(), "done": True}

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            return True

        def cleanup(self) -> None:
            self._steps.remove()

    class Recorder(tune.Callback):
        def on_trial_result(
            self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
        ) -> None:
            record = {name: result[name] for name in ("ended", "recipe", "size_bytes", "accuracy")}
            with out.open("a") as file:
                file.write(json.dumps(record) + "\n")

    objectives = {"size_bytes": "min", "accuracy": "max"}
    tune.Tuner(
        tune.with_resources(tune.with_parameters(Trial, task=task), {"cpu": 1}),
        tune_config=tune.TuneConfig(
            search_alg=OptunaSearch(
                ConditionalSpace(task.space),
                metric=list(objectives),
                mode=list(objectives.values()),
                seed=seed,
            ),
            num_samples=-1,
            max_concurrent_trials=slots,
            reuse_actors=True,
            time_budget_s=until - time.time(),
        ),
        run_config=tune.RunConfig(storage_path=str(task.folder / "tune"), verbose=0, callbacks=[Recorder()]),
    ).fit()
    ray.shutdown()


def main(study: str, seed: str, until: str, out: str) -> None:
    prepared = prepare(load(Path(study)))
    folder = Path(tempfile.mkdtemp(dir=Path(out).parent))
    search(Task.of(prepared, folder), local_slots(prepared.config), int(seed), float(until), Path(out))


if __name__ == "__main__":
    main(*sys.argv[1:])
