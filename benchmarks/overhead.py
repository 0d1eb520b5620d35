"""Measure the overhead of a scheduler: slot time per candidate without the work, and the utilisation of two slots.

python -m benchmarks.overhead [--candidates 10000] [--durations 0,0.1,1,lognormal] [--peers] [--json FILE]

A job sleeps for its duration, so two slots and the service fit on two cores, and commits its record to the store like
every job. All other parts are those of the product: ask → Ray → commit → ledger → tell → outbox, with the mirror's
process that sends the outbox to MLflow on SQLite. By the ledger's times, from the first start of a candidate to the
last end:

    utilisation                 Σ durations ÷ (slots × makespan)
    slot time per candidate     (slots × makespan − Σ durations) ÷ candidates
    commit                      the part of it in which a worker commits the record: mostly an fsync of the disk
    tail                        the share of all slot time in which slots wait for the last job, which is random: the
                                last ends of the slots are assumed to be the last ends of all jobs
    CPU per candidate           of this process, and of Ray and the workers without the mirror, whose priority is low;
                                unlike the numbers above, it does not depend on other processes of the machine

`lognormal` durations have a mean of 1 s and σ = 1 of the logarithm. Peers run the same sleeps on the same number of
slots: Optuna (random sampling, a journal file as durable storage) in joblib's processes, and Ray Tune (random sampling,
reused actors). They do not log to MLflow. Slow peers get fewer candidates; the table states the number.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import NormalDist, fmean

import joblib
import optuna
import psutil
import transformers
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers

from benchmarks import overhead
from cluster.on_ray.connection import connect
from cluster.on_ray.executor import RayExecutor
from cluster.storage.open import open_store
from jobs.job import Job, Outcome, Success, outcome_to_dict
from jobs.measurement.measurement import Measurement
from orchestrator.config.load import load
from orchestrator.persistence.ledger import Ledger
from orchestrator.planning.prepare import prepare
from orchestrator.planning.prepared_study import PreparedStudy
from orchestrator.service.launch import launch
from orchestrator.service.status import Status
from orchestrator.study.events import AttemptEnded, AttemptStarted

SLOTS = 2
BUSY_SECONDS = 200.0
"""Largest slot time of the jobs of a row. It limits the candidates of rows whose jobs take time."""
PEER_CANDIDATES = {"optuna + joblib": 2000, "ray tune": 100}

STUDY = """
name: overhead
model: {folder}/model
data:
  calibration: {{path: "package:pydoc_data.topics", samples: 1, tokens: 16}}
  evaluation: {{path: "package:pydoc_data.topics", tokens: 16, window: 16}}
objectives: {{size_bytes: {{goal: min}}, accuracy: {{goal: max}}}}
space:
  step:
    gptq:
      bits: [2, 3, 4, 8]
      group: 32
      correction_rank: {{low: 0, high: 16}}
      damping: {{low: 0.0001, high: 1.0}}
    awq:
      bits: [2, 3, 4, 8]
      group: 32
      correction_rank: {{low: 0, high: 16}}
      trials: {{low: 1, high: 100}}
    hqq:
      bits: [2, 3, 4, 8]
      group: 32
      correction_rank: {{low: 0, high: 16}}
      iterations: {{low: 1, high: 200}}
    asvd:
      keep: {{low: 0.1, high: 0.9}}
      alpha: {{low: 0.0, high: 2.0}}
search: {{candidates: {candidates}, algorithm: {algorithm}}}
store: {folder}/runs
tracking: {{uri: {uri}}}
"""
"""A study with hundreds of thousands of recipes of one step each. A candidate is one job."""


@dataclass(frozen=True)
class Row:
    """One line of the table. A value of 0 is unknown."""

    system: str
    duration: str
    candidates: int
    slots: int
    slot_ms: float
    utilisation: float
    commit_ms: float = 0.0
    """The part of `slot_ms` for commits."""
    driver_ms: float = 0.0
    """CPU time of this process per candidate."""
    workers_ms: float = 0.0
    """CPU time of Ray and the workers per candidate."""
    tail: float = 0.0


def seconds_of(duration: str, name: str) -> float:
    """Return the duration of the job of this name; it is always the same."""
    if duration == "lognormal":
        return lognormal(name, 1.0, 1.0)
    return float(duration)


def lognormal(name: str, mean: float, sigma: float) -> float:
    """Return a sample that depends on the name alone. sigma: the standard deviation of its logarithm."""
    share = (int.from_bytes(hashlib.sha256(name.encode()).digest()[:6]) + 0.5) / 2**48
    return mean * math.exp(NormalDist(-(sigma**2) / 2, sigma).inv_cdf(share))


def write_model(folder: Path, width: int = 32, blocks: int = 1) -> None:
    """A random Llama, by default of one narrow block, and a tokenizer of bytes."""
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=blocks,
        num_attention_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def empty_study(folder: Path, candidates: int, algorithm: str = "random", uri: str = "''") -> PreparedStudy:
    """Prepare a study of a tiny model, with candidates of one step each. The uri `none` disables MLflow."""
    write_model(folder / "model")
    file = folder / "study.yaml"
    file.write_text(STUDY.format(folder=folder, candidates=candidates, algorithm=algorithm, uri=uri))
    return prepare(load(file))


def accuracy_of(job: Job) -> float:
    """Return a number that depends on the job's id alone."""
    return int(job.id, 16) / 16**16


def digest_of(job: Job) -> str:
    """Return the digest of an artifact of this job alone. No artifact is stored."""
    return hashlib.sha256(job.id.encode()).hexdigest()


def sleep(job: Job, store: str, duration: str) -> Outcome:
    """Sleep for the job's duration and commit its record; report the time of the commit as that of measuring."""
    seconds = seconds_of(duration, job.id)
    time.sleep(seconds)
    outcome = Success(digest_of(job), 0, Measurement({"accuracy": accuracy_of(job)}), seconds)
    record = {"result": outcome_to_dict(outcome), "recipe": job.recipe.to_dict(), "meters": list(job.meters)}
    began = time.perf_counter()
    open_store(store).commit(f"results/{job.id}", record)
    committing = replace(outcome.measurement, seconds=time.perf_counter() - began)
    return replace(outcome, measurement=committing)


class CpuMeter:
    """Meters the CPU seconds of this process, and of its descendants without the mirror, over the candidates."""

    def __init__(self) -> None:
        self._samples: list[tuple[int, float, float]] = []

    def __call__(self, status: Status) -> None:
        if (not self._samples and status.measured > 1) or status.stage == "done":
            descendants = psutil.Process().children(recursive=True)
            workers = sum(_cpu_seconds(process) for process in descendants)
            self._samples.append((status.measured, time.process_time(), workers))

    def ms_per_candidate(self) -> tuple[float, float]:
        first, driver_before, workers_before = self._samples[0]
        last, driver_after, workers_after = self._samples[-1]
        candidates = max(1, last - first)
        driver_ms = 1000 * (driver_after - driver_before) / candidates
        workers_ms = 1000 * (workers_after - workers_before) / candidates
        return driver_ms, workers_ms


def _cpu_seconds(process: psutil.Process) -> float:
    """Return the CPU seconds of a process; 0 for the mirror and for a process that has ended."""
    try:
        if _is_mirror(process):
            return 0.0
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return times.user + times.system


def _is_mirror(process: psutil.Process) -> bool:
    return "orchestrator.tracking" in process.cmdline()


def end_mirror() -> None:
    """Terminate the mirror, which would need minutes to finish. Other children, such as joblib's, keep running."""
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if _is_mirror(process):
                process.terminate()


def slimfront(duration: str, candidates: int, algorithm: str) -> Row:
    with tempfile.TemporaryDirectory() as scratch:
        prepared = empty_study(Path(scratch), candidates, algorithm)
        # Named by its module, like a real job: a function of a script is sent by value, and workers would import
        # its libraries only with their first jobs.
        do = functools.partial(overhead.sleep, store=prepared.config.store, duration=duration)
        executor = RayExecutor(SLOTS)
        meter = CpuMeter()
        launch(prepared, meter, executor=executor, do=do)
        end_mirror()
        ledger = Ledger(prepared.folder.ledger, read_only=True)
        events = list(ledger.events())
        ledger.close()
    first = next(event.job_id for _, event in events if isinstance(event, AttemptStarted))  # the original's
    started = [at for at, event in events if isinstance(event, AttemptStarted) and event.job_id != first]
    done = [(at, event.outcome) for at, event in events if isinstance(event, AttemptEnded)][1:]
    ended = [(at, outcome) for at, outcome in done if isinstance(outcome, Success)]
    makespan = max(at for at, _ in ended) - min(started)
    row = _row("slimfront", duration, [outcome.seconds for _, outcome in ended], makespan)
    commit_ms = 1000 * fmean(outcome.measurement.seconds for _, outcome in ended)
    driver_ms, workers_ms = meter.ms_per_candidate()
    last = sorted(at for at, _ in ended)[-SLOTS:]
    tail = (SLOTS * last[-1] - sum(last)) / (SLOTS * makespan)
    return replace(row, commit_ms=commit_ms, driver_ms=driver_ms, workers_ms=workers_ms, tail=tail)


def unseen(status: Status) -> None:
    """Ignore the status."""


def _row(system: str, duration: str, seconds: list[float], makespan: float) -> Row:
    slot_seconds = SLOTS * makespan
    return Row(
        system,
        duration,
        len(seconds),
        SLOTS,
        1000 * (slot_seconds - sum(seconds)) / len(seconds),
        sum(seconds) / slot_seconds,
    )


def optuna_with_joblib(duration: str, candidates: int, algorithm: str) -> Row:
    with tempfile.TemporaryDirectory() as scratch:
        journal = str(Path(scratch) / "journal")
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        study = optuna.create_study(
            storage=_journal(journal), study_name="overhead", directions=["minimize", "maximize"]
        )
        with joblib.Parallel(n_jobs=SLOTS) as parallel:
            parallel(joblib.delayed(_optimize)(journal, duration, 0) for _ in range(SLOTS))  # starts them
            share = candidates // SLOTS
            parallel(joblib.delayed(_optimize)(journal, duration, share) for _ in range(SLOTS))
        trials = study.trials
    began = min(trial.datetime_start for trial in trials if trial.datetime_start)
    ended = max(trial.datetime_complete for trial in trials if trial.datetime_complete)
    seconds = [seconds_of(duration, str(trial.number)) for trial in trials]
    return _row("optuna + joblib", duration, seconds, (ended - began).total_seconds())


def _journal(file: str) -> optuna.storages.JournalStorage:
    return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(file))


def _optimize(journal: str, duration: str, trials: int) -> None:
    """Run trials in a process of joblib."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        bits = trial.suggest_categorical("bits", [2, 3, 4, 8])
        damping = trial.suggest_float("damping", 1e-4, 1.0, log=True)
        time.sleep(seconds_of(duration, str(trial.number)))
        return float(bits), damping

    study = optuna.load_study(
        study_name="overhead", storage=_journal(journal), sampler=optuna.samplers.RandomSampler()
    )
    study.optimize(objective, n_trials=trials)


def ray_tune(duration: str, candidates: int, algorithm: str) -> Row:
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    ray, _ = connect(None, SLOTS, None)
    from ray import tune

    def trainable(config: dict[str, float]) -> None:
        began = time.time()
        seconds = seconds_of(duration, str(config["number"]))
        time.sleep(seconds)
        tune.report({"damping": config["damping"], "began": began, "ended": time.time(), "seconds": seconds})

    with tempfile.TemporaryDirectory() as scratch:
        space = {
            "number": tune.grid_search(list(range(candidates))),
            "bits": tune.choice([2, 3, 4, 8]),
            "damping": tune.loguniform(1e-4, 1.0),
        }
        results = tune.Tuner(
            tune.with_resources(trainable, {"cpu": 1}),
            param_space=space,
            tune_config=tune.TuneConfig(num_samples=1, reuse_actors=True),
            run_config=tune.RunConfig(storage_path=scratch, verbose=0),
        ).fit()
        trials = [result.metrics for result in results]
    ray.shutdown()
    makespan = max(trial["ended"] for trial in trials) - min(trial["began"] for trial in trials)
    return _row("ray tune", duration, [trial["seconds"] for trial in trials], makespan)


PEERS: dict[str, Callable[[str, int, str], Row]] = {
    "optuna + joblib": optuna_with_joblib,
    "ray tune": ray_tune,
}


def bounded(duration: str, candidates: int) -> int:
    """Return the number of candidates to run within BUSY_SECONDS of slot time."""
    mean = 1.0
    if duration != "lognormal":
        mean = float(duration)
    if mean == 0:
        return candidates
    return min(candidates, int(BUSY_SECONDS / mean))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--candidates", type=int, default=10_000)
    parser.add_argument("--durations", default="0,0.1,1,lognormal")
    parser.add_argument("--algorithm", default="random")
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    for duration in options.durations.split(","):
        count = bounded(duration, options.candidates)
        rows.append(slimfront(duration, count, options.algorithm))
        if options.peers:
            for name, peer in PEERS.items():
                rows.append(peer(duration, min(count, PEER_CANDIDATES[name]), options.algorithm))
    table = Table(
        "system", "job, s", "candidates", "slot ms per candidate", "part of commits", "utilisation", "tail",
        "CPU ms: driver + rest",
        title=f"{SLOTS} slots on {platform.machine()}, {os.cpu_count()} cores",
    )  # fmt: skip
    for row in rows:
        commit = tail = cpu = "–"
        if row.commit_ms:
            commit = f"{row.commit_ms:.1f}"
        if row.driver_ms:
            tail, cpu = f"{row.tail:.1%}", f"{row.driver_ms:.2f} + {row.workers_ms:.2f}"
        table.add_row(
            row.system, row.duration, str(row.candidates), f"{row.slot_ms:.1f}", commit, f"{row.utilisation:.1%}",
            tail, cpu,
        )  # fmt: skip
    Console().print(table)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
