from __future__ import annotations

import errno
import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest
import typer
from typer.testing import CliRunner

from kd_cli import logs
from kd_cli.main import app
from kdcore.errors import Interrupted, RunFailed, UserError


def commands() -> list[str]:
    return [str(command.name) for command in app.registered_commands]


@pytest.mark.parametrize("name", commands())
def test_every_command_has_help_with_examples_and_every_parameter_a_sentence(kd, name):
    command = typer.main.get_command(app).commands[name]
    assert f"kd {name}" in (command.help or "").partition("Examples:")[2]
    assert all(parameter.help for parameter in command.params if parameter.name != "help")
    assert kd(name, "--help").exit_code == 0


def test_the_version_names_the_command_and_the_core(kd):
    out = kd("--version").stdout
    assert out.startswith("kd 0.")
    assert "kdcore 0." in out


def test_completion_can_be_installed(kd):
    assert "--install-completion" in kd("--help").stdout


def test_completion_offers_components_and_recipes(kd_process):
    words = {"COMP_CWORD": "2", "_KD_COMPLETE": "complete_bash"}
    assert kd_process(COMP_WORDS="kd show toy-", **words).stdout.split() == ["toy-linear", "toy-points"]
    assert kd_process(COMP_WORDS="kd cp toy", **words).stdout.split() == ["toy/paper", "toy/quickstart"]


@pytest.mark.parametrize(
    ("error", "code", "shown"),
    [
        (UserError("wrong"), 2, "error: wrong"),
        (RunFailed("NaN"), 1, "error: NaN"),
        (Interrupted("saved"), 130, "interrupted: saved"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "a/b"), 2, "error: a/b: File name too long"),
        (KeyError("x"), 1, "unexpected error: KeyError: 'x'\nset KD_DEBUG=1 for the traceback"),
    ],
)
def test_every_error_has_its_exit_status_and_message(here, monkeypatch, error, code, shown):
    def fail(no_plugins):
        raise error

    monkeypatch.setattr("kd_cli.main.make_manager", fail)
    result = CliRunner().invoke(app, ["list"])
    assert result.exit_code == code
    assert result.stderr == f"{shown}\n"


def test_only_the_main_process_tells_an_error_and_all_leave_it_to_the_launcher(kd, here, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(here / "error.json"))
    result = kd("show", "nothing")
    assert result.exit_code == 2
    assert result.output == ""
    assert "there is no component 'nothing'" in (here / "error.json").read_text()


def test_a_closed_pipe_is_no_error(here):
    code = "import sys; sys.argv = ['kd', 'list', '--json']\nfrom kd_cli.main import main\nmain()"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What `set_up` changes in the log is put back afterwards."""
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    level, library = root.level, logging.getLogger("accelerate").level
    logging.getLogger("accelerate").setLevel(logging.NOTSET)
    yield
    root.setLevel(level)
    logging.getLogger("accelerate").setLevel(library)
    logging.captureWarnings(False)


@pytest.mark.parametrize(
    ("verbose", "expected"),
    [
        (0, ["warning: a damaged checkpoint"]),
        (1, ["warning: a damaged checkpoint", "info: a detail"]),
        (2, ["warning: a damaged checkpoint", "info: a detail", "warning: a remark"]),
    ],
)
def test_warnings_of_kd_are_shown_and_noise_of_libraries_only_when_asked_for(log, capsys, verbose, expected):
    logs.set_up(verbose)
    logging.getLogger("kdcore.plugins").warning("a damaged checkpoint")
    logging.getLogger("kdcore.engine").info("a detail")
    logging.getLogger("accelerate.something").warning("a remark")
    assert capsys.readouterr().err.splitlines() == expected
