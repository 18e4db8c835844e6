"""How errors of the scripts reach a person."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from utils.cli import parse_args, run
from utils.errors import Interrupted, UserError

ROOT = Path(__file__).parent.parent


def raising(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (UserError("the key X is wrong"), 2, "error: the key X is wrong"),
        (Interrupted("saved in last.pth", 15), 143, "saved in last.pth"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ZeroDivisionError("by zero"), 1, "unexpected ZeroDivisionError: by zero"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), 2, "out of memory. Tried\nTo take less"),
    ],
)
def test_one_message_and_an_exit_code(error, code, told, capsys):
    assert run(raising(error)) == code
    err = capsys.readouterr().err
    assert told in err and "Traceback" not in err


def test_debug_shows_the_traceback_and_the_log_keeps_it(caplog):
    for error in (UserError("x"), ZeroDivisionError("y")):
        with pytest.raises(type(error)):
            run(raising(error), debug=True)
    with caplog.at_level(logging.WARNING):
        run(raising(ZeroDivisionError("y")))
    assert "ZeroDivisionError: y" in caplog.text and "raise error" in caplog.text


@pytest.mark.parametrize(
    "script", [["train_net.py"], ["test_net.py"], ["-m", "tools.export"], ["-m", "tools.ablate"]], ids=" ".join
)
def test_an_interruption_while_libraries_load(script, tmp_path):
    """A torch that is interrupted as it is imported."""
    (tmp_path / "torch.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    ended = subprocess.run([sys.executable, *script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "interrupted\n")


def test_success_is_zero():
    assert run(lambda: None) == 0


@pytest.mark.parametrize("switch", ["debug", "print_config"])
def test_switches_may_stand_anywhere(monkeypatch, switch):
    for words in ([f"--{switch}", "A.B", "1"], ["A.B", "1", f"--{switch}"]):
        monkeypatch.setattr("sys.argv", ["train_net.py", "--config_file", "x.yml", *words])
        args = parse_args("description")
        assert getattr(args, switch) and args.debug + args.print_config == 1 and args.opts == ["A.B", "1"]
