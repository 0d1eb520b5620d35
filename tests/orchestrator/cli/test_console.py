"""Errors end a command with a message and an exit code."""

from __future__ import annotations

import pytest
import typer

from orchestrator.cli.console import ExitCode, exit_on_error
from orchestrator.config.problems import InvalidStudyError


def test_an_expected_error_becomes_its_message_and_the_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as exit_info, exit_on_error(LookupError):
        raise KeyError("no study of this name")
    assert exit_info.value.exit_code == 3
    assert capsys.readouterr().err == "no study of this name\n"


def test_invalid_input_has_its_own_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as exit_info, exit_on_error(ValueError, code=ExitCode.INVALID_INPUT):
        raise ValueError("too many GPUs")
    assert exit_info.value.exit_code == 2
    assert capsys.readouterr().err == "too many GPUs\n"


def test_an_invalid_study_exits_2_with_a_line_for_each_problem_whatever_is_expected(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(typer.Exit) as exit_info, exit_on_error(ValueError):
        raise InvalidStudyError(["a.yaml:1 name: got 1", "a.yaml:2 model: got 2"])
    assert exit_info.value.exit_code == 2
    assert capsys.readouterr().err == "a.yaml:1 name: got 1\na.yaml:2 model: got 2\n"


def test_an_unexpected_error_is_raised() -> None:
    with pytest.raises(ZeroDivisionError), exit_on_error(ValueError, LookupError):
        raise ZeroDivisionError


def test_an_error_without_an_explanation_is_raised() -> None:
    with pytest.raises(OSError, match="broken"), exit_on_error(OSError, explain=lambda error: None):
        raise OSError("broken")


def test_ctrl_c_exits_130_with_the_optional_message(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as exit_info, exit_on_error(interrupted="resume later"):
        raise KeyboardInterrupt
    assert exit_info.value.exit_code == 130
    assert capsys.readouterr().err == "resume later\n"
    with pytest.raises(KeyboardInterrupt), exit_on_error(Exception):
        raise KeyboardInterrupt


def test_an_exit_inside_keeps_its_code_although_it_is_a_runtime_error() -> None:
    with pytest.raises(typer.Exit) as exit_info, exit_on_error(RuntimeError, Exception):
        raise typer.Exit(ExitCode.NO_RESULT)
    assert exit_info.value.exit_code == 1
