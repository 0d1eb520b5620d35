"""Shared fixtures: a tiny model of each family with its tokenizer, and English text."""

from __future__ import annotations

import json
import pydoc_data.topics
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import boto3
import pytest
import torch
import transformers
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from jobs.models import families
from jobs.models.families import Task
from tests import processes

VOCABULARY = 512

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.fixture(scope="session", autouse=True)
def empty_user_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Replace the user's cache by an empty one, so that tests read no results of earlier runs."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=needs_cuda)])
def device(request: pytest.FixtureRequest) -> str:
    """Return the device on which models compute.

    `pytest -k cuda` runs the tests that need a GPU. All other tests expect a machine without one
    (`CUDA_VISIBLE_DEVICES=` hides it), since training uses a GPU if there is one.
    """
    return str(request.param)


def prose() -> str:
    """Return about 100 kB of English prose."""
    return "\n\n".join(list(pydoc_data.topics.topics.values())[:25])


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a text file of about 100 kB of English prose."""
    file = tmp_path_factory.mktemp("text") / "topics.txt"
    file.write_text(prose())
    return file


def tokenizer_on(text: str) -> transformers.PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of 512 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(scope="session")
def words() -> transformers.PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of 512 tokens."""
    return tokenizer_on(prose())


Tiny = Callable[..., Path]


def save_tiny(
    family: str, task: Task | None, words: transformers.PreTrainedTokenizerFast, folder: Path
) -> Path:
    """Write a random model of a family and task (by default its first task) with its tokenizer."""
    torch.manual_seed(0)
    build = {
        "causal-lm": transformers.AutoModelForCausalLM,
        "classification": transformers.AutoModelForSequenceClassification,
        "embedding": transformers.AutoModel,
    }[task or families.family(family).tasks[0]]
    build.from_config(config_of(family)).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, words: transformers.PreTrainedTokenizerFast) -> Tiny:
    """Return a function that creates, once, a random model of a family and task (by default its first task)."""
    folders: dict[tuple[str, Task], Path] = {}

    def folder_of(family: str, task: Task | None = None) -> Path:
        task = task or families.family(family).tasks[0]
        if (family, task) not in folders:
            folder = tmp_path_factory.mktemp("models") / f"tiny-{family}"
            folders[family, task] = save_tiny(family, task, words, folder)
        return folders[family, task]

    return folder_of


def config_of(family: str) -> transformers.PretrainedConfig:
    """Return a configuration of width 64, heads of 16 and a few blocks; grouped queries if the family has them."""
    tokens = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    width_64 = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, **tokens}
    decoder = {**width_64, "num_hidden_layers": 4, "max_position_embeddings": 256}
    encoder = {**width_64, "num_hidden_layers": 3, "max_position_embeddings": 300}
    grouped = {**decoder, "num_key_value_heads": 2}
    gpt2_style = {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 256, **tokens}
    options: dict[str, dict[str, Any]] = {
        "llama": {**grouped, "tie_word_embeddings": True},
        "mistral": grouped,
        "qwen2": grouped,
        "qwen3": {**grouped, "head_dim": 16},
        "gemma3_text": {**grouped, "head_dim": 16},
        "phi": decoder,
        "opt": {**decoder, "ffn_dim": 160, "word_embed_proj_dim": 64},
        "gpt2": gpt2_style,
        "gpt_neo": {**tokens, "hidden_size": 64, "num_layers": 4, "num_heads": 4, "max_position_embeddings": 256,
                    "attention_types": [[["global", "local"], 2]]},
        "gptj": {**gpt2_style, "rotary_dim": 8},
        "gpt_neox": decoder,
        "bert": encoder,
        "roberta": encoder,
        "distilbert": {**tokens, "dim": 64, "hidden_dim": 160, "n_layers": 3, "n_heads": 4},
        "mobilebert": {**encoder, "intra_bottleneck_size": 32, "true_hidden_size": 32, "embedding_size": 32,
                       "num_feedforward_networks": 2},
    }  # fmt: skip
    return transformers.AutoConfig.for_model(family, **options[family])


@pytest.fixture(scope="session")
def lm_eval_task() -> Callable[..., None]:
    """Return a function that writes a task of lm-eval with these items (context, choices, answer).

    The task is multiple choice unless `options` of its file change that.
    """

    def write_task(folder: Path, name: str, items: Sequence[Mapping[str, object]], **options: object) -> None:
        data = folder / f"{name}.jsonl"
        data.write_text("\n".join(json.dumps(item) for item in items))
        task_config = {
            "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{context}}",
            "doc_to_choice": "{{choices}}", "doc_to_target": "answer", "target_delimiter": "",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        }  # fmt: skip
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**task_config, **options}))

    return write_task


@pytest.fixture(scope="session")
def tiny_llama(tiny: Tiny) -> Path:
    """A random Llama of 4 blocks, width 64, grouped-query attention, tied embeddings."""
    return tiny("llama")


@pytest.fixture(scope="session")
def tiny_bert(tiny: Tiny) -> Path:
    """A random BERT of 3 blocks, width 64."""
    return tiny("bert")


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return the URL of a server that implements S3."""
    with processes.s3_server(tmp_path_factory.mktemp("s3")) as url:
        yield url


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a client of that server; credentials are in the environment, also for other processes."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-the-tests")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    return boto3.client("s3", endpoint_url=s3_server)


@pytest.fixture
def s3_address(s3: Any, s3_server: str) -> str:
    """Return the address of an empty store in a new bucket."""
    bucket = f"b-{uuid.uuid4().hex}"
    s3.create_bucket(Bucket=bucket)
    return f"s3://{bucket}/of/a/team?endpoint={s3_server}"
