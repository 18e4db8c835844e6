import json
import logging
import resource
import signal
import subprocess
import sys
import threading
import warnings
from contextlib import contextmanager

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

from utils.errors import UserError
from utils.logging import MetricsWriter, read_metrics, setup_logging


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_console_and_file(tmp_path, capsys):
    setup_logging(tmp_path / "run")
    setup_logging(tmp_path / "run")  # a second call replaces the first
    logging.getLogger("engine.processor").info("Epoch[1] Iteration[10/54]")
    logging.getLogger("engine.processor").debug("too much detail")
    logging.getLogger("timm.models").info("a library's notice")
    logging.getLogger("timm.models").warning("a library's warning")
    logging.getLogger("timm.models").error("a library's error")
    warnings.warn("a python warning", stacklevel=1)
    out = capsys.readouterr().out
    log = (tmp_path / "run" / "train.log").read_text()
    assert out.count("INFO: Epoch[1] Iteration[10/54]\n") == 1
    assert log.count("engine.processor INFO: Epoch[1] Iteration[10/54]\n") == 1
    for text, on_console, in_file in [
        ("too much detail", False, False),
        ("a library's notice", False, False),
        ("a library's warning", False, True),
        ("a library's error", True, True),
        ("a python warning", False, True),
    ]:
        assert (text in out, text in log) == (on_console, in_file), text


def test_the_file_is_appended_to(tmp_path):
    for text in ("first", "second"):
        setup_logging(tmp_path)
        logging.getLogger("engine").info(text)
    assert [line.rsplit(": ")[1] for line in (tmp_path / "train.log").read_text().splitlines()] == ["first", "second"]


def test_what_is_told_before_there_is_a_folder_stands_in_its_file(tmp_path, capsys):
    setup_logging()
    logging.getLogger("data").info("of another run")
    setup_logging()
    logging.getLogger("engine.compile").info("early")
    logging.getLogger("timm.models").warning("a library's early warning")
    setup_logging(tmp_path)
    logging.getLogger("engine").info("late")
    setup_logging(tmp_path)
    told = [line.split(" ", 2)[2] for line in (tmp_path / "train.log").read_text().splitlines()]
    assert told == [
        "engine.compile INFO: early",
        "timm.models WARNING: a library's early warning",
        "engine INFO: late",
    ]
    assert capsys.readouterr().out.count("early") == 1


def test_lines_do_not_cut_through_a_bar(capsys):
    setup_logging()
    with tqdm(total=3, mininterval=0) as bar:
        bar.update()
        logging.getLogger("engine").info("a line")
        bar.update()
    captured = capsys.readouterr()
    assert captured.out.splitlines()[0].endswith("INFO: a line")
    assert any(piece.isspace() for piece in captured.err.split("\r"))  # the bar was wiped for the line


def test_an_unwritable_folder_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Choose another OUTPUT_DIR"):
        setup_logging(tmp_path / "file")


def test_metrics_go_to_both_places(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.scalars(10, 1, {"loss": torch.tensor(1.5), "acc": 0, "grad_norm/heads": float("nan"), "scale": float("inf")})
    writer.scalars(54, 1, {"mAP": 0.25}, kind="eval")
    assert lines(tmp_path / "metrics.jsonl") == [
        {"kind": "train", "step": 10, "epoch": 1, "loss": 1.5, "acc": 0.0, "grad_norm/heads": None, "scale": None},
        {"kind": "eval", "step": 54, "epoch": 1, "mAP": 0.25},
    ]
    writer.image("selection", torch.zeros(3, 8, 4, dtype=torch.uint8), 54, 3)
    writer.close()
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("train/loss")] == [(10, 1.5)]
    assert [(event.step, event.value) for event in board.Scalars("eval/mAP")] == [(54, 0.25)]
    assert [(image.step, image.height, image.width) for image in board.Images("selection")] == [(54, 8, 4)]
    with Image.open(tmp_path / "pictures" / "selection_epoch_003.png") as picture:
        assert picture.size == (4, 8)


def test_pictures_do_not_hold_up_the_run(tmp_path, monkeypatch):
    """While the first is being written, numbers and a second one come in; closing waits for both, in their order."""
    writer, gate, saved = MetricsWriter(tmp_path), threading.Event(), []
    save = writer._save_picture

    def slow(picture, path):
        assert gate.wait(10)
        save(picture, path)
        saved.append(path.name)

    monkeypatch.setattr(writer, "_save_picture", slow)
    for epoch in (1, 2):
        writer.image("selection", torch.full((3, 8, 4), epoch, dtype=torch.uint8), epoch, epoch)
    writer.scalars(3, 3, {"loss": 1.0})
    assert not saved and lines(tmp_path / "metrics.jsonl")
    gate.set()
    writer.close()
    assert saved == ["selection_epoch_001.png", "selection_epoch_002.png"]
    for epoch, name in enumerate(saved, 1):
        with Image.open(tmp_path / "pictures" / name) as picture:
            assert picture.getextrema() == ((epoch, epoch),) * 3
    images = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Images("selection")
    assert [image.step for image in images] == [1, 2]


def test_what_comes_later_does_not_hold_up_the_run_and_is_there_in_the_end(tmp_path, caplog):
    writer, gate, written = MetricsWriter(tmp_path), threading.Event(), []

    def slow(name, *, failed=False):
        assert gate.wait(10)
        if failed:
            raise OSError("no room")
        written.append(name)

    writer.later("a.json", slow, "first")
    writer.later("a.json", slow, "second", failed=True)
    writer.later("a.json", slow, "third")
    assert not written
    gate.set()
    writer.close()
    assert written == ["first", "third"] and caplog.text.count("a.json cannot be written (OSError: no room)") == 1


@pytest.mark.parametrize("end", ["", "sys.exit(3)", "raise KeyboardInterrupt", "raise RuntimeError"])
def test_a_process_that_ends_without_closing_has_its_pictures(tmp_path, end):
    script = "import sys, torch; from utils.logging import MetricsWriter; writer = MetricsWriter(sys.argv[1])\n"
    script += f"writer.image('selection', torch.zeros(3, 900, 900, dtype=torch.uint8), 1, 1)\n{end}\n"
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True)
    with Image.open(tmp_path / "pictures" / "selection_epoch_001.png") as picture:
        picture.load()


def test_a_resumed_run_appends_after_half_a_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1, "epoch": 1}\n{"kind": "tr')
    assert read_metrics(path) == [{"kind": "train", "step": 1, "epoch": 1}]
    writer = MetricsWriter(tmp_path, resume_step=2)
    writer.scalars(2, 1, {"loss": 1.0})
    writer.close()
    texts = path.read_text().splitlines()
    assert len(texts) == 2 and json.loads(texts[1]) == {"kind": "train", "step": 2, "epoch": 1, "loss": 1.0}


@contextmanager
def files_of_at_most(size):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)


def test_lines_that_found_no_room_come_later_and_whole(tmp_path, caplog):
    """A disk with room for half a line: nothing of it stays, and all lines are there once there is room again."""
    writer = MetricsWriter(tmp_path)
    writer.scalars(1, 1, {"loss": 1.0})
    path = tmp_path / "metrics.jsonl"
    with files_of_at_most(path.stat().st_size + 20):
        for step in (2, 3):
            writer.scalars(step, 1, {"loss": 1.0})
        assert [line["step"] for line in lines(path)] == [1]
    assert caplog.text.count("metrics.jsonl cannot be written") == 1
    writer.scalars(4, 1, {"loss": 1.0})
    assert [line["step"] for line in lines(path)] == [1, 2, 3, 4]
    writer.close()


def test_the_thread_of_tensorboard_fails_without_a_traceback(tmp_path, caplog, monkeypatch):
    shown = []
    monkeypatch.setattr(threading, "excepthook", lambda failure: shown.append(failure.exc_type))
    hook = threading.excepthook
    writer = MetricsWriter(tmp_path)
    with files_of_at_most(0):
        writer.scalars(1, 1, {"loss": 1.0})
        other = threading.Thread(target=lambda: 1 / 0)
        other.start()
        other.join()
        writer.close()  # waits for the thread
    assert caplog.text.count("TensorBoard cannot be written (OSError: [Errno 27] File too large)") == 1
    assert shown == [ZeroDivisionError] and threading.excepthook is hook


def test_what_cannot_be_written_is_told_once_and_survived(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").mkdir()
    (tmp_path / "tensorboard").write_text("")
    with caplog.at_level(logging.WARNING):
        writer = MetricsWriter(tmp_path)
        for step in range(5):
            writer.scalars(step, 1, {"loss": 1.0})
            writer.image("selection", torch.zeros(3, 8, 4, dtype=torch.uint8), step, 1)
        writer.close()
    messages = [record.getMessage() for record in caplog.records if "the run goes on" in record.getMessage()]
    assert len(messages) == 2  # the picture's file could be written
    assert "metrics.jsonl" in messages[0] + messages[1] and "TensorBoard" in messages[0] + messages[1]


def test_a_board_that_fails_later_is_given_up(tmp_path, caplog, monkeypatch):
    writer = MetricsWriter(tmp_path)

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(writer.board, "add_scalar", full)
    with caplog.at_level(logging.WARNING):
        writer.scalars(1, 1, {"a": 1.0, "b": 2.0})
        writer.scalars(2, 1, {"a": 1.0})
        writer.close()
    assert [record.getMessage() for record in caplog.records] == [
        "TensorBoard cannot be written (OSError: No space left on device); the run goes on"
    ]
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2]
