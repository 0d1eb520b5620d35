"""Commands that only display data start fast, since they import no large library."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.persistence.front_file import write_front
from orchestrator.service.status import Status
from orchestrator.study.front_snapshot import FrontSnapshot, MeasuredModel

LARGE_LIBRARIES = ["torch", "transformers", "ray", "mlflow", "numpy", "scipy"]

REPORT_IMPORTS = """
import json, sys
from orchestrator.cli.app import app
try:
    app(sys.argv[1:])
except SystemExit as end:
    code = end.code
    print(json.dumps([code, sorted(sys.modules)]), file=sys.stderr)
"""


@pytest.fixture
def study_folder(tmp_path: Path) -> Path:
    """Create the files of a study that the commands read, and return their folder."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    original = MeasuredModel({"size_bytes": 1e6})
    write_front(
        folder / "front.json", FrontSnapshot("tiny", (), original, (), {}, None, None, {"waiting": 1})
    )
    status = Status("tiny", "searching", 0.0, 5, 1, 1, 0, 0, 0, 0, None, 1.0, None)
    (folder / "status.json").write_text(json.dumps(dataclasses.asdict(status)))
    (folder / "report.html").write_text("<p>a report")
    return folder


@pytest.mark.parametrize("command", ["--help", "front", "status", "report"])
def test_a_command_that_only_displays_data_imports_no_large_library(command: str, study_folder: Path) -> None:
    arguments = [command] if command == "--help" else [command, str(study_folder)]
    process = subprocess.run(
        [sys.executable, "-c", REPORT_IMPORTS, *arguments],
        capture_output=True, text=True, cwd=Path(__file__).parents[3], check=False,
    )  # fmt: skip
    code, modules = json.loads(process.stderr.splitlines()[-1])
    assert code == 0, process.stderr
    assert "typer" in modules
    assert not {*LARGE_LIBRARIES} & {*modules}
