"""A part of the table of bad inputs, which tests/faults/bad_inputs.py tries as a whole."""

import os
from pathlib import Path

import pytest
import torch
from faults.bad_inputs import LOADS, TABLE, Case, prepare, refusal_fault, run_case, running_fault
from faults.spoil import attack, attacking_program

PART = 4
"""One row in so many is tried here."""


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    for above in (folder, *folder.parents[:2]):  # some rows give up the rights of root
        above.chmod(0o755)
    return prepare(folder)


def test_there_are_enough_rows_and_none_twice():
    assert len(TABLE) >= 60
    names = [case.name for case in (*TABLE, *LOADS)]
    assert len(set(names)) == len(names)
    assert all(case.words for case in TABLE)


@pytest.mark.parametrize(
    ("make", "load"),
    [
        (attack("x.pth", "zip"), lambda: torch.load("x.pth", weights_only=False)),
        (attack("x.pth", "zip, protocol 4"), lambda: torch.load("x.pth", weights_only=False)),
        (attacking_program("x.pt"), lambda: torch.jit.load("x.pt")),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_the_attacks_would_work_on_a_careless_reader(make, load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path)
    assert not (tmp_path / "victim").exists()
    load()
    assert (tmp_path / "victim").exists()


def readable_for_all(path):
    return all(folder.stat().st_mode & 0o001 for folder in path.resolve().parents)


@pytest.mark.parametrize("case", TABLE[::PART], ids=lambda case: case.name)
def test_bad_input_is_told(case, shared, tmp_path):
    if case.as_nobody and os.geteuid() == 0 and not readable_for_all(Path(__file__)):
        pytest.skip("this clone lies in a folder that root alone may enter, so that nobody else can run its code")
    assert refusal_fault(case, run_case(case, shared, tmp_path / "case"), tmp_path / "case") == ""


@pytest.mark.parametrize("case", LOADS[::PART], ids=lambda case: case.name)
def test_odd_input_loads(case, shared, tmp_path):
    assert running_fault(case, run_case(case, shared, tmp_path / "case"), tmp_path / "case") == ""


def test_debug_shows_where(shared, tmp_path):
    case = Case("", argv=("--config_file", "tiny.yml", "--debug", "SOLVER.SEED", "-1"))
    ended = run_case(case, shared, tmp_path / "case")
    assert ended.code == 1 and "Traceback" in ended.err and "SOLVER.SEED = '-1'" in ended.err
