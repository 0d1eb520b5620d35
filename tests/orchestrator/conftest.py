"""A study of a tiny model, as a file and prepared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.config.load import load
from orchestrator.planning.prepare import prepare
from orchestrator.planning.prepared_study import PreparedStudy

STUDY = """\
name: tiny
model: {model}
data:
  calibration: {{path: {text}, samples: 4, tokens: 32, part: [0.0, 0.3]}}
  train: {{path: {text}, samples: 16, tokens: 32, part: [0.3, 0.5]}}
  evaluation: {{path: {text}, tokens: 512, window: 32, part: [0.5, 1.0]}}
objectives:
  size_bytes: {{goal: min}}
  accuracy: {{goal: max}}
space:
  depth: {{drop_layers: {{count: [1, 2]}}}}
  width: {{prune_ffn: {{ratio: [0.2, 0.4]}}}}
  bits: {{rtn: {{bits: [3, 4, 8], group: [32, 64]}}}}
search: {{candidates: 5, rungs: []}}
store: {store}
tracking: {{uri: none}}
"""


@pytest.fixture
def study_file(tmp_path: Path, tiny_llama: Path, text_file: Path) -> Path:
    file = tmp_path / "study.yaml"
    file.write_text(STUDY.format(model=tiny_llama, text=text_file, store=tmp_path / "runs"))
    return file


@pytest.fixture
def prepared(study_file: Path) -> Callable[..., PreparedStudy]:
    """Prepares the tiny study with overrides."""
    return lambda *overrides: prepare(load(study_file, overrides))
