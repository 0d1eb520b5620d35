"""Chat writes with what was exported: the likeliest tokens, piece by piece."""

from pathlib import Path

import pytest
import torch

from jobs import formats
from jobs.models import loading, tokenizers
from orchestrator.publishing.chat import Chat


@pytest.fixture
def export(tiny_llama: Path, tmp_path: Path) -> Path:
    loading.save(loading.load(tiny_llama), tmp_path / "artifact", {})
    formats.write("slimfront", tmp_path / "artifact", tmp_path / "out")
    return tmp_path / "out"


def test_without_temperature_it_writes_the_likeliest_tokens(export: Path) -> None:
    said = "".join(Chat(export, 1).reply("An expression", 6, temperature=0.0, seed=0))
    words, module = tokenizers.load_tokenizer(export), loading.load(export).module
    row = list(words("An expression").input_ids)
    for _ in range(6):
        with torch.no_grad():
            row.append(int(module(torch.tensor([row])).logits[0, -1].argmax()))
    expected = words.decode(row[-6:], skip_special_tokens=True)
    assert said == expected[: len(said)]
    assert len(said) > 0


def test_what_is_drawn_depends_on_the_seed_alone(export: Path) -> None:
    talking = Chat(export, 1)
    first, again, other = (
        "".join(talking.reply("An expression", 12, temperature=1.0, seed=seed)) for seed in (0, 0, 1)
    )
    assert first == again != other


def test_a_folder_that_is_no_export_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(ValueError, match="no export"):
        Chat(tiny_llama, 1)
