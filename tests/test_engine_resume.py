"""A run that goes on from a checkpoint is the run that never stopped."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reference import REFERENCE, reference_weight

import train_net
from engine import processor
from engine.background import CheckpointWriter
from engine.checkpoint import TrainState
from engine.interrupt import StopRequest
from utils.checkpoint import read_file
from utils.errors import Interrupted, UserError
from utils.logging import read_metrics

ROOT = Path(__file__).parent.parent
STOCHASTIC = ("MODEL.DROP_PATH", "0.3", "SOLVER.CHECKPOINT_PERIOD", "1", "SOLVER.EMA_DECAY", "0.9")


def train(config, *opts):
    train_net.main(str(config), [*STOCHASTIC, *opts])


def tensors(value, name=""):
    """Every tensor in a nested state, by path."""
    if torch.is_tensor(value):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return {k: t for key, child in items for k, t in tensors(child, f"{name}/{key}").items()}


def assert_same_state(a: Path, b: Path):
    one, two = read_file(a), read_file(b)
    assert one["best"] == two["best"] and one["global_step"] == two["global_step"]
    left, right = tensors(one), tensors(two)
    assert left.keys() == right.keys() and len(left) > 100
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different, f"differ: {different[:5]}"


@pytest.mark.parametrize("last_step", [1, 2])
def test_a_run_in_two_parts_tells_what_one_in_one_piece_tells(tiny_yaml, tmp_path, monkeypatch, last_step):
    """Stopped between the probe and the log line with it, and at the last step of the epoch, which has two."""
    monkeypatch.setattr(processor, "PROBE_STEP", 1)
    sparing, probe = [], processor.score_gradient_probe
    monkeypatch.setattr(processor, "score_gradient_probe", lambda *args: sparing.append(args[5]) or probe(*args))
    options = ("SOLVER.LOG_PERIOD", "2", "SOLVER.MAX_EPOCHS", "1", "SOLVER.WARMUP_ITERS", "0")

    def records(run):
        lines = [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        lines = [line for line in lines if line["kind"] not in ("diagnosis", "seconds")]
        return [(line["kind"], line["epoch"], line["kind"] == "probe" or line["step"]) for line in lines]

    train(tiny_yaml, *options, "OUTPUT_DIR", f"{tmp_path}/whole")
    asked = iter(range(1, 100))
    monkeypatch.setattr(StopRequest, "agreed", lambda stop: 15 if next(asked) == last_step else None)
    parts = tmp_path / "parts"
    with pytest.raises(Interrupted, match=f"Stopped after step {last_step} of epoch 1"):
        train(tiny_yaml, *options, "OUTPUT_DIR", str(parts))
    begun = []
    diagnosis = processor.Diagnosis
    monkeypatch.setattr(processor, "Diagnosis", lambda *args: begun.append(args[2]) or diagnosis(*args))
    train(tiny_yaml, *options, "OUTPUT_DIR", str(parts), "TEST.WEIGHT", f"{parts}/last.pth")
    assert begun == [last_step] and sparing == [True, True]  # a batch this small
    assert ("probe", 1, True) in records("whole") and sorted(records("parts")) == sorted(records("whole"))


def test_what_was_seen_before_an_error_is_told(tiny_yaml, tmp_path, monkeypatch):
    step = processor.TrainStep.__call__

    def breaks(self, batch, epoch, number):
        if number == 2:
            raise RuntimeError("the second step")
        return step(self, batch, epoch, number)

    monkeypatch.setattr(processor.TrainStep, "__call__", breaks)
    with pytest.raises(RuntimeError, match="the second step"):
        train(tiny_yaml, "SOLVER.LOG_PERIOD", "1", "OUTPUT_DIR", f"{tmp_path}/run")
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "train"] == [1]


def test_six_epochs_are_three_and_three(tiny_yaml, tmp_path):
    train(tiny_yaml, "SOLVER.MAX_EPOCHS", "6", "OUTPUT_DIR", f"{tmp_path}/whole")
    train(tiny_yaml, "SOLVER.MAX_EPOCHS", "6", "OUTPUT_DIR", f"{tmp_path}/parts")
    parts = tmp_path / "parts"
    torch.manual_seed(123)  # whatever came before must not matter
    torch.rand(7)
    # epochs 4 to 6 again, from the state after the third
    train(tiny_yaml, "SOLVER.MAX_EPOCHS", "6", "OUTPUT_DIR", str(parts), "TEST.WEIGHT", f"{parts}/DeMo_3.pth")
    assert_same_state(tmp_path / "whole" / "last.pth", parts / "last.pth")
    metrics = [json.loads((tmp_path / run / "metrics.json").read_text()) for run in ("whole", "parts")]
    assert metrics[0] == metrics[1]
    # nothing was lost: what came after the third epoch lies aside, and the log holds each epoch once
    assert {p.name for p in (parts / "superseded").glob("*.pth")} >= {"last.pth", "DeMo_4.pth", "DeMo_6.pth"}
    lines = [json.loads(line) for line in (parts / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines if line["kind"] == "eval"] == [0, 1, 2, 3, 4, 5, 6]


def test_training_does_not_wait_for_the_disk_with_what_only_goes_on_from(tiny_yaml, tmp_path, monkeypatch):
    """While the disk is busy, no epoch writes last.pth alone; numbered, best and final ones are written anyway."""
    opts = ["SOLVER.MAX_EPOCHS", "5", "SOLVER.CHECKPOINT_PERIOD", "2", "SOLVER.EVAL_PERIOD", "3"]
    save, saved = TrainState.save, []

    def note(state, writer, path, *also):
        saved.append((state.epoch, sorted(other.name for other in also)))
        save(state, writer, path, *also)

    monkeypatch.setattr(TrainState, "save", note)
    monkeypatch.setattr(processor, "_score", lambda metrics: metrics["epoch"] == 3)
    for busy in (False, True):
        monkeypatch.setattr(CheckpointWriter, "busy", busy)
        saved.clear()
        train(tiny_yaml, *opts, "OUTPUT_DIR", f"{tmp_path}/{busy}")
        kept = [(2, ["DeMo_2.pth"]), (3, ["DeMobest.pth"]), (4, ["DeMo_4.pth"]), (5, [])]
        assert saved == ([] if busy else [(1, [])]) + kept
    assert_same_state(tmp_path / "False" / "last.pth", tmp_path / "True" / "last.pth")


def test_sigterm_in_the_middle_of_an_epoch_and_on(tiny_yaml, tmp_path):
    """The real script, stopped by a signal: it saves after the step; the resumed run ends as the unbroken one."""
    opts = [*STOCHASTIC, "SOLVER.LOG_PERIOD", "1", "SOLVER.MAX_EPOCHS", "3", "SOLVER.IMS_PER_BATCH", "4"]
    train(tiny_yaml, *opts, "OUTPUT_DIR", f"{tmp_path}/whole")
    stopped = tmp_path / "stopped"
    command = [sys.executable, "train_net.py", "--config_file", str(tiny_yaml), *opts, "OUTPUT_DIR", str(stopped)]
    command += ["DATALOADER.NUM_WORKERS", "1"]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    ) as process:
        for line in process.stdout:
            if "Epoch[2] Iteration[1/" in line:
                os.killpg(process.pid, signal.SIGTERM)  # the whole group, workers too, as job schedulers do
                break
        rest = process.stdout.read()
    assert process.returncode == 128 + signal.SIGTERM
    assert f"TEST.WEIGHT {stopped / 'last.pth'}" in rest
    state = read_file(stopped / "last.pth")
    assert state["epoch"] == 1 and state["step"] > 0
    with pytest.raises(UserError, match="middle of epoch 2.*IMS_PER_BATCH: stored 4, now 8"):
        train(tiny_yaml, *opts[:-2], "OUTPUT_DIR", str(stopped), "TEST.WEIGHT", f"{stopped}/last.pth")
    train(tiny_yaml, *opts, "OUTPUT_DIR", str(stopped), "TEST.WEIGHT", f"{stopped}/last.pth")
    assert_same_state(tmp_path / "whole" / "last.pth", stopped / "last.pth")
    means = [
        {line["epoch"]: line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "epoch"}
        for run in (tmp_path / "whole", stopped)
    ]
    assert means[0] == means[1]  # also of the epoch that was cut in two


@pytest.fixture
def one_epoch(tiny_yaml, tmp_path):
    """A finished run of one epoch."""
    train(tiny_yaml, "SOLVER.MAX_EPOCHS", "1", "SOLVER.WARMUP_ITERS", "0", "OUTPUT_DIR", f"{tmp_path}/one")
    return tmp_path / "one"


def test_a_fresh_run_never_overwrites(tiny_yaml, one_epoch):
    before = (one_epoch / "last.pth").read_bytes()
    with pytest.raises(UserError, match="holds a run already.*TEST.WEIGHT.*remove the folder"):
        train(tiny_yaml, "OUTPUT_DIR", str(one_epoch))
    assert (one_epoch / "last.pth").read_bytes() == before


def test_nothing_left_to_train_moves_nothing(tiny_yaml, one_epoch, caplog):
    caplog.set_level("INFO")
    opts = ("SOLVER.MAX_EPOCHS", "1", "SOLVER.WARMUP_ITERS", "0", "OUTPUT_DIR", str(one_epoch))
    train(tiny_yaml, *opts, "TEST.WEIGHT", f"{one_epoch}/DeMobest.pth")
    assert "nothing left to train" in caplog.text
    assert (one_epoch / "last.pth").exists() and not (one_epoch / "superseded").exists()


def test_bare_weights_go_on_at_the_next_epoch(tiny_yaml, one_epoch, tmp_path, caplog):
    bare = tmp_path / "old" / "anything_7.pth"
    bare.parent.mkdir()
    torch.save({f"module.{k}": v for k, v in read_file(one_epoch / "last.pth")["model"].items()}, bare)
    caplog.set_level("INFO")
    train(tiny_yaml, "SOLVER.MAX_EPOCHS", "8", "OUTPUT_DIR", f"{tmp_path}/new", "TEST.WEIGHT", str(bare))
    assert "going on at epoch 8 with a fresh optimizer" in caplog.text
    assert read_file(tmp_path / "new" / "last.pth")["epoch"] == 8
    shutil.copy(bare, tmp_path / "best.pth")
    with pytest.raises(UserError, match="Rename it to best_<n>.pth"):
        train(tiny_yaml, "OUTPUT_DIR", f"{tmp_path}/new2", "TEST.WEIGHT", f"{tmp_path}/best.pth")


def test_a_checkpoint_of_the_fork_goes_on(tiny_yaml, tmp_path, caplog):
    """Its own key names, here with one block, the identities and cameras of the small data set."""
    shapes = {}
    for name in ("baseline_rgbnt201", "sdtps"):
        shapes |= json.loads((REFERENCE / f"{name}.keys.json").read_text())
    shapes = {k: v for k, v in shapes.items() if "resblocks" not in k or "resblocks.0." in k}
    shapes |= {k.replace("bottleneck", "bottleneck_sdtps"): v for k, v in shapes.items() if k.startswith("bottleneck.")}
    shapes |= {"classifier.weight": [6, 1536], "classifier_sdtps.weight": [6, 1536], "BACKBONE.cv_embed": [2, 1, 768]}
    fork = {key: reference_weight(key, tuple(shape)) for key, shape in shapes.items()}
    torch.save(fork, tmp_path / "DeMo_4.pth")
    config = tmp_path / "fork.yml"
    config.write_text(f"_BASE_: [{ROOT}/configs/RGBNT201/DeMo_SDTPS_fork.yml, {tiny_yaml}]")
    opts = ["MODEL.TRANSFORMER_TYPE", "ViT-B-16", "MODEL.DEPTH", "1", "SOLVER.IMS_PER_BATCH", "4"]
    opts += ["INPUT.SIZE_TRAIN", "[256, 128]", "INPUT.SIZE_TEST", "[256, 128]", "MODEL.SDTPS_WARMUP_EPOCHS", "0"]
    caplog.set_level("INFO")
    # 64 * 0.4 is 25.6: 25 tokens here and in the fork
    train_net.main(str(config), [*opts, "SOLVER.MAX_EPOCHS", "5", "TEST.WEIGHT", f"{tmp_path}/DeMo_4.pth"])
    assert "going on at epoch 5 with a fresh optimizer" in caplog.text
    assert read_file(tmp_path / "run" / "last.pth")["epoch"] == 5
    with pytest.raises(UserError, match=r"SDTPS_AGGR_RATIO 0.4 fits"):
        train_net.main(
            str(config),
            [
                *opts,
                "MODEL.SDTPS_AGGR_RATIO",
                "0.5",
                "OUTPUT_DIR",
                f"{tmp_path}/b",
                "TEST.WEIGHT",
                f"{tmp_path}/DeMo_4.pth",
            ],
        )


def test_an_edited_yaml_wins_and_is_listed(tiny_yaml, one_epoch, caplog):
    caplog.set_level("INFO")
    opts = ("SOLVER.MAX_EPOCHS", "2", "SOLVER.BASE_LR", "5e-4", "OUTPUT_DIR", str(one_epoch))
    train(tiny_yaml, *opts, "TEST.WEIGHT", f"{one_epoch}/last.pth")
    assert "SOLVER.BASE_LR: stored 0.001, now 0.0005" in caplog.text
    assert "SOLVER.MAX_EPOCHS: stored 1, now 2" in caplog.text
    state = read_file(one_epoch / "last.pth")
    assert state["epoch"] == 2 and state["scheduler"]["heads"]["initial_lr"] == 5e-4
    steps = {float(m["step"]) for m in state["optimizer"]["moments"].values()}
    assert steps == {float(state["global_step"])}  # the moments went on counting
    assert len(list(one_epoch.glob("config*.yml"))) == 2  # the old config is kept


def test_a_ratio_that_changes_a_shape_stops_with_both_values(tiny_yaml, one_epoch, tmp_path):
    opts = ("SOLVER.MAX_EPOCHS", "2", "MODEL.SDTPS_AGGR_RATIO", "0.9", "OUTPUT_DIR", f"{tmp_path}/two")
    with pytest.raises(UserError, match=r"(?s)fc2.weight \(1, 38\), wanted \(3, 38\).*stored 0.4, now 0.9.*REINIT"):
        train(tiny_yaml, *opts, "TEST.WEIGHT", f"{one_epoch}/last.pth")
    train(tiny_yaml, *opts, "TEST.WEIGHT", f"{one_epoch}/last.pth", "SOLVER.REINIT", "['sdtps']")
    one, two = (read_file(run / "last.pth")["optimizer"]["moments"] for run in (one_epoch, tmp_path / "two"))
    steps = [float(m["heads.ori.classifier.weight"]["step"]) for m in (one, two)]
    assert float(two["sdtps.aggregator.RGB.fc2.weight"]["step"]) == steps[1] - steps[0]  # moments anew, too


def test_a_refused_resume_leaves_the_folder_as_it_was(tiny_yaml, tmp_path):
    out = tmp_path / "run"
    train(tiny_yaml, "OUTPUT_DIR", str(out))
    before = {p: p.read_bytes() for p in out.rglob("*.*") if p.is_file()}
    with pytest.raises(UserError, match="fc2.weight"):
        train(tiny_yaml, "OUTPUT_DIR", str(out), "TEST.WEIGHT", f"{out}/DeMo_1.pth", "MODEL.SDTPS_AGGR_RATIO", "0.9")
    assert {p: p.read_bytes() for p in out.rglob("*.*") if p.is_file()} == before


def test_reinit_happens_once_and_names_a_part(tiny_yaml, one_epoch, tmp_path, caplog):
    caplog.set_level("INFO")
    opts = ("SOLVER.REINIT", "['classifier']", "OUTPUT_DIR", f"{tmp_path}/two")
    train(tiny_yaml, *opts, "SOLVER.MAX_EPOCHS", "2", "TEST.WEIGHT", f"{one_epoch}/last.pth")
    assert "started anew: 2 tensors of classifier" in caplog.text
    caplog.clear()
    train(tiny_yaml, *opts, "SOLVER.MAX_EPOCHS", "3", "TEST.WEIGHT", f"{tmp_path}/two/last.pth")
    assert "going on from" in caplog.text and "anew" not in caplog.text
    opts = ("SOLVER.REINIT", "['clasifier']", "OUTPUT_DIR", f"{tmp_path}/three")
    with pytest.raises(UserError, match="'clasifier'"):
        train(tiny_yaml, *opts, "TEST.WEIGHT", f"{one_epoch}/last.pth")


def test_the_best_checkpoint_comes_along(tiny_yaml, one_epoch, tmp_path):
    """DeMobest.pth lies in the folder of every run that has a best, also one that went on elsewhere."""
    opts = ("SOLVER.MAX_EPOCHS", "2", "SOLVER.EVAL_PERIOD", "1", "OUTPUT_DIR", f"{tmp_path}/two")
    train(tiny_yaml, *opts, "TEST.WEIGHT", f"{one_epoch}/last.pth")
    best = json.loads((tmp_path / "two" / "metrics.json").read_text())["best"]
    assert read_file(tmp_path / "two" / "DeMobest.pth")["epoch"] == best["epoch"]


def test_only_the_newest_numbered_checkpoints_are_kept(tiny_yaml, one_epoch, tmp_path):
    """Of this run: also those from before it was resumed; best, last and what others put there stay."""
    foreign = one_epoch / "DeMo_0.pth"
    foreign.write_bytes(b"another run's")
    opts = ("OUTPUT_DIR", str(one_epoch), "TEST.WEIGHT", f"{one_epoch}/last.pth")
    train(tiny_yaml, *opts, "SOLVER.MAX_EPOCHS", "3")
    assert {p.name for p in one_epoch.glob("DeMo_*.pth")} == {f"DeMo_{n}.pth" for n in range(4)}
    train(tiny_yaml, *opts, "SOLVER.MAX_EPOCHS", "4", "SOLVER.KEEP_CHECKPOINTS", "2")
    assert {p.name for p in one_epoch.glob("*.pth")} == {
        *("DeMo_0.pth", "DeMo_3.pth", "DeMo_4.pth", "DeMobest.pth", "last.pth")
    }
    assert [read_file(one_epoch / f"{name}.pth")["epoch"] for name in ("DeMo_3", "DeMo_4", "last")] == [3, 4, 4]
    # a run that goes on elsewhere leaves this folder alone
    opts = ("OUTPUT_DIR", f"{tmp_path}/two", "TEST.WEIGHT", f"{one_epoch}/last.pth", "SOLVER.KEEP_CHECKPOINTS", "1")
    train(tiny_yaml, *opts, "SOLVER.MAX_EPOCHS", "5")
    assert [p.name for p in (tmp_path / "two").glob("DeMo_*.pth")] == ["DeMo_5.pth"]
    assert len(list(one_epoch.glob("*.pth"))) == 5


def test_a_run_killed_between_the_names_of_a_checkpoint_is_made_whole(tiny_yaml, one_epoch):
    """last.pth is new, the numbered copy is missing and the best is still that of an earlier epoch."""
    opts = ("OUTPUT_DIR", str(one_epoch), "TEST.WEIGHT", f"{one_epoch}/last.pth", "SOLVER.EVAL_PERIOD", "1")
    shutil.copy(one_epoch / "DeMobest.pth", one_epoch / "old")
    train(tiny_yaml, *opts, "SOLVER.MAX_EPOCHS", "2")
    state = read_file(one_epoch / "last.pth")
    state["best"]["both"]["mAP"] = 100.1  # a second epoch better than any
    state["best"]["epoch"] = 2
    torch.save(state, one_epoch / "last.pth")
    (one_epoch / "DeMo_2.pth").unlink()
    shutil.move(one_epoch / "old", one_epoch / "DeMobest.pth")
    half_written = [one_epoch / f".{name}.tmp" for name in ("last.pth", "metrics.json", "config.yml")]
    for path in half_written:
        path.write_bytes(b"half")
    (one_epoch / ".other.tmp").write_text("not ours")
    train(tiny_yaml, *opts, "SOLVER.MAX_EPOCHS", "3")
    assert read_file(one_epoch / "DeMo_2.pth")["epoch"] == 2
    best = read_file(one_epoch / "DeMobest.pth")
    assert best["epoch"] == 2 and best["best"]["both"]["mAP"] == 100.1
    assert [p.name for p in one_epoch.glob(".*")] == [".other.tmp"]


def test_other_identities_stop(tiny_yaml, one_epoch, tmp_path):
    state = read_file(one_epoch / "last.pth")
    state["identities"][0] = 999
    torch.save(state, tmp_path / "other_1.pth")
    opts = ("SOLVER.MAX_EPOCHS", "2", "OUTPUT_DIR", f"{tmp_path}/two", "TEST.WEIGHT", f"{tmp_path}/other_1.pth")
    with pytest.raises(UserError, match="other identities"):
        train(tiny_yaml, *opts)
    train(tiny_yaml, *opts, "SOLVER.REINIT", "['classifier']")
