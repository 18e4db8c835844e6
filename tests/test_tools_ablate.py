"""The ablation tool: what it runs, what it refuses, what it reports. A stub stands in for the training."""

import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from conftest import write_rgbnt201

from configs import load_cfg
from tools.ablate import report, runner
from tools.ablate.__main__ import main, parse_args, study_of
from tools.ablate.provenance import conflicts, data_digest, stamp
from tools.ablate.results import collect, costs
from tools.ablate.study import make_study, read_study
from utils.errors import UserError

ROOT = Path(__file__).parent.parent
DRAW = report.draw
STUB = ["python", str(ROOT / "tests" / "stub_train.py")]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """No pictures but where they are looked at, and no waiting between two looks at a process."""
    monkeypatch.setattr(report, "draw", lambda findings, folder: [])
    monkeypatch.setattr(runner, "POLL", 0.02)


@pytest.fixture
def study_file(tmp_path, tiny_yaml):
    """`study_file(field=value, …)` writes a study of `none` and `full`, two seeds each, run by the stub."""

    def write(**fields):
        study = {
            "config": str(tiny_yaml),
            "out": str(tmp_path / "study"),
            "options": {"MODEL.SDTPS_LOSS_WEIGHT": 1},
            "variants": {"none": {"MODEL.USE_SDTPS": False}, "full": {"MODEL.SDTPS_LOSS_WEIGHT": 1.2}},
            "seeds": [1, 2],
            "command": STUB,
        }
        path = tmp_path / "study.yml"
        path.write_text(yaml.safe_dump(study | fields, sort_keys=False))
        return path

    return write


def ablate(path, *words):
    main(parse_args([str(path), *words]))


def calls(tmp_path, run):
    path = tmp_path / "study" / run / "calls.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# What is run


def test_runs_once_and_reports(study_file, tmp_path):
    path = study_file()
    ablate(path)
    ablate(path)  # nothing is left to run
    runs = [f"{variant}/seed_{seed}" for variant in ("none", "full") for seed in (1, 2)]
    assert [len(calls(tmp_path, run)) for run in runs] == [1, 1, 1, 1]
    for run in runs:
        folder = tmp_path / "study" / run
        assert "the stub begins" in (folder / "process.log").read_text()
        start = json.loads((folder / "provenance.json").read_text())["starts"][-1]
        assert start["device"] == "a stub (float32)" and start["torch"] and start["sources"]["modeling/sdtps.py"]
        assert f"SEED: {run[-1]}\n" in (folder / "config.yml").read_text()
    ablate(path, "--seeds", "3", "--only", "full")
    assert len(calls(tmp_path, "full/seed_3")) == 1 and not calls(tmp_path, "none/seed_3")


def test_figures_of_the_report(study_file, tmp_path, monkeypatch):
    """ori 61 and 62 without SDTPS; with it 63 and 64, both 68 and 69: each difference is the same by either seed."""
    monkeypatch.setattr(report, "draw", DRAW)
    ablate(study_file(compare=[["full/both", "full/ori"]]))
    folder = tmp_path / "study" / "report"
    findings = json.loads((folder / "report.json").read_text())
    of = {(row["variant"], row["branch"], row["when"], row["metric"]): row for row in findings["summary"]}
    row = of["none", "ori", "last", "mAP"]
    half = 12.706204736 * 0.5**0.5 / 2**0.5
    assert (row["n"], row["mean"], row["std"]) == (2, 61.5, pytest.approx(0.5**0.5))
    assert (row["low"], row["high"]) == (pytest.approx(61.5 - half, abs=1e-6), pytest.approx(61.5 + half, abs=1e-6))
    assert of["none", "ori", "best", "R1"]["mean"] == 63.5
    assert of["full", "both", "last", "R1"]["mean"] == 70.5
    pairs = {
        (row["variant"], row["branch"], row["reference"], row["reference_branch"]): row["mean"]
        for row in findings["differences"]
        if (row["when"], row["metric"]) == ("last", "mAP")
    }
    assert pairs == {
        ("full", "ori", "none", "ori"): 2,
        ("full", "sdtps", "none", "ori"): -1,
        ("full", "both", "none", "ori"): 7,
        ("full", "both", "full", "ori"): 5,
    }
    assert all(row["seeds"] == [1, 2] for row in findings["differences"])
    rows = list(csv.DictReader((folder / "runs.csv").open()))
    assert len(rows) == 2 * 1 + 2 * 3  # a row for each run and branch
    both = next(row for row in rows if (row["variant"], row["seed"], row["branch"]) == ("full", "2", "both"))
    assert (float(both["last_mAP"]), float(both["best_R1"]), both["last_epoch"], both["best_epoch"]) == (
        69,
        72,
        "2",
        "1",
    )
    # 3 steps of 8 samples at 100 a second, 3 at 200
    assert float(both["train_seconds"]) == pytest.approx(0.24 + 0.12)
    assert float(both["samples_per_second"]) == pytest.approx(48 / 0.36)
    assert float(both["peak_memory_gib"]) == 4
    text = (folder / "report.md").read_text()
    assert "| full `both` | none `ori` | 2 | **+7.00 ± 0.00 [+7.00, +7.00]** |" in text
    assert "| none | `ori` | 2 | 61.50 ± 0.71 [55.15, 67.85] |" in text
    for name in ("dots", "differences", "curves_mAP", "curves_loss"):
        assert (folder / f"{name}.png").stat().st_size > 8_000 and f"({name}.png)" in text


def test_hparams_show_the_same_runs(study_file, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    ablate(study_file())
    folder = tmp_path / "study" / "report" / "hparams" / "full" / "seed_2"
    board = EventAccumulator(str(folder)).Reload()
    content = board.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    told = HParamsPluginData.FromString(content).session_start_info.hparams
    assert told["variant"].string_value == "full" and told["seed"].number_value == 2
    assert told["MODEL.SDTPS_LOSS_WEIGHT"].number_value == pytest.approx(1.2)
    assert told["MODEL.USE_SDTPS"].string_value == "True" and "SOLVER.SEED" not in told
    assert board.Scalars("last/both/mAP")[0].value == 69
    assert [(e.step, e.value) for e in board.Scalars("epoch/both/mAP")] == [(1, 69), (2, 69)]
    assert len(list((tmp_path / "study" / "report" / "hparams").glob("*/seed_*"))) == 4


def test_processes_share_gpus(study_file, tmp_path):
    """Four slow runs at once on two GPUs, two on each; a signal ends them all."""
    path = study_file(options={"MODEL.NAME": "slow"})
    command = [sys.executable, "-m", "tools.ablate", str(path), "--gpus", "5,7", "--jobs", "4"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        runs = [f"{variant}/seed_{seed}" for variant in ("none", "full") for seed in (1, 2)]
        deadline = time.monotonic() + 60
        while not all((tmp_path / "study" / run / "metrics.jsonl").exists() for run in runs):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.1)
        assert sorted(calls(tmp_path, run)[0]["gpu"] for run in runs) == ["5", "5", "7", "7"]
        with pytest.raises(UserError, match="another process is at work"):  # a second command beside the first
            ablate(path, "--only", "full", "--seeds", "1")
        process.send_signal(signal.SIGTERM)
        told = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGTERM and "The same command goes on" in told
    assert all((tmp_path / "study" / run / "last.pth").exists() for run in runs)

    ablate(path, "--jobs", "2")
    for run in runs:
        assert [call["weight"] for call in calls(tmp_path, run)] == ["", str(tmp_path / "study" / run / "last.pth")]
        assert len(json.loads((tmp_path / "study" / run / "provenance.json").read_text())["starts"]) == 2
    assert "several at a time" in (tmp_path / "study" / "report" / "report.md").read_text()


def test_a_failing_run_is_told_and_the_others_go_on(study_file, tmp_path):
    variants = {"bad": {"MODEL.NAME": "fails"}, "good": {}}
    with pytest.raises(UserError, match=r"2 runs failed.*\nbad/seed_1: ended with code 1(.*\n)*.*as it was told"):
        ablate(study_file(variants=variants, base="good"))
    assert len(calls(tmp_path, "good/seed_2")) == 1
    assert "2 runs are not finished: bad/seed_1, bad/seed_2" in (tmp_path / "study/report/report.md").read_text()
    ablate(study_file(variants=variants | {"bad": {"MODEL.DROP_PATH": 0.3}}, base="good"))  # mended
    assert len(calls(tmp_path, "bad/seed_1")) == 2 and len(calls(tmp_path, "good/seed_1")) == 1


def test_a_run_without_its_results_has_failed(study_file, tmp_path):
    empty = tmp_path / "empty.py"
    empty.write_text("print('did nothing')\n")
    with pytest.raises(UserError, match="ended without results of epoch 2"):
        ablate(study_file(command=["python", str(empty)]))


def test_checkpoints_go_if_so_wished(study_file, tmp_path):
    path = study_file(checkpoints=False)
    ablate(path)
    ablate(path)
    assert not list((tmp_path / "study").rglob("*.pth")) and len(calls(tmp_path, "full/seed_1")) == 1


def test_prepare_makes_what_is_missing_once(study_file, tmp_path):
    made, script = tmp_path / "made.txt", tmp_path / "make.py"
    script.write_text("import sys; open(sys.argv[1], 'a').write(' '.join(sys.argv[2:]) + '|')\n")
    make = ["python", str(script)]
    step = {"makes": str(made), "run": [[*make, str(made), "first"], [*make, str(made), "$HOME", "second"]]}
    path = study_file(prepare=[step])
    ablate(path)
    ablate(path)
    assert made.read_text() == "first|$HOME second|"  # no shell
    made.unlink()
    checkpoint = tmp_path / "half.pth"
    checkpoint.touch()
    ablate(study_file(prepare=[step | {"resume": str(checkpoint)}]))
    assert made.read_text() == f"first TEST.WEIGHT {checkpoint}|$HOME second|"
    with pytest.raises(UserError, match="other.txt is still missing"):
        ablate(study_file(prepare=[step | {"makes": str(tmp_path / "other.txt")}]))
    script.write_text("raise SystemExit('no space')\n")
    with pytest.raises(UserError, match=r"ended with code 1(.*\n)*.*no space"):
        ablate(study_file(prepare=[step | {"makes": str(tmp_path / "other.txt")}]))


# Distinct variants cannot print one another's results


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Where the first test that needs a finished study leaves a copy of it."""
    return tmp_path_factory.mktemp("stored") / "study"


@pytest.fixture
def finished(study_file, tmp_path, stored):
    """A finished study: its file and its folder."""
    path, out = study_file(), tmp_path / "study"
    if stored.exists():
        shutil.copytree(stored, out)
    else:
        ablate(path)
        shutil.copytree(out, stored)
    return path, out


def swap(a, b):
    a.rename(a.with_name("aside"))
    b.rename(a)
    a.with_name("aside").rename(b)


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["config.yml"], "not the config that provenance.json tells of"),
        (["metrics.json"], "metrics.json is not what the run wrote"),
        (["provenance.json"], "not the config that provenance.json tells of"),
        (["config.yml", "provenance.json"], "MODEL.USE_SDTPS: .* and "),
        (["config.yml", "provenance.json", "metrics.json", "metrics.jsonl"], "not made by variant"),
        (["."], "not made by variant"),
    ],
)
def test_swapped_results_are_refused(finished, names, told):
    path, out = finished
    for name in names:
        swap(out / "none" / "seed_1" / name, out / "full" / "seed_1" / name) if name != "." else swap(
            out / "none" / "seed_1", out / "full" / "seed_1"
        )
    for words in ([], ["--report"]):
        with pytest.raises(UserError, match=told):
            ablate(path, *words)


def test_tampered_results_are_refused(finished):
    path, out = finished
    for seeds in (("seed_1", "seed_2"), ("seed_2", "seed_1")):  # another seed's results, copied
        copy = out.parent / "copy"
        shutil.copytree(out / "full", copy)
        shutil.rmtree(out / "full" / seeds[0])
        shutil.copytree(copy / seeds[1], out / "full" / seeds[0])
        with pytest.raises(UserError, match="SOLVER.SEED: "):
            ablate(path, "--report")
        shutil.rmtree(out / "full")
        copy.rename(out / "full")
    metrics = out / "full" / "seed_1" / "metrics.json"
    content = json.loads(metrics.read_text())
    metrics.write_text(json.dumps(content | {"test": {"results": {}}}))  # test_net.py adds its own
    ablate(path, "--report")
    content["last"]["both"]["mAP"] += 1
    metrics.write_text(json.dumps(content))
    with pytest.raises(UserError, match="metrics.json is not what the run wrote"):
        ablate(path, "--report")


def test_an_edited_variant_does_not_take_the_old_results(finished, study_file, tiny_yaml):
    assert finished
    for change in ({"variants": {"none": {"MODEL.USE_SDTPS": False}, "full": {}}}, {"options": {"MODEL.HEAD": 8}}):
        with pytest.raises(UserError, match=r"not made by variant.*(SDTPS_LOSS_WEIGHT|HEAD).*Move"):
            ablate(study_file(**change))
    tiny_yaml.write_text(tiny_yaml.read_text().replace("BASE_LR: 1.0e-3", "BASE_LR: 2.0e-3"))
    with pytest.raises(UserError, match=r"SOLVER.BASE_LR: 0.002 and 0.001"):
        ablate(study_file(), "--report")


def test_runs_of_unknown_origin_are_refused(finished):
    path, out = finished
    (out / "full" / "seed_1" / "provenance.json").unlink()
    with pytest.raises(UserError, match="that this study did not start"):
        ablate(path)


def test_variants_without_an_effect_are_told(study_file, tmp_path):
    ablate(study_file(variants={"a": {}, "b": {"MODEL.HEAD": 8}}))
    assert "a/seed_1 and b/seed_1 gave the very same figures" in (tmp_path / "study/report/report.md").read_text()


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"variants": {"a": {}, "b": {}}}, "one and the same config: a and b"),
        ({"variants": {"a": {}, "b": {"MODEL.SDTPS_LOSS_WEIGHT": 1.0}}}, "one and the same config: a and b"),
        ({"variants": {"a": {"SOLVER.SEED": 3}}}, "a: SOLVER.SEED is set by the study"),
        ({"options": {"OUTPUT_DIR": "x"}}, "options: OUTPUT_DIR is set by the study"),
        ({"variants": {"a/b": {}}}, "a folder is called so"),
        ({"variants": {"report": {}}}, "a folder is called so"),
        ({"variants": {"a": {"MODEL": {"HDM": True}}}}, "write the keys with dots"),
        ({"variants": {"a": {"MODEL.SDTPS_BETTA": 1}}}, "did you mean MODEL.SDTPS_BETA"),
        ({"base": "other"}, "base 'other' is none of the variants"),
        ({"compare": [["full", "other"]]}, "compare 'other': no such variant"),
        ({"compare": [["full"]]}, "expected pairs"),
        ({"seeds": [1, 1]}, "one is named twice"),
        ({"seeds": ["one"]}, "expected whole numbers"),
        ({"seeds": []}, "lacks seeds"),
        ({"only": ["other"]}, "no such variants: other"),
        ({"sedes": [1]}, "unknown field 'sedes'"),
        ({"prepare": [{"run": "rm x"}]}, "expected 'makes: PATH'"),
    ],
)
def test_studies_that_cannot_be_run(study_file, fields, told):
    with pytest.raises(UserError, match=told):
        read_study(study_file(**fields)).runs()


def test_a_variant_named_twice_is_not_lost(study_file):
    path = study_file()
    path.write_text(path.read_text().replace("  full:", "  none:"))
    with pytest.raises(UserError, match="none stands twice"):
        read_study(path)


# Code and data


def test_other_code_is_refused(finished, study_file):
    path, out = finished
    file = out / "full" / "seed_2" / "provenance.json"
    provenance = json.loads(file.read_text())
    provenance["starts"][0]["sources"]["modeling/sdtps.py"] = "0" * 16
    provenance["starts"][0]["commit"] = "abcdef0123"
    file.write_text(json.dumps(provenance))
    told = r"modeling/sdtps.py differ between none/seed_1 \(.*\) and full/seed_2 \(commit abcdef0.*\n.*--allow-mixed"
    for words in (["--report"], ["--seeds", "3"]):
        with pytest.raises(UserError, match=told):
            ablate(path, *words)
    assert not (out / "full" / "seed_3" / "calls.jsonl").exists()
    ablate(path, "--seeds", "3", "--allow-mixed")
    text = (out / "report" / "report.md").read_text()
    assert "> **MIXED RESULTS, THE DIFFERENCES BELOW MAY COME FROM THIS: code: modeling/sdtps.py differ" in text


def test_code_that_changes_while_a_study_runs(study_file, tmp_path, monkeypatch):
    """The third run would be of other code: it is not started."""
    stamps = []

    def changing(cfg):
        stamps.append(stamp(cfg))
        return stamps[-1] | {"sources": {"train_net.py": "old" if len(stamps) < 3 else "new"}}

    monkeypatch.setattr(runner, "stamp", changing)
    with pytest.raises(UserError, match=r"different code or data(.*\n)*.*train_net.py differ"):
        ablate(study_file())
    assert [len(calls(tmp_path, f"{v}/seed_{s}")) for s in (1, 2) for v in ("none", "full")] == [1, 1, 0, 0]


def test_other_data_is_refused(study_file, tmp_path, tiny_yaml):
    data = write_rgbnt201(tmp_path / "data", identities=2, frames=2, test_identities=1)
    path = study_file(options={"DATASETS.ROOT_DIR": str(data)})
    ablate(path)
    cfg = load_cfg(tiny_yaml, ["DATASETS.ROOT_DIR", str(data)])
    before = data_digest(cfg)
    assert before["files"] == 18
    copy = shutil.copytree(data, tmp_path / "copy")
    assert data_digest(load_cfg(tiny_yaml, ["DATASETS.ROOT_DIR", str(copy)])) == before  # wherever it lies
    image = next(data.rglob("*.jpg"))
    content = bytearray(image.read_bytes())
    content[-3] ^= 1  # the same size
    image.write_bytes(content)
    assert data_digest(cfg)["bytes"] == before["bytes"] and data_digest(cfg) != before
    with pytest.raises(UserError, match="data: none/seed_1 had 18 files"):
        ablate(path, "--seeds", "3")
    ablate(path, "--report")  # what is there fits together
    shutil.rmtree(data)
    with pytest.raises(UserError, match="there is no data"):
        ablate(path, "--seeds", "3")


def test_conflicts_of_weights_are_those_of_one_path():
    def made(weights, **changes):
        shared = {"sources": {"a.py": "1"}, "data": {"files": 1, "bytes": 1, "digest": "d"}}
        return shared | {"commit": "c", "dirty": False, "weights": weights} | changes

    assert conflicts([("a", made({"x": "1"})), ("b", made({})), ("c", made({"y": "2"})), ("d", made({"x": "1"}))]) == []
    assert (
        "weights: x was another file in a than in b" in conflicts([("a", made({"x": "1"})), ("b", made({"x": "2"}))])[0]
    )
    assert "a.py, b.py differ" in conflicts([("a", made({})), ("b", made({}, sources={"b.py": "1"}))])[0]


# Studies


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "studies").glob("*.yml")), ids=lambda path: path.stem)
def test_shipped_studies_are_distinct_and_complete(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    study = read_study(path)
    runs = study.runs()
    assert len(runs) == len(study.variants) * len(study.seeds)
    assert str(study.out) == f"runs/studies/{path.stem}"
    without = [name for name, cfg in study.configs().items() if not cfg.MODEL.USE_SDTPS]
    if path.stem == "fast_path":  # asks about speed, not about SDTPS
        assert (study.base, list(study.variants), without) == ("plain", ["plain", "fast"], [])
    else:
        assert study.base == "none" and without in (["none"], ["none", "moe"])


def test_a_study_builds_on_another(study_file, tmp_path):
    base = study_file(compare=[["full", "none"], ["full/both", "full/ori"]])
    path = tmp_path / "more.yml"
    path.write_text(
        f"_BASE_: {base.name}\nout: elsewhere\noptions: {{MODEL.HEAD: 8}}\n"
        "variants: {heavy: {MODEL.SDTPS_LOSS_WEIGHT: 3}}\nonly: [heavy, full]\nbase: full\n"
    )
    study = read_study(path)
    assert list(study.variants) == ["heavy", "full"] and study.compare == (("full/both", "full/ori"),)
    assert study.options == {"MODEL.SDTPS_LOSS_WEIGHT": 1, "MODEL.HEAD": 8} and str(study.out) == "elsewhere"
    assert [run.name for run in study.runs([4, 5])] == ["heavy/seed_4", "full/seed_4", "heavy/seed_5", "full/seed_5"]
    base.write_text(f"_BASE_: {path.name}\n")
    with pytest.raises(UserError, match="in a circle"):
        read_study(path)


def test_a_study_on_the_command_line(tiny_yaml, tmp_path):
    words = ["--config_file", str(tiny_yaml), "--out", str(tmp_path / "x"), "--seeds", "1", "2", "--options"]
    words += ["MODEL.HEAD", "8", "--variant", "low", "--variant", "high", "MODEL.SDTPS_BETA", "0.4"]
    study = study_of(parse_args(words))
    assert [run.name for run in study.runs()] == ["low/seed_1", "high/seed_1", "low/seed_2", "high/seed_2"]
    cfg = study.runs()[1].cfg
    assert (cfg.MODEL.SDTPS_BETA, cfg.MODEL.HEAD, cfg.SOLVER.SEED, study.base) == (0.4, 8, 1, "low")
    for bad, told in ((["--variant", "low"], "given twice"), (["--variant", "x", "MODEL.HEAD"], "odd in number")):
        with pytest.raises(UserError, match=told):
            study_of(parse_args([*words, *bad]))
    with pytest.raises(UserError, match="lacks config, out, variants, seeds"):
        study_of(parse_args([]))


def test_branches_that_a_reference_lacks(study_file):
    path = study_file(compare=[["full/moe", "none"]])
    with pytest.raises(UserError, match="full has no branch 'moe', only ori, sdtps, both"):
        ablate(path)


def test_costs_of_a_run_that_repeated_steps():
    lines = {2: {"samples_per_second": 10.0}, 5: {"samples_per_second": 30.0, "peak_memory_gib": 1.5}}
    assert costs(lines, 20) == {
        "train_seconds": 2 * 20 / 10 + 3 * 20 / 30,
        "samples_per_second": pytest.approx(100 / 6),
        "peak_memory_gib": 1.5,
    }
    assert costs({}, 20) == {"train_seconds": None, "samples_per_second": None, "peak_memory_gib": None}


def test_with_the_real_training(tiny_yaml, tmp_path, monkeypatch):
    """One epoch of train_net.py: the tool reads what the product writes."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(ROOT)
    options = {"SOLVER.MAX_EPOCHS": 1, "SOLVER.WARMUP_ITERS": 0}
    fields = {"config": str(tiny_yaml), "out": str(tmp_path / "real"), "seeds": [3], "variants": {"full": {}}}
    path = tmp_path / "real.yml"
    path.write_text(yaml.safe_dump(fields | {"options": options}))
    ablate(path)
    study = make_study(fields | {"options": options})
    (result,) = collect(study).results
    assert result.branches == ["ori", "sdtps", "both"] and result.run.seed == 3
    assert result.cost["samples_per_second"] > 0 and result.provenance["starts"][0]["device"].startswith("cpu")
    with pytest.raises(UserError, match="no run of this study is finished"):
        collect(replace(study, out=tmp_path / "nothing"))
