"""Studies on a cluster that grows, shrinks and loses nodes, by the real command, each number with its goal.

python -m benchmarks.cluster [--only grow,kills,laptop,s3,ranks] [--candidates 80] [--kills 10] [--json FILE]

The cluster is a real Ray on this machine (tests/fake_cluster.py): its autoscaler, version 2, adds nodes of one slot
each, at most four, and removes those that were idle for 8 s. The store is in a bucket of a moto server, tracking on an
MLflow server. A candidate is a random Llama of 5.5 million parameters without some of its neurons, measured on 65,536
tokens: about 12 s on one processor, 15 to 25 s if four slots share two. Slots are counted, not processors.

    grow     a study is submitted to a cluster without nodes, and the cluster is observed until it has none again
    kills    the same, while a node is killed every 20 s
    laptop   the submitting command is killed after the job was accepted; the front is read after the cluster's end
    ranks    two nodes distil one model together, by ZeRO stages 1, 2 and 3, and the result is compared with one node's
    s3       100 MB into a bucket, against plain boto3 on the same server (benchmarks/s3.py)

Missed goals are reported. The exit status is 1 if a candidate is lost or counted twice, or a node or a process
remains. Each scenario prints one line for benchmarks/LOG.md.
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
"""Time limit of a study."""
MIRROR_SECONDS = 120.0
"""Time limit for MLflow to receive the results of a study that has ended."""

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

# Both steps may be skipped, so the space has three candidates.
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
    """A measured number."""

    name: str
    value: float
    unit: str
    goal: float | None = None
    """The largest allowed value, or the smallest if `is_minimum`; None without a goal."""
    is_minimum: bool = False

    @property
    def met(self) -> bool:
        if self.goal is None:
            return True
        if self.is_minimum:
            return self.value >= self.goal
        return self.value <= self.goal

    def __str__(self) -> str:
        text = f"{self.name} {self.value:.3g}{self.unit}"
        if self.goal is None:
            return text
        sign = "≥" if self.is_minimum else "≤"
        verdict = "met" if self.met else "missed"
        return f"{text} (goal {sign} {self.goal:g}{self.unit}: {verdict})"


@dataclass
class Findings:
    """The results of a scenario: its numbers and its faults."""

    scenario: str
    numbers: list[Number] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def line(self) -> str:
        numbers = ", ".join(map(str, self.numbers))
        return f"{self.scenario}: {numbers}" + "".join(f"; FAULT: {fault}" for fault in self.faults)


@dataclass(frozen=True)
class Services:
    """The services that studies use besides a cluster, and the folder of their files."""

    folder: Path
    s3: str
    mlflow: str

    def bucket(self) -> str:
        """Create an empty store and return its address."""
        name = f"b-{uuid.uuid4().hex}"
        boto3.client("s3", endpoint_url=self.s3).create_bucket(Bucket=name)
        return f"s3://{name}/team?endpoint={self.s3}"

    def study(self, name: str, store: str, candidates: int) -> Path:
        settings = {"folder": self.folder, "store": store, "candidates": candidates, "mlflow": self.mlflow}
        return self._written(name, STUDY.format(name=name, **settings))

    def recovered(self, name: str, store: str, ranks: int, stage: int) -> Path:
        settings = {"folder": self.folder, "store": store, "ranks": ranks, "stage": stage}
        return self._written(name, RECOVERED.format(name=name, **settings))

    def _written(self, name: str, study: str) -> Path:
        file = self.folder / f"{name}.yaml"
        file.write_text(study)
        return file


@contextlib.contextmanager
def cluster(findings: Findings) -> Iterator[Head]:
    """Start a cluster. A process that outlives it is a fault."""
    processes: list[Any] = []
    with head({"slot": NodeType(cpus=1, memory_gib=4, max_nodes=NODES)}, IDLE_SECONDS) as ray_head:
        yield ray_head
        processes = ray_head.process.children(recursive=True)
    remaining = [process for process in processes if process.is_running()]
    if remaining:
        findings.faults.append(f"{len(remaining)} processes remained: {remaining}")


def grow(services: Services, candidates: int) -> Findings:
    """Submit a study to a cluster that grows from no node to four and shrinks back."""
    findings = Findings("grow")
    store = services.bucket()
    with cluster(findings) as ray_head:
        watcher = Watcher(ray_head, "grow")
        submitted = time.time()
        run = _submitted(services, ray_head, services.study("grow", store, candidates))
        _finish(ray_head, "grow", run, findings)
        _until(lambda: not ray_head.nodes(), IDLE_SECONDS + 60)
        if ray_head.nodes():
            findings.faults.append(f"{len(ray_head.nodes())} nodes remained")
        observed = watcher.close()
        events = _events(ray_head, "grow")
        last_end = max(at for at, event in events if isinstance(event, AttemptEnded))
        all_gone = max(stay.ended for stay in observed.stays)
        findings.numbers += [
            Number("nodes at most", observed.most_nodes, "", NODES, is_minimum=True),
            Number("the original at work after", observed.first_work - submitted, " s"),
            Number("first candidate running after", _first_candidate(observed, events) - submitted, " s", 30),
            Number(
                "all nodes gone after the last candidate by", all_gone - last_end, " s", IDLE_SECONDS + 15
            ),
            Number("utilisation of nodes while up", 100 * observed.utilisation(), " %", 90, is_minimum=True),
            Number("of it while there was work", 100 * _while_working(observed, events), " %"),
            *_work(observed),
        ]
        _counted_once(services, store, "grow", [event for _, event in events], candidates, findings)
    return findings


def kills(services: Services, candidates: int, max_kills: int) -> Findings:
    """Kill a node every 20 s, at most `max_kills` times, until the study has ended."""
    findings = Findings("kills")
    store = services.bucket()
    draw = random.Random(0)
    killed = 0
    with cluster(findings) as ray_head:
        watcher = Watcher(ray_head, "kills")
        run = _submitted(services, ray_head, services.study("kills", store, candidates))
        _until(lambda: bool(ray_head.nodes()), 120)
        while killed < max_kills:
            time.sleep(KILL_SECONDS)
            if _ended(ray_head, "kills"):
                findings.faults.append(f"the study had ended after {killed} kills: it needs more candidates")
                break
            if nodes := ray_head.nodes():
                ray_head.kill(draw.choice(nodes))
                killed += 1
        _finish(ray_head, "kills", run, findings)
        observed = watcher.close()
        events = [event for _, event in _events(ray_head, "kills")]
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
    """Kill the submitting command as soon as the job is accepted, and read the front after the cluster has ended."""
    findings = Findings("laptop")
    store = services.bucket()
    with cluster(findings) as ray_head:
        began = time.time()
        run = _submitted(services, ray_head, services.study("laptop", store, 4))
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        _until(lambda: _ended(ray_head, "laptop"), STUDY_SECONDS)
        if (state := _state(ray_head, "laptop")) != "SUCCEEDED":
            findings.faults.append(f"the job ended as {state}")
        findings.numbers.append(Number("the job ended after", time.time() - began, " s"))
    path, mark, options = store.partition("?")
    with tempfile.TemporaryDirectory() as elsewhere:
        completed = subprocess.run(
            [sys.executable, "-m", "orchestrator", "front", f"{path}/laptop{mark}{options}", "--json"],
            cwd=elsewhere, capture_output=True, text=True, check=False,
        )  # fmt: skip
    if completed.returncode != 0:
        findings.faults.append(f"the front cannot be read: {completed.stderr.strip()}")
    else:
        front = json.loads(completed.stdout)
        findings.numbers.append(
            Number("models on the front, read from the store alone", len(front["members"]), "")
        )
        standings = front["candidates"]
        if set(standings) - {"front", "dominated"} or sum(standings.values()) != 5:  # the original is one
            findings.faults.append(f"of 4 candidates and the original the front knows {standings}")
    return findings


def ranks(services: Services) -> Findings:
    """Compare the models that two nodes train together with those of one node, by their perplexity after training.

    Batches are the same. tests/jobs/test_gangs.py compares the losses step by step.
    """
    findings = Findings("ranks")
    with cluster(findings) as ray_head:
        single = _perplexities(services, ray_head, "alone", 1, 0, findings)
        for stage in (1, 2, 3):
            joint = _perplexities(services, ray_head, f"stage{stage}", 2, stage, findings)
            if joint.keys() != single.keys() or not single:
                findings.faults.append(f"ZeRO {stage} has other candidates than one rank")
                continue
            deviation = max(abs(joint[id] / single[id] - 1) for id in single)
            findings.numbers.append(Number(f"perplexity by ZeRO {stage} is off by", 100 * deviation, " %", 1))
    return findings


def _perplexities(
    services: Services, ray_head: Head, name: str, ranks: int, stage: int, findings: Findings
) -> dict[str, float]:
    """Run a study and return the perplexity of each trained model by its recipe."""
    store = services.bucket()
    run = _submitted(services, ray_head, services.recovered(name, store, ranks, stage))
    max_nodes = 0
    while not _ended(ray_head, name):
        max_nodes = max(max_nodes, _nodes_of_ranks(ray_head))
        time.sleep(0.5)
    _finish(ray_head, name, run, findings)
    if max_nodes < ranks and ranks > 1:
        findings.faults.append(
            f"{name}: ranks were observed on {max_nodes} nodes at once, and not on {ranks}"
        )
    opened = open_store(store)
    trained = {}
    for record in filter(None, map(opened.record, opened.records("results/"))):
        recipe, outcome = Recipe.from_dict(record["recipe"]), outcome_from_dict(record["result"])
        if recipe.steps and recipe.steps[-1].trains() and isinstance(outcome, Success):
            trained[recipe.id] = outcome.measurement.metrics["perplexity"]
    return trained


def _nodes_of_ranks(ray_head: Head) -> int:
    """Return the number of nodes on which a process of several ranks runs now."""
    count = 0
    for node in ray_head.nodes():
        with contextlib.suppress(psutil.NoSuchProcess):
            below = psutil.Process(node.pid).children(recursive=True)
            count += any(int(process.environ().get("WORLD_SIZE", 1)) > 1 for process in below)
    return count


def s3(services: Services) -> Findings:
    """Compare the transfer of a large file into a bucket with plain boto3."""
    findings = Findings("s3")
    file = services.folder / "s3.json"
    command = [sys.executable, "-m", "benchmarks.s3", "--rounds", "5", "--json", str(file)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    record = json.loads(file.read_text())
    for ours, plain in (("put", "upload_file"), ("fetch", "download_file")):
        ratio = statistics.median(times[plain] / times[ours] for times in record["rounds"])
        speed = record["megabytes"] / statistics.median(times[ours] for times in record["rounds"])
        findings.numbers += [
            Number(f"{ours} of {record['megabytes']} MB", speed, " MB/s"),
            Number(f"speed against {plain}", ratio, "", 0.5, is_minimum=True),
        ]
    return findings


def _submitted(services: Services, ray_head: Head, study: Path) -> subprocess.Popen[bytes]:
    """Start the command that submits a study and follows it, and return it once the job is accepted."""
    log = services.folder / f"{study.stem}.log"
    with log.open("wb") as out:
        run = subprocess.Popen(
            ray_head.command("submit", study), cwd=services.folder, env=dict(ray_head.env), stdout=out, stderr=out,
            start_new_session=True,
        )  # fmt: skip
    _until(lambda: "was submitted" in log.read_text() or run.poll() is not None, 120)
    if run.poll() is not None:
        raise RuntimeError(f"{study.stem} could not be submitted:\n{log.read_text()}")
    return run


def _finish(ray_head: Head, study: str, run: subprocess.Popen[bytes], findings: Findings) -> None:
    """Wait until a study's job and the command that follows it have ended."""
    _until(lambda: _ended(ray_head, study), STUDY_SECONDS)
    if (state := _state(ray_head, study)) != "SUCCEEDED":
        findings.faults.append(f"the job ended as {state}")
        os.killpg(run.pid, signal.SIGKILL)
    run.wait(60)


def _state(ray_head: Head, study: str) -> str:
    """Return the state of the study's job that the cluster reports."""
    jobs = ray_head.ask("/api/jobs/")
    return str(next(job["status"] for job in jobs if (job["metadata"] or {}).get("slimfront.study") == study))


def _ended(ray_head: Head, study: str) -> bool:
    return _state(ray_head, study) in ("SUCCEEDED", "FAILED", "STOPPED")


def _events(ray_head: Head, study: str) -> list[tuple[float, Event]]:
    (ledger,) = folders_of(ray_head, study, "ledger.db")
    return list(Ledger(ledger, read_only=True).events())


def _first_candidate(observed: Observations, events: list[tuple[float, Event]]) -> float:
    """Return the start of the first attempt after the original's, which every candidate depends on."""
    original_ended = next(at for at, event in events if isinstance(event, AttemptEnded))
    return min(
        attempt.began for attempt in observed.attempts if attempt.began > original_ended - PERIOD_SECONDS
    )


def _while_working(observed: Observations, events: list[tuple[float, Event]]) -> float:
    """Return the utilisation from the first attempt until fewer jobs than slots remain."""
    running: set[str] = set()
    busy_until = observed.last_work
    for at, event in events:
        if isinstance(event, AttemptStarted):
            running.add(event.job_id)
        elif isinstance(event, AttemptEnded):
            running.discard(event.job_id)
            if len(running) >= NODES:
                busy_until = at
    return observed.utilisation_between(observed.first_work, busy_until)


def _work(observed: Observations) -> list[Number]:
    durations = [attempt.seconds for attempt in observed.attempts if attempt not in observed.lost]
    return [
        Number("pieces of work", len(observed.attempts), ""),
        Number("median piece", statistics.median(durations), " s"),
        Number("nodes started", len(observed.stays), ""),
        Number("of a node up before its first piece, median", statistics.median(observed.starting), " s"),
        Number("and after its last", statistics.median(observed.leaving), " s"),
    ]


def _counted_once(
    services: Services, store: str, study: str, events: list[Event], candidates: int, findings: Findings
) -> None:
    """Check that exactly the candidates have one result each in the ledger, in the store and in MLflow."""
    stored = {key.rpartition("/")[2] for key in open_store(store).records("results/")}
    wrong: list[str] = []

    def consistent() -> bool:
        wrong[:] = miscounted(events, candidates, stored, Counter(_finished_runs(services.mlflow, study)))
        return not wrong

    _until(consistent, MIRROR_SECONDS)  # MLflow receives the results last
    findings.faults += wrong


def miscounted(
    events: Sequence[Event], candidates: int, stored: Set[str], finished: Mapping[str, int]
) -> list[str]:
    """Return the faults of a study whose results were lost or counted twice.

    stored: the jobs with a result in the store; finished: the number of finished MLflow runs by candidate.
    """
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
    if stored != set(results):
        wrong.append(f"the store holds {len(stored)} results, the ledger {len(results)}")
    if not proposed < set(finished) or len(finished) != len(proposed) + 1 or max(finished.values()) > 1:
        total = sum(finished.values())
        wrong.append(f"MLflow has {total} finished runs of {len(proposed)} candidates and the original")
    return wrong


def _finished_runs(mlflow: str, study: str) -> list[str]:
    """Return the candidate of each finished run of a study with an accuracy."""
    client = MlflowClient(mlflow)
    experiment = client.get_experiment_by_name(study)
    if experiment is None:
        return []
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    runs_by_candidate = ((run.data.tags[CANDIDATE_TAG], run) for run in runs)
    return [
        id
        for id, run in runs_by_candidate
        if id != PARENT and run.info.status == "FINISHED" and "accuracy" in run.data.metrics
    ]


def _until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
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
    options = parser.parse_args()
    transformers.logging.disable_progress_bar()
    results = []
    with _services() as services:
        scenarios: dict[str, Callable[[], Findings]] = {
            "grow": lambda: grow(services, options.candidates),
            "kills": lambda: kills(services, options.candidates, options.kills),
            "laptop": lambda: laptop(services),
            "ranks": lambda: ranks(services),
            "s3": lambda: s3(services),
        }
        for name in options.only.split(","):
            results.append(scenarios[name]())
            print(results[-1].line(), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(findings) for findings in results], indent=1))
    if any(findings.faults for findings in results):
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
