"""Studies on a cluster that grows, shrinks and loses nodes, by the real command, each number beside its goal.

python -m benchmarks.cluster [--only grow,kills,laptop,s3,ranks] [--candidates 80] [--kills 10] [--json FILE]

The cluster is a real Ray on this machine (tests/fake_cluster.py): its autoscaler, version 2, adds nodes of one slot
each, at most four, and removes those that were idle for 8 s. The store is in a bucket of a moto server, tracking on an
MLflow server. A candidate is a random Llama of 5.5 million parameters without some of its neurons, measured on 65,536
tokens: some 12 s of one processor alone, 15 to 25 where four slots share two. Only slots are counted, not processors.

    grow     a study is submitted to a cluster without nodes, and the cluster is watched until it has none again
    kills    the same, while every 20 s a node is killed
    laptop   what submitted is killed right after the job was accepted; the front is read when the cluster is gone
    ranks    two nodes distil one model together, by ZeRO stages 1, 2 and 3, and what comes out is compared with one's
    s3       100 MB into a bucket, against plain boto3 on the same server (benchmarks/s3.py)

Goals that are missed are told. A candidate that is lost or counted twice, a node or a process that stays make the exit
status 1. Each scenario prints one line for benchmarks/LOG.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import boto3
import psutil
import torch
import transformers
from mlflow import MlflowClient

from benchmarks.cluster_watch import PERIOD_SECONDS, Observations, Watcher, folders_of
from cluster.storage.open import open_store
from jobs.job import Success, outcome_from_dict
from jobs.recipe import Recipe
from orchestrator.persistence.ledger import Ledger
from orchestrator.study.events import AttemptEnded, AttemptStarted, CandidateProposed, Event
from orchestrator.tracking.mlflow_mirror import CANDIDATE_TAG, PARENT
from tests.conftest import VOCABULARY, prose, tokenizer_on
from tests.fake_cluster import Head, NodeType, head
from tests.processes import mlflow_server, s3_server

NODES = 4
IDLE_SECONDS = 8.0
KILL_SECONDS = 20.0
STUDY_SECONDS = 1800.0
"""So long a study may take before it is given up."""
MIRROR_SECONDS = 120.0
"""So long MLflow may be behind a study that has ended."""

STUDY = """
name: {name}
model: {folder}/model
data:
  calibration: {{path: "package:pydoc_data.topics", samples: 8, tokens: 64, part: [0.0, 0.1]}}
  evaluation: {{path: "package:pydoc_data.topics", tokens: 65536, window: 128, part: [0.1, 1.0]}}
objectives: {{size_bytes: {{goal: min}}, accuracy: {{goal: max}}}}
space:
  width: {{prune_ffn: {{ratio: {{low: 0.05, high: 0.6}}}}}}
search: {{algorithm: random, candidates: {candidates}, rungs: []}}
store: {store}
tracking: {{uri: "{mlflow}"}}
"""

# With what may be skipped these are three candidates.
RECOVERED = """
name: {name}
model: {folder}/model
data:
  calibration: {{path: "package:pydoc_data.topics", samples: 8, tokens: 64, part: [0.0, 0.1]}}
  train: {{path: "package:pydoc_data.topics", samples: 96, tokens: 64, part: [0.1, 0.5]}}
  evaluation: {{path: "package:pydoc_data.topics", tokens: 8192, window: 64, part: [0.5, 1.0]}}
objectives: {{size_bytes: {{goal: min}}, perplexity: {{goal: min}}}}
space:
  width: {{prune_ffn: {{ratio: [0.4]}}}}
  recover: {{distill: {{steps: [24], batch: [4], learning_rate: [0.003], hard_weight: [0.5]}}}}
search: {{algorithm: random, candidates: 3, rungs: []}}
store: {store}
tracking: {{uri: none}}
cluster: {{ranks: {ranks}, zero_stage: {stage}}}
"""


@dataclass(frozen=True)
class Number:
    """What was measured. goal: what it should be at most, or at least where `least`; None where there is none."""

    what: str
    value: float
    unit: str
    goal: float | None = None
    least: bool = False

    @property
    def met(self) -> bool:
        return self.goal is None or (self.value >= self.goal if self.least else self.value <= self.goal)

    def __str__(self) -> str:
        told = f"{self.what} {self.value:.3g}{self.unit}"
        if self.goal is None:
            return told
        return f"{told} (goal {'≥' if self.least else '≤'} {self.goal:g}{self.unit}: {'met' if self.met else 'missed'})"


@dataclass
class Findings:
    """What a scenario found: its numbers, and what must not be."""

    scenario: str
    numbers: list[Number] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def line(self) -> str:
        told = ", ".join(map(str, self.numbers))
        return f"{self.scenario}: {told}" + "".join(f"; FAULT: {fault}" for fault in self.faults)


@dataclass(frozen=True)
class Services:
    """What studies need beside a cluster, and where their files lie."""

    folder: Path
    s3: str
    mlflow: str

    def bucket(self) -> str:
        """The address of an empty store."""
        name = f"b-{uuid.uuid4().hex}"
        boto3.client("s3", endpoint_url=self.s3).create_bucket(Bucket=name)
        return f"s3://{name}/team?endpoint={self.s3}"

    def study(self, name: str, store: str, candidates: int) -> Path:
        told = {"folder": self.folder, "store": store, "candidates": candidates, "mlflow": self.mlflow}
        return self._written(name, STUDY.format(name=name, **told))

    def recovered(self, name: str, store: str, ranks: int, stage: int) -> Path:
        told = {"folder": self.folder, "store": store, "ranks": ranks, "stage": stage}
        return self._written(name, RECOVERED.format(name=name, **told))

    def _written(self, name: str, study: str) -> Path:
        file = self.folder / f"{name}.yaml"
        file.write_text(study)
        return file


@contextlib.contextmanager
def cluster(findings: Findings) -> Iterator[Head]:
    """A cluster of its own. What of it lives on afterwards is a fault."""
    everything: list[Any] = []
    with head({"slot": NodeType(cpus=1, memory_gib=4, max_nodes=NODES)}, IDLE_SECONDS) as found:
        yield found
        everything = found.process.children(recursive=True)
    left = [process for process in everything if process.is_running()]
    if left:
        findings.faults.append(f"{len(left)} processes were left: {left}")


def grow(services: Services, candidates: int) -> Findings:
    """From nothing to four nodes and back, by a study that is submitted."""
    findings = Findings("grow")
    store = services.bucket()
    with cluster(findings) as found:
        watcher = Watcher(found, "grow")
        submitted = time.time()
        run = _submitted(services, found, services.study("grow", store, candidates))
        _finish(found, "grow", run, findings)
        _until(lambda: not found.nodes(), IDLE_SECONDS + 60)
        if found.nodes():
            findings.faults.append(f"{len(found.nodes())} nodes were left")
        observed = watcher.close()
        events = _events(found, "grow")
        last = max(at for at, event in events if isinstance(event, AttemptEnded))
        gone = max(stay.ended for stay in observed.stays)
        findings.numbers += [
            Number("nodes at most", observed.most_nodes, "", NODES, least=True),
            Number("the original at work after", observed.first_work - submitted, " s"),
            Number("first candidate running after", _first_candidate(observed, events) - submitted, " s", 30),
            Number("all nodes gone after the last candidate by", gone - last, " s", IDLE_SECONDS + 15),
            Number("utilisation of nodes while up", 100 * observed.utilisation(), " %", 90, least=True),
            Number("of it while there was work", 100 * _while_working(observed, events), " %"),
            *_work(observed),
        ]
        _counted_once(services, store, "grow", [event for _, event in events], candidates, findings)
    return findings


def kills(services: Services, candidates: int, most: int) -> Findings:
    """A node is killed every 20 s, until there were so many kills or the study has ended."""
    findings = Findings("kills")
    store = services.bucket()
    draw = random.Random(0)
    killed = 0
    with cluster(findings) as found:
        watcher = Watcher(found, "kills")
        run = _submitted(services, found, services.study("kills", store, candidates))
        _until(lambda: bool(found.nodes()), 120)
        while killed < most:
            time.sleep(KILL_SECONDS)
            if _ended(found, "kills"):
                findings.faults.append(f"the study had ended after {killed} kills: it needs more candidates")
                break
            if nodes := found.nodes():
                found.kill(draw.choice(nodes))
                killed += 1
        _finish(found, "kills", run, findings)
        observed = watcher.close()
        events = [event for _, event in _events(found, "kills")]
        repeated = sum(attempt.seconds for attempt in observed.lost) / observed.busy_seconds
        failures = Counter(
            event.outcome.kind
            for event in events
            if isinstance(event, AttemptEnded) and not isinstance(event.outcome, Success)
        )
        findings.numbers += [
            Number("kills", killed, ""),
            Number("attempts that were lost with their node", len(observed.lost), ""),
            *(Number(f"attempts that ended as {kind}", count, "") for kind, count in failures.items()),
            Number("work done for nothing", 100 * repeated, " %", 25),
            Number("utilisation of nodes while up", 100 * observed.utilisation(), " %"),
            *_work(observed),
        ]
        _counted_once(services, store, "kills", events, candidates, findings)
    return findings


def laptop(services: Services) -> Findings:
    """What submitted a study is killed as soon as it was accepted, and nobody asks before the cluster is gone."""
    findings = Findings("laptop")
    store = services.bucket()
    with cluster(findings) as found:
        began = time.time()
        run = _submitted(services, found, services.study("laptop", store, 4))
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        _until(lambda: _ended(found, "laptop"), STUDY_SECONDS)
        if (state := _state(found, "laptop")) != "SUCCEEDED":
            findings.faults.append(f"the job ended as {state}")
        findings.numbers.append(Number("the job ended after", time.time() - began, " s"))
    path, mark, options = store.partition("?")
    with tempfile.TemporaryDirectory() as elsewhere:
        shown = subprocess.run(
            [sys.executable, "-m", "orchestrator", "front", f"{path}/laptop{mark}{options}", "--json"],
            cwd=elsewhere, capture_output=True, text=True, check=False,
        )  # fmt: skip
    if shown.returncode != 0:
        findings.faults.append(f"the front can't be read: {shown.stderr.strip()}")
    else:
        front = json.loads(shown.stdout)
        findings.numbers.append(
            Number("models on the front, read from the store alone", len(front["members"]), "")
        )
        standings = front["candidates"]
        if set(standings) - {"front", "dominated"} or sum(standings.values()) != 5:  # the original is one
            findings.faults.append(f"of 4 candidates and the original the front knows {standings}")
    return findings


def ranks(services: Services) -> Findings:
    """What two nodes train together is what one trains, with the same batches. tests/jobs/test_gangs.py compares the
    losses step by step; here it is the perplexity in the end, of all that was trained."""
    findings = Findings("ranks")
    with cluster(findings) as found:
        alone = _perplexities(services, found, "alone", 1, 0, findings)
        for stage in (1, 2, 3):
            together = _perplexities(services, found, f"stage{stage}", 2, stage, findings)
            if together.keys() != alone.keys() or not alone:
                findings.faults.append(f"ZeRO {stage} has other candidates than one rank")
                continue
            off = max(abs(together[id] / alone[id] - 1) for id in alone)
            findings.numbers.append(Number(f"perplexity by ZeRO {stage} is off by", 100 * off, " %", 1))
    return findings


def _perplexities(
    services: Services, found: Head, name: str, ranks: int, stage: int, findings: Findings
) -> dict[str, float]:
    """The perplexity of each model that a study trains, by its recipe."""
    store = services.bucket()
    run = _submitted(services, found, services.recovered(name, store, ranks, stage))
    most = 0
    while not _ended(found, name):
        most = max(most, _nodes_of_ranks(found))
        time.sleep(0.5)
    _finish(found, name, run, findings)
    if most < ranks and ranks > 1:
        findings.faults.append(f"{name}: ranks were observed on {most} nodes at once, and not on {ranks}")
    opened = open_store(store)
    trained = {}
    for record in filter(None, map(opened.record, opened.records("results/"))):
        recipe, outcome = Recipe.from_dict(record["recipe"]), outcome_from_dict(record["result"])
        if recipe.steps and recipe.steps[-1].trains() and isinstance(outcome, Success):
            trained[recipe.id] = outcome.measurement.metrics["perplexity"]
    return trained


def _nodes_of_ranks(found: Head) -> int:
    """On how many nodes there is a process now that is one of several ranks."""
    count = 0
    for node in found.nodes():
        with contextlib.suppress(psutil.NoSuchProcess):
            below = psutil.Process(node.pid).children(recursive=True)
            count += any(int(process.environ().get("WORLD_SIZE", 1)) > 1 for process in below)
    return count


def s3(services: Services) -> Findings:
    """How fast a large file goes into a bucket, against plain boto3."""
    findings = Findings("s3")
    file = services.folder / "s3.json"
    command = [sys.executable, "-m", "benchmarks.s3", "--rounds", "5", "--json", str(file)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    told = json.loads(file.read_text())
    for ours, plain in (("put", "upload_file"), ("fetch", "download_file")):
        ratio = statistics.median(one[plain] / one[ours] for one in told["rounds"])
        speed = told["megabytes"] / statistics.median(one[ours] for one in told["rounds"])
        findings.numbers += [
            Number(f"{ours} of {told['megabytes']} MB", speed, " MB/s"),
            Number(f"speed against {plain}", ratio, "", 0.5, least=True),
        ]
    return findings


def _submitted(services: Services, found: Head, study: Path) -> subprocess.Popen[bytes]:
    """The command that submits a study and follows it, once its job was accepted."""
    log = services.folder / f"{study.stem}.log"
    with log.open("wb") as out:
        run = subprocess.Popen(
            found.command("submit", study), cwd=services.folder, env=dict(found.env), stdout=out, stderr=out,
            start_new_session=True,
        )  # fmt: skip
    _until(lambda: "was submitted" in log.read_text() or run.poll() is not None, 120)
    if run.poll() is not None:
        raise RuntimeError(f"{study.stem} could not be submitted:\n{log.read_text()}")
    return run


def _finish(found: Head, study: str, run: subprocess.Popen[bytes], findings: Findings) -> None:
    """Wait until a study's job has ended, and what follows it."""
    _until(lambda: _ended(found, study), STUDY_SECONDS)
    if (state := _state(found, study)) != "SUCCEEDED":
        findings.faults.append(f"the job ended as {state}")
        os.killpg(run.pid, signal.SIGKILL)
    run.wait(60)


def _state(found: Head, study: str) -> str:
    """The state of the study's job, as the cluster tells it."""
    jobs = found.ask("/api/jobs/")
    return str(next(one["status"] for one in jobs if (one["metadata"] or {}).get("slimfront.study") == study))


def _ended(found: Head, study: str) -> bool:
    return _state(found, study) in ("SUCCEEDED", "FAILED", "STOPPED")


def _events(found: Head, study: str) -> list[tuple[float, Event]]:
    (ledger,) = folders_of(found, study, "ledger.db")
    return list(Ledger(ledger, read_only=True).events())


def _first_candidate(observed: Observations, events: list[tuple[float, Event]]) -> float:
    """When the first piece of work began after that of the original, which no candidate can do without."""
    original_ended = next(at for at, event in events if isinstance(event, AttemptEnded))
    return min(one.began for one in observed.attempts if one.began > original_ended - PERIOD_SECONDS)


def _while_working(observed: Observations, events: list[tuple[float, Event]]) -> float:
    """The utilisation from the first piece of work until fewer candidates than slots were left to run."""
    under_way: set[str] = set()
    enough = observed.last_work
    for at, event in events:
        if isinstance(event, AttemptStarted):
            under_way.add(event.job_id)
        elif isinstance(event, AttemptEnded):
            under_way.discard(event.job_id)
            if len(under_way) >= NODES:
                enough = at
    return observed.utilisation_between(observed.first_work, enough)


def _work(observed: Observations) -> list[Number]:
    done = [attempt.seconds for attempt in observed.attempts if attempt not in observed.lost]
    return [
        Number("pieces of work", len(observed.attempts), ""),
        Number("median piece", statistics.median(done), " s"),
        Number("nodes started", len(observed.stays), ""),
        Number("of a node up before its first piece, median", statistics.median(observed.starting), " s"),
        Number("and after its last", statistics.median(observed.leaving), " s"),
    ]


def _counted_once(
    services: Services, store: str, study: str, events: list[Event], candidates: int, findings: Findings
) -> None:
    """Look that every candidate has one result in the ledger, in the store and in MLflow, and nothing else has."""
    held = {key.rpartition("/")[2] for key in open_store(store).records("results/")}
    wrong: list[str] = []

    def all_is_well() -> bool:
        wrong[:] = miscounted(events, candidates, held, Counter(_finished_runs(services.mlflow, study)))
        return not wrong

    _until(all_is_well, MIRROR_SECONDS)  # MLflow comes after the rest
    findings.faults += wrong


def miscounted(
    events: Sequence[Event], candidates: int, held: Set[str], finished: Mapping[str, int]
) -> list[str]:
    """What of a study was lost or counted twice. held: the jobs whose results are in the store; finished: how many
    finished runs MLflow has of each candidate."""
    proposed = {
        event.recipe.id for event in events if isinstance(event, CandidateProposed) and event.refused is None
    }
    started = {event.job_id for event in events if isinstance(event, AttemptStarted)}
    results = Counter(
        event.job_id
        for event in events
        if isinstance(event, AttemptEnded) and isinstance(event.outcome, Success)
    )
    wrong = []
    if len(proposed) != candidates:
        wrong.append(f"{len(proposed)} candidates instead of {candidates}")
    if lost := started - set(results):
        wrong.append(f"{len(lost)} jobs have no result")
    if twice := [job for job, count in results.items() if count > 1]:
        wrong.append(f"{len(twice)} jobs have several results in the ledger")
    if held != set(results):
        wrong.append(f"the store holds {len(held)} results, the ledger {len(results)}")
    if not proposed < set(finished) or len(finished) != len(proposed) + 1 or max(finished.values()) > 1:
        total = sum(finished.values())
        wrong.append(f"MLflow has {total} finished runs of {len(proposed)} candidates and the original")
    return wrong


def _finished_runs(mlflow: str, study: str) -> list[str]:
    """The candidate of each run of a study that is finished and has an accuracy."""
    client = MlflowClient(mlflow)
    experiment = client.get_experiment_by_name(study)
    if experiment is None:
        return []
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    told = ((run.data.tags[CANDIDATE_TAG], run) for run in runs)
    return [
        id
        for id, run in told
        if id != PARENT and run.info.status == "FINISHED" and "accuracy" in run.data.metrics
    ]


def _until(happened: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not happened() and time.monotonic() < deadline:
        time.sleep(0.5)


def _save_model(folder: Path) -> None:
    """A random Llama of 8 blocks, width 256, with a tokenizer of 512 tokens."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=640, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer_on(prose()).save_pretrained(folder)


@contextlib.contextmanager
def _services() -> Iterator[Services]:
    with contextlib.ExitStack() as ending:
        folder = Path(ending.enter_context(tempfile.TemporaryDirectory()))
        _save_model(folder / "model")
        os.environ |= {
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "secret-of-the-tests",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        mlflow = ending.enter_context(mlflow_server(folder))
        yield Services(folder, ending.enter_context(s3_server(folder)), mlflow)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="grow,kills,laptop,ranks,s3", help="some of these")
    parser.add_argument("--candidates", type=int, default=80, help="of grow and kills")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    given = parser.parse_args()
    transformers.logging.disable_progress_bar()
    found = []
    with _services() as services:
        scenarios: dict[str, Callable[[], Findings]] = {
            "grow": lambda: grow(services, given.candidates),
            "kills": lambda: kills(services, given.candidates, given.kills),
            "laptop": lambda: laptop(services),
            "ranks": lambda: ranks(services),
            "s3": lambda: s3(services),
        }
        for name in given.only.split(","):
            found.append(scenarios[name]())
            print(found[-1].line(), flush=True)
    if given.json is not None:
        given.json.write_text(json.dumps([asdict(one) for one in found], indent=1))
    return 1 if any(one.faults for one in found) else 0


if __name__ == "__main__":
    sys.exit(main())
