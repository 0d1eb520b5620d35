"""Models whose files and config disagree are refused by the name of the file or tensor; sound models are accepted."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from jobs.models import loading, weight_check
from jobs.models.families import names
from jobs.models.weight_check import INDEX, check_values, check_weights

Tensors = dict[str, Tensor]


def copied(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target / "model"))


def change_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def change_weights(folder: Path, change: Callable[[Tensors], object]) -> None:
    file = folder / loading.WEIGHTS
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def divide(folder: Path) -> list[str]:
    """Divide the weights of a model into two shards with an index, and return the names of the shards."""
    file = folder / loading.WEIGHTS
    tensors = load_file(file)
    file.unlink()
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    shard_by_name = {}
    for number, shard in enumerate(shards):
        part = dict(sorted(tensors.items())[number::2])
        save_file(part, folder / shard, metadata={"format": "pt"})
        shard_by_name.update(dict.fromkeys(part, shard))
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": shard_by_name}))
    return shards


@pytest.mark.parametrize("family", names())
def test_models_of_every_family_are_accepted(family: str, tiny: Callable[..., Path]) -> None:
    check_weights(tiny(family))
    check_values(tiny(family), loading.digest(tiny(family)))


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_classifiers_are_accepted(family: str, tiny: Callable[..., Path]) -> None:
    check_weights(tiny(family, "classification"))


def test_shards_and_half_precision_are_accepted_and_load_as_the_single_file(
    tiny_llama: Path, tmp_path: Path
) -> None:
    model = copied(tiny_llama, tmp_path)
    change_weights(model, lambda tensors: tensors.update({n: t.half() for n, t in tensors.items()}))
    expected = loading.load(model).module.state_dict()
    divide(model)
    check_weights(model)
    check_values(model, loading.digest(model))
    for name, tensor in loading.load(model).module.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_the_head_of_a_pretraining_task_is_no_part_of_an_embedding_model(
    tiny_bert: Path, tmp_path: Path
) -> None:
    config = transformers.AutoConfig.from_pretrained(tiny_bert)
    transformers.BertForPreTraining(config).save_pretrained(tmp_path)
    check_weights(tmp_path)


@pytest.mark.parametrize(
    ("family", "buffers"),
    [
        ("bert", {"embeddings.position_ids": torch.arange(300)[None]}),
        ("roberta", {"embeddings.position_ids": torch.arange(300)[None]}),
        ("gpt2", {"transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8)}),
        ("gpt2", {"transformer.h.0.attn.masked_bias": torch.ones(())}),
        ("gpt_neox", {"gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool)}),
        ("gpt_neo", {"transformer.h.0.attn.attention.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool)}),
        ("llama", {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}),
    ],
)  # fmt: skip
def test_buffers_that_older_files_contain_are_no_weights(
    family: str, buffers: Tensors, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    model = copied(tiny(family), tmp_path)
    change_weights(model, lambda tensors: tensors.update(buffers))
    check_weights(model)


REFUSED: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "a missing projection": (
        lambda tensors: tensors.pop("model.layers.1.mlp.down_proj.weight"),
        r"lacks tensors .*: model\.layers\.1\.mlp\.down_proj\.weight$",
    ),
    "a missing norm": (lambda tensors: tensors.pop("model.norm.weight"), r"lacks .*model\.norm\.weight"),
    "a foreign tensor": (
        lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}),
        r"does not have: model\.layers\.0\.self_attn\.q_proj\.bias",
    ),
    "integers": (
        lambda tensors: tensors.update(
            {n: (t * 100).to(torch.int8) for n, t in tensors.items() if "proj" in n}
        ),
        r"weights of type int8",
    ),
    "another head than the tied one": (
        lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}),
        r"ties lm_head\.weight to model\.embed_tokens\.weight",
    ),
}


@pytest.mark.parametrize("kind", sorted(REFUSED))
def test_weights_that_do_not_match_the_config_are_refused_by_name(
    kind: str, tiny_llama: Path, tmp_path: Path
) -> None:
    model = copied(tiny_llama, tmp_path)
    change, message = REFUSED[kind]
    change_weights(model, change)
    with pytest.raises(ValueError, match=message):
        check_weights(model)


def test_a_head_that_equals_the_tied_embedding_is_accepted(tiny_llama: Path, tmp_path: Path) -> None:
    model = copied(tiny_llama, tmp_path)
    change_weights(model, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    check_weights(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 6}, r"lacks tensors .*model\.layers\.4"),
        ({"num_hidden_layers": 2}, r"does not have: model\.layers\.2"),
        ({"num_hidden_layers": 0}, "0 layers"),
        ({"intermediate_size": 96}, r"expected \[.*96.*intermediate_size=96 in config\.json"),
        ({"vocab_size": 500}, "vocab_size=500"),
        ({"tie_word_embeddings": False}, r"lacks tensors .*lm_head\.weight"),
        ({"hidden_size": -4}, "describes no model"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"num_attention_heads": 3}, "describes no model"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantization_config \(gptq\)"),
        ({"architectures": ["LlamaModel"]}, "LlamaModel is not supported"),
        ({"architectures": ["LlamaForTokenClassification"]}, "TokenClassification is not supported"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ],
)
def test_a_config_that_does_not_match_the_weights_is_refused(
    changes: dict[str, object], message: str, tiny_llama: Path, tmp_path: Path
) -> None:
    model = copied(tiny_llama, tmp_path)
    change_config(model, **changes)
    with pytest.raises(ValueError, match=message) as error:
        check_weights(model)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"problem_type": "multi_label_classification"},
        {"problem_type": "regression"},
        {"id2label": {"0": "score"}, "label2id": {"score": 0}},
    ],
)
def test_a_classifier_without_a_single_right_class_is_refused(
    changes: dict[str, object], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    model = copied(tiny("bert", "classification"), tmp_path)
    change_config(model, **changes)
    with pytest.raises(ValueError, match="not supported; expected classes"):
        check_weights(model)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda file: file[:4096], "no valid safetensors file"),
        (lambda file: b"", "no valid safetensors file"),
        (lambda file: struct.pack("<Q", 10**12) + file[8:], "no valid safetensors file"),
        (lambda file: file + b"more", "no valid safetensors file"),
        (lambda file: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
    ],
)
def test_a_damaged_file_is_refused_by_its_name(
    content: Callable[[bytes], bytes], message: str, tiny_llama: Path, tmp_path: Path
) -> None:
    model = copied(tiny_llama, tmp_path)
    weights = model / loading.WEIGHTS
    weights.write_bytes(content(weights.read_bytes()))
    with pytest.raises(ValueError, match=rf"model\.safetensors is .*{message}"):
        check_weights(model)


def test_shards_are_compared_with_their_index(tiny_llama: Path, tmp_path: Path) -> None:
    model = copied(tiny_llama, tmp_path)
    first, second = divide(model)
    index = (model / INDEX).read_text()
    (model / second).rename(tmp_path / second)
    with pytest.raises(FileNotFoundError, match=f"lacks {second}"):
        check_weights(model)
    (model / INDEX).write_text(index.replace(second, f"../{second}"))
    with pytest.raises(ValueError, match=rf"names \.\./{second}, which is not a file of this folder"):
        check_weights(model)
    (tmp_path / second).rename(model / second)
    (model / INDEX).write_text(index.replace(f'"lm_head.weight": "{first}"', "").replace(second, first))
    with pytest.raises(ValueError, match="is wrong about"):
        check_weights(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_refused_with_its_tensor(
    value: float, tiny_llama: Path, tmp_path: Path
) -> None:
    model = copied(tiny_llama, tmp_path)
    change_weights(model, lambda tensors: tensors["model.layers.0.mlp.up_proj.weight"][3].fill_(value))
    check_weights(model)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.up_proj\.weight contains NaN or infinite"):
        check_values(model, loading.digest(model))


def test_an_adapter_and_a_model_of_slimfront_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    loading.save(loading.load(tiny_llama), tmp_path / "artifact", {"text": "original"})
    with pytest.raises(ValueError, match="a model that slimfront made"):
        check_weights(tmp_path / "artifact")
    model = copied(tiny_llama, tmp_path)
    (model / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="contains an adapter"):
        check_weights(model)


def test_loading_never_fills_a_missing_weight(tiny_llama: Path, tmp_path: Path) -> None:
    """Whatever was checked before: a file may change between the check and the job that loads it."""
    model = copied(tiny_llama, tmp_path)
    change_weights(model, lambda tensors: tensors.pop("model.layers.1.mlp.down_proj.weight"))
    with pytest.raises(
        ValueError, match=r"lacks the weights of \['model\.layers\.1\.mlp\.down_proj\.weight'\]"
    ):
        loading.load(model)


def test_the_answer_is_remembered_by_contents(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def differences(folder: Path) -> dict[str, object]:
        calls.append(folder)
        return {"missing": [], "unexpected": [], "mismatched": []}

    model = copied(tiny_llama, tmp_path)
    change_config(model, note="a config that no other test has")
    monkeypatch.setattr(weight_check.loading, "differences", differences)
    check_weights(model)
    check_weights(model)
    assert calls == [model]
