"""An artifact for the tests of stores."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "weights").write_bytes(os.urandom(100_000))
    (folder / "config.json").write_bytes(b"{}")
    return folder
