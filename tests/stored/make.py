"""Write the studies, stores and exports of an earlier commit that tests/orchestrator/test_stored_files.py opens.

Run from a new folder, with the Python of a checkout of that commit in which slimfront is installed:

    PYTHONPATH=CHECKOUT CHECKOUT/.venv/bin/python tests/stored/make.py OUT

OUT is a new folder. Only code of that commit may write here: what newer code writes is no test of old files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

WORK_FOLDER = "/somewhere/studies"
"""Stands in the outbox for the folder that the studies ran in, the only absolute path that is stored."""
STUDY = """\
name: {name}
model: tiny model
data:
  calibration: {{path: "some text.txt", samples: 4, tokens: 32, part: [0.0, 0.2]}}
  train: {{path: "some text.txt", samples: 16, tokens: 32, part: [0.2, 0.5]}}
  evaluation: {{path: "some text.txt", tokens: 1024, window: 32, part: [0.5, 1.0]}}
objectives:
  size_bytes: {{goal: min}}
  accuracy: {{goal: max}}
{more}store: {name} store
"""
FINISHED = """\
  decode_ms: {goal: min}
target: {runtime: torch, threads: 1, prompt_tokens: 64, new_tokens: 32}
space:
  depth: {drop_layers: {count: 1}}
  width: {prune_ffn: {ratio: [0.25, 0.5]}}
  recover: {distill: {steps: 4, batch: 4}}
  bits:
    gptq: {bits: {choices: [3, 4, 8], each: layer, groups: 2}, group: 32}
    rtn: {bits: [4, 8], group: 32, symmetric: true}
search: {algorithm: surrogate, candidates: 8, rungs: [0.25], table: 4}
tracking: {uri: "http://127.0.0.1:9"}
cluster: {slots: 2}
"""
INTERRUPTED = """\
space:
  depth: {drop_layers: {count: 1}}
  width: {prune_ffn: {ratio: [0.25, 0.5]}}
  recover: {distill: {steps: 150, batch: 4}}
  bits:
    gptq: {bits: [3, 4, 8], group: 32}
    rtn: {bits: [3, 4, 8], group: 32}
search: {algorithm: surrogate, candidates: 8, rungs: []}
tracking: {uri: none}
cluster: {slots: 2}
"""
EVERY_NAME = """\
space:
  width: {prune_ffn: {ratio: [0.25, 0.5]}}
  bits: {rtn: {bits: [3, 4, 8], group: 32}}
search: {algorithm: surrogate, candidates: 4, rungs: []}
tracking: {uri: none}
cluster: {slots: 2}
"""
PATIENT = """\
import importlib.abc, importlib.util, sys


class Patient(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "jobs.timing":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def relaxed(module):
            execute(module)
            module._SPREAD = module._OTHERS = module._SLOWED = 100.0

        spec.loader.exec_module = relaxed
        return spec


sys.meta_path.insert(0, Patient())
"""
"""The sitecustomize.py of all processes: no time counts as noisy. Steps of so small a model take less than a
millisecond, and what is tested is how they are stored, not how long they took."""
FORMATS = ("openvino", "onnx", "gguf", "safetensors", "compressed-tensors", "slimfront")


def main() -> None:
    out = Path(sys.argv[1]).absolute()
    out.mkdir(parents=True)
    os.chdir(out)
    patient = tempfile.TemporaryDirectory()
    Path(patient.name, "sitecustomize.py").write_text(PATIENT)
    os.environ["PYTHONPATH"] = os.pathsep.join([patient.name, os.environ["PYTHONPATH"]])
    write_model(write_text(Path("some text.txt")), Path("tiny model"))
    for name, more in (("finished", FINISHED), ("interrupted", INTERRUPTED), ("every-name", EVERY_NAME)):
        Path(f"{name}.yaml").write_text(STUDY.format(name=name, more=more))
    run_to_the_end("finished")
    run_until_killed("interrupted")
    run_to_the_end("every-name", "search.candidates=2")
    add_every_name(Path("every-name.yaml"), Path("every-name store/every-name"))
    exports = {name: exported(name) for name in FORMATS}
    for report in out.glob("* store/*/report.html"):
        report.write_text(without_plotly(report.read_text()))
    clean_outbox(Path("finished store/finished/outbox.db"))
    for leftover in (
        *out.glob("* store/*/scratch"),
        *out.glob("* store/tmp/*"),
        *out.glob("* store/*/*.log"),
    ):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    for database in out.rglob("*.db-shm"):
        database.unlink()
    Path("expected.json").write_text(json.dumps({"exports": exports, **expected()}, indent=1))


def write_text(file: Path) -> str:
    """Sentences of our own, in paragraphs that end as on Windows, enough of them for all uses."""
    chance = random.Random(0)
    nouns = ["worker", "model", "layer", "store", "ledger", "tensor", "kernel", "cluster", "café", "probe"]
    verbs = ["measures", "keeps", "rounds", "reads", "writes", "prunes", "loses", "finds"]
    other = ["small", "slow", "quick", "narrow", "sparse", "old", "quiet"]
    ends = ["before noon", "at night", "twice", "in 3 steps", "without a GPU", "on Mondays"]

    def sentence() -> str:
        words = [
            "The", chance.choice(other), chance.choice(nouns), chance.choice(verbs), "the",
            chance.choice(other), chance.choice(nouns), chance.choice(ends),
        ]  # fmt: skip
        return " ".join(words) + "."

    paragraphs = [" ".join(sentence() for _ in range(3)) for _ in range(80)]
    text = "\r\n\r\n".join(paragraphs)
    file.write_bytes(text.encode())
    return text


def write_model(text: str, folder: Path) -> None:
    """A Llama of two blocks that was trained for seconds on the text; tied, grouped queries, no token to pad with."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True, bos_token_id=0,
        eos_token_id=1, pad_token_id=None,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    tokens = torch.tensor(fast(text).input_ids)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(150):
        starts = torch.randint(0, len(tokens) - 32, (16,), generator=torch.Generator().manual_seed(step))
        rows = torch.stack([tokens[start : start + 32] for start in starts.tolist()])
        optimizer.zero_grad()
        model(rows, labels=rows).loss.backward()
        optimizer.step()
    model.to(torch.bfloat16).save_pretrained(folder)
    fast.save_pretrained(folder)


def slimfront(*words: object, codes: tuple[int, ...] = (0,)) -> str:
    """Return the output of the command; RuntimeError where it ends with an exit code that is not among `codes`."""
    command = [sys.executable, "-m", "orchestrator", *map(str, words)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode not in codes:
        raise RuntimeError(f"{' '.join(command)} ended with exit code {process.returncode}: {process.stderr}")
    return process.stdout


def run_to_the_end(name: str, *overrides: str) -> None:
    """The process that carries the outbox to a server which is not there is ended, and nothing is delivered."""
    command = [sys.executable, "-m", "orchestrator", "search", f"{name}.yaml", *overrides]
    process = psutil.Popen(command)
    mirrors: dict[int, psutil.Process] = {}
    while process.poll() is None:
        for child in process.children():
            with contextlib.suppress(psutil.NoSuchProcess):
                if "orchestrator.tracking" in child.cmdline():
                    mirrors[child.pid] = child
        time.sleep(0.2)
    for mirror in mirrors.values():
        with contextlib.suppress(psutil.NoSuchProcess):
            mirror.kill()
    if process.returncode:
        raise RuntimeError(f"{name} ended with exit code {process.returncode}")


def run_until_killed(name: str) -> None:
    """Kill a study when some candidates have ended and some run."""
    ledger = Path(f"{name} store/{name}/ledger.db")
    process = psutil.Popen([sys.executable, "-m", "orchestrator", "search", f"{name}.yaml"])
    while True:
        if process.poll() is not None:
            raise RuntimeError(f"{name} ended before it was killed")
        started, ended = counts(ledger)
        if ended >= 4 and started > ended and ledger.with_name("front.json").is_file():
            break
        time.sleep(0.02)
    family = process.children(recursive=True)
    process.send_signal(signal.SIGKILL)
    psutil.wait_procs([process, *family], timeout=120)
    started, ended = counts(ledger)
    if started == ended:
        raise RuntimeError(f"nothing ran when {name} was killed; make it again")


def counts(ledger: Path) -> tuple[int, int]:
    """How many attempts started and ended."""
    if not ledger.is_file():
        return 0, 0
    with contextlib.closing(sqlite3.connect(f"file:{ledger}?mode=ro", uri=True)) as database:
        try:
            kinds = [kind for (kind,) in database.execute("select kind from events")]
        except sqlite3.OperationalError:  # the table is not made yet
            return 0, 0
    return kinds.count("Started"), kinds.count("Ended")


def add_every_name(study_file: Path, folder: Path) -> None:
    """Append the events that such a study seldom has, and write a front that counts each standing, by the code of
    the commit; the modules are looked up here because later commits do not have them."""
    config, prepare, events, ledgers, results, service, studies, search, proposals, progress, numpy = (
        importlib.import_module(name)
        for name in (
            "orchestrator.config", "orchestrator.prepare", "orchestrator.events", "orchestrator.ledger",
            "orchestrator.results", "orchestrator.service", "orchestrator.study", "orchestrator.search",
            "orchestrator.search.proposals", "orchestrator.progress", "numpy",
        )
    )  # fmt: skip
    prepared = prepare.prepare(config.load(study_file, ("search.candidates=2",)))
    ledger = ledgers.Ledger(folder / "ledger.db")
    proposed = {event.recipe.id for _, event in ledger.events() if isinstance(event, events.Proposed)}
    generator = numpy.random.default_rng(0)
    while True:
        proposal = prepared.propose(proposals.uniform(prepared.space.knobs(), generator))
        if proposal.recipe.id not in proposed and proposal.recipe.steps:
            break
    cost = dataclasses.replace(proposal.cost, predicted={"foretold_divergence": 0.5})
    spent = "the budget of 1 hours is spent"
    for event in (
        events.Resized(3),
        events.Granted("finishing", spent),
        events.Began(2, events.Granted("finishing", spent)),
        dataclasses.replace(proposal, cost=cost),
        events.Stopped(proposal.recipe.id, "it would add next to nothing to the front"),
        events.Granted("nothing", spent),
        events.Exhausted("there are no more choices"),
    ):
        ledger.append(event)
    study = studies.Study(prepared.plan)
    knobs = prepared.space.knobs()
    known = lambda choices: prepared.known(choices, study)  # noqa: E731
    searching = search.make("surrogate", knobs, prepared.plan.objectives, known, 0, prepared.opening())
    service.replay(study, ledger, searching)
    ledger.close()
    by_id: dict[str, Any] = dict(study.candidates)
    first, second = [id for id, one in by_id.items() if one.state == "measured" and id != study.original.id][
        :2
    ]
    measured = by_id[first].measurement
    environment = {**measured.environment, "cpu": "another processor"}
    by_id[first] = dataclasses.replace(
        by_id[first], measurement=dataclasses.replace(measured, environment=environment)
    )
    by_id[second] = dataclasses.replace(by_id[second], fidelity=0.25)
    standings = results.Standings("every-name", prepared.plan.objectives, study.original.id, by_id)
    front = results.front_json(standings.results())
    if not {"elsewhere", "outrun", "stopped"} <= front["candidates"].keys():
        raise RuntimeError(f"the front lacks a standing: {front['candidates']}")
    progress.write_json(folder / "front.json", front)


def exported(name: str) -> str:
    """Export in a format the first member of the front that it can hold; its id."""
    members = json.loads(slimfront("front", "finished store/finished", "--json"))["members"]
    for member in reversed(members):
        with contextlib.suppress(RuntimeError):
            words = ("--pick", member["id"], "--format", name)
            slimfront("export", "finished store/finished", f"exports/{name}", *words)
            return str(member["id"])
    raise RuntimeError(f"no member of the front can be held by {name}")


def without_plotly(page: str) -> str:
    """A report without the source of plotly.js, 4.8 MB that are not ours; the figures' data stay."""
    start = page.index("<script>/**\n* plotly.js")
    return page[:start] + page[page.index("</script>", start) + len("</script>") :]


def clean_outbox(outbox: Path) -> None:
    """Replace the folder that the studies ran in and leave out plotly.js, in the last entry of the outbox."""
    module = importlib.import_module("orchestrator.tracking.outbox")
    entry = module.Outbox(outbox).latest("finish")
    content = json.loads(json.dumps(entry.content).replace(str(Path.cwd()), WORK_FOLDER))
    module.Outbox(outbox).append("finish", {**content, "report": without_plotly(content["report"])})
    with contextlib.closing(sqlite3.connect(outbox, isolation_level=None)) as database:
        database.execute("delete from entries where number = ?", (entry.number,))
        database.execute("vacuum")
        database.execute("pragma wal_checkpoint(truncate)")


def expected() -> dict[str, Any]:
    """What the commit prints of all this, of a copy, since a look may write."""
    found: dict[str, Any] = {"commit": commit()}
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copytree(Path.cwd(), Path(scratch) / "copy", symlinks=True)
        before = Path.cwd()
        os.chdir(Path(scratch) / "copy")
        for name in ("finished", "interrupted", "every-name"):
            folder = f"{name} store/{name}"
            found[name] = {
                "status": json.loads(slimfront("status", folder, "--json")),
                "front": json.loads(slimfront("front", folder, "--json")),
                "store": json.loads(slimfront("store", f"{name} store", "--json")),
            }
        # Exit code 1: a time differs by more than the errors; 3: no runtime reads the format.
        texts = {name: slimfront("verify", f"exports/{name}", "--json", codes=(0, 1, 3)) for name in FORMATS}
        found["verify"] = {name: json.loads(text) for name, text in texts.items() if text}
        found["compare"] = json.loads(
            slimfront("compare", "exports/openvino", "exports/onnx", "--json", "--pairs", 1)
        )
        os.chdir(before)
    return found


def commit() -> str:
    checkout = Path(str(importlib.import_module("orchestrator").__file__)).parents[1]
    git = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
