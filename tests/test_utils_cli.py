"""How errors of the scripts reach a person."""

import logging

import pytest

from utils.cli import parse_args, run
from utils.errors import Interrupted, UserError


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


def test_success_is_zero():
    assert run(lambda: None) == 0


@pytest.mark.parametrize("switch", ["debug", "print_config"])
def test_switches_may_stand_anywhere(monkeypatch, switch):
    for words in ([f"--{switch}", "A.B", "1"], ["A.B", "1", f"--{switch}"]):
        monkeypatch.setattr("sys.argv", ["train_net.py", "--config_file", "x.yml", *words])
        args = parse_args("description")
        assert getattr(args, switch) and args.debug + args.print_config == 1 and args.opts == ["A.B", "1"]
