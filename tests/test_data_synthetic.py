"""The sample data generator: layout, determinism, and what does and does not tell people apart."""

import hashlib
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.synthetic import SETS, CameraSplit, Preset, generate, writer
from data.synthetic import __main__ as command
from data.synthetic.person import HEIGHT, WIDTH
from data.synthetic.plan import plan
from data.synthetic.sets import differences
from utils.cli import run
from utils.errors import UserError
from utils.modalities import MODALITIES

ROOT = Path(__file__).parent.parent
PEOPLE = SETS["RGBNT201"]
TINY = Preset(
    "tiny", {"train_171": CameraSplit({(1, 2): 2}, {(1, 2): 8}), "test": CameraSplit({(1, 2): 2}, {(1, 2): 8})}
)


def files(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return generate(tmp_path_factory.mktemp("tiny"), TINY, seed=5, workers=1, masks=True)


def test_full_preset_has_the_counts_of_rgbnt201():
    shots = plan(PEOPLE.presets["full"], PEOPLE.source(0))
    train = [shot for shot in shots if shot.split == "train_171"]
    test = [shot for shot in shots if shot.split == "test"]
    cameras = {pid: {s.camera for s in train if s.pid == pid} for pid in {s.pid for s in train}}
    assert (len(train), len(cameras)) == (3951, 171)
    assert sum(len(seen) == 1 for seen in cameras.values()) == 120
    assert {s.camera for s in train} == {1, 2, 3, 4}
    assert sum(s.camera in (3, 4) for s in train) == 217
    assert (len(test), len({s.pid for s in test})) == (836, 30)
    assert all({s.camera for s in test if s.pid == pid} == {1, 2} for pid in {s.pid for s in test})
    assert not {s.pid for s in train} & {s.pid for s in test}
    assert min(Counter(s.pid for s in train).values()) >= 8
    assert len({file for s in shots for file in PEOPLE.layout(s)}) == 4 * len(shots)


def test_mini_preset_suits_identity_sampling():
    shots = plan(PEOPLE.presets["mini"], PEOPLE.source(0))
    train = Counter(shot.pid for shot in shots if shot.split == "train_171")
    assert (len(train), train.total()) == (40, 480)
    assert min(train.values()) >= 8
    assert Counter(shot.split for shot in shots)["test"] == 192


def test_people_are_frozen():
    """Models were trained on them: their traits, the names of all files, and every fourth pixel of some."""
    shots = plan(PEOPLE.presets["mini"], PEOPLE.source(0))
    names = [next(iter(PEOPLE.layout(shot))).replace("/RGB/", "/").removesuffix(".jpg") for shot in shots]
    assert hashlib.sha256("\n".join(names).encode()).hexdigest().startswith("b62a92130e9c844b")
    people = [p for split in ("train_171", "test") for p in PEOPLE.identities(0, PEOPLE.presets["full"], split)]
    assert hashlib.sha256(repr([p.traits for p in people]).encode()).hexdigest().startswith("13edf6b0badeaf12")
    with np.load(Path(__file__).parent / "data" / "synthetic" / "people.npz") as pinned:
        for name, expected in pinned.items():
            shot = shots[names.index(name)]
            person = PEOPLE.identities(0, PEOPLE.presets["mini"], shot.split)[shot.number]
            images, _ = PEOPLE.render(PEOPLE.source(0), shot, person)
            found = np.dstack([images["RGB"], images["NI"][..., :1], images["TI"][..., :1]])[2::4, 2::4]
            changed = np.abs(found.astype(int) - expected) > 1  # rounding may differ between versions of numpy
            assert changed.mean() < 0.002, name


def test_layout_and_image_format(tiny):
    root = tiny / "RGBNT201"
    for split in ("train_171", "test"):
        stems = [{path.name for path in (root / split / modality).glob("*.jpg")} for modality in MODALITIES]
        assert len(stems[0]) == 8 and stems[0] == stems[1] == stems[2]
        assert {path.stem for path in (root / split / "MASK").glob("*.png")} == {name[:-4] for name in stems[0]}
    with Image.open(root / "test" / "TI" / "000003_cam2_1_1.jpg") as image:
        assert (image.size, image.mode, image.format) == ((128, 256), "RGB", "JPEG")
    description = json.loads((root / "sample_data.json").read_text())
    assert description["generator_version"] == 1
    assert (description["seed"], description["preset"]) == (5, "tiny")
    assert description["counts"]["train_171"] == {"identities": 2, "triples": 8}


def test_bytes_do_not_depend_on_the_number_of_workers(tiny, tmp_path):
    assert files(generate(tmp_path, TINY, seed=5, workers=2, masks=True)) == files(tiny)


def test_another_seed_gives_other_people_and_other_streets():
    shot = plan(TINY, PEOPLE.source(5))[0]
    people = [PEOPLE.identities(seed, TINY, "train_171")[0] for seed in (5, 6)]
    assert people[0].traits != people[1].traits
    one, other = (PEOPLE.render(PEOPLE.source(seed), shot, people[0])[0]["RGB"].astype(float) for seed in (5, 6))
    assert np.abs(one - other).mean() > 10


def test_a_longer_list_of_identities_starts_with_the_shorter_one():
    assert PEOPLE.identities(3, PEOPLE.presets["full"], "test")[:2] == PEOPLE.identities(3, TINY, "test")


@pytest.mark.parametrize("seed", [0, 1])
def test_every_two_identities_differ_in_several_visible_traits(seed):
    people = PEOPLE.identities(seed, PEOPLE.presets["full"], "test")
    assert min(differences(a, b) for a, b in combinations(people, 2)) >= 4


def test_background_tells_the_camera_and_not_the_person():
    """Outside the person, pictures of one camera are alike whoever walks there; inside it, clothes add a difference."""
    preset = Preset("grid", {"train_171": CameraSplit({(1, 2): 6}, {(1, 2): 24})})
    shots = plan(preset, PEOPLE.source(2))
    people = PEOPLE.identities(2, preset, "train_171")
    descriptors = []
    for shot in shots:
        images, _ = PEOPLE.render(PEOPLE.source(2), shot, people[shot.number])
        corner = np.concatenate([images[m][:, :20].reshape(8, 32, 20, 3).mean((1, 2, 3)) for m in MODALITIES])
        descriptors.append(corner / 255)
    descriptors = np.array(descriptors)
    cameras, pids = (np.array([getattr(s, name) for s in shots]) for name in ("camera", "pid"))

    def explained(labels):
        """Share of the descriptors' variance that lies between the groups of equal label."""
        centre = descriptors.mean(0)
        between = sum(
            ((descriptors[labels == k].mean(0) - centre) ** 2).sum() * (labels == k).sum() for k in set(labels)
        )
        return between / ((descriptors - centre) ** 2).sum()

    rng = np.random.default_rng(0)
    by_chance = np.mean([explained(rng.permutation(pids)) for _ in range(50)])
    assert explained(cameras) > 0.12
    assert explained(pids) < by_chance + 0.08


def test_masks_cover_the_person(tiny):
    root = tiny / "RGBNT201"
    warmer, shares = [], []
    for path in sorted(root.rglob("MASK/*.png")):
        mask = np.asarray(Image.open(path))
        assert mask.shape == (HEIGHT, WIDTH) and set(np.unique(mask)) <= {0, 255}
        heat = np.asarray(Image.open(path.parent.parent / "TI" / f"{path.stem}.jpg").convert("L"), float)
        shares.append((mask > 0).mean())
        warmer.append(heat[mask > 0].mean() - heat[mask == 0].mean())
    assert min(shares) > 0.1 and max(shares) < 0.6
    assert min(warmer) > 10


def test_some_clothes_differ_in_one_modality_only():
    """Accent and hidden cloth: over a population there are differences confined to RGB, to NI and to TI."""
    confined = Counter()
    for person in PEOPLE.identities(0, PEOPLE.presets["full"], "test"):
        for slot in ("top", "bottom", "bag"):
            base, *others = np.array(person.garments[slot].materials)
            for other in others:
                changed = np.abs(other - base) > 1e-6
                seen = (changed[:3].any(), changed[3], changed[4])
                confined[tuple(map(bool, seen))] += 1
    for only in [(True, False, False), (False, True, False), (False, False, True)]:
        assert confined[only] >= 2


def test_near_infrared_and_thermal_are_grey(tiny):
    for modality in ("NI", "TI"):
        image = np.asarray(Image.open(next((tiny / "RGBNT201" / "test" / modality).glob("*.jpg"))), int)
        assert np.ptp(image, axis=2).max() <= 4


def test_a_complete_set_is_left_alone(tiny, caplog):
    before = files(tiny)
    stamp = (tiny / "RGBNT201" / "sample_data.json").stat().st_mtime_ns
    with caplog.at_level("INFO"):
        generate(tiny, TINY, seed=5, workers=1, masks=True)
    assert "nothing to do" in caplog.text
    assert files(tiny) == before and (tiny / "RGBNT201" / "sample_data.json").stat().st_mtime_ns == stamp


def test_other_and_incomplete_sets_are_refused_unless_overwritten(tmp_path):
    small = Preset("small", {"test": CameraSplit({(1, 2): 1}, {(1, 2): 2})})
    generate(tmp_path, small, seed=1, workers=1)
    wanted = files(tmp_path)
    with pytest.raises(UserError, match="another sample set"):
        generate(tmp_path, small, seed=2, workers=1)
    with pytest.raises(UserError, match="lacks 2 of 8"):
        generate(tmp_path, small, seed=1, workers=1, masks=True)
    next((tmp_path / "RGBNT201").rglob("NI/*.jpg")).unlink()
    with pytest.raises(UserError, match="lacks 1 of 6.*--overwrite"):
        generate(tmp_path, small, seed=1, workers=1)
    generate(tmp_path, small, seed=1, workers=1, overwrite=True)
    assert files(tmp_path) == wanted
    assert [path.name for path in tmp_path.iterdir()] == ["RGBNT201"]


def test_data_of_another_origin_is_never_replaced(tmp_path):
    (tmp_path / "RGBNT201").mkdir()
    (tmp_path / "RGBNT201" / "mine.txt").write_text("kept")
    with pytest.raises(UserError, match="left alone"):
        generate(tmp_path, TINY, workers=1, overwrite=True)
    assert (tmp_path / "RGBNT201" / "mine.txt").read_text() == "kept"


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(writer, "_write_shot", stop)
    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path, TINY, workers=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "huge"}, "mini, full"),
        ({"seed": -1}, "seed is -1"),
        ({"workers": 0}, "workers is 0"),
        ({"dataset": "Market1501"}, "RGBNT201, RGBNT100, MSVR310"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        generate(tmp_path, **arguments)


def test_a_place_that_cannot_be_written_is_one_message(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(sys, "argv", ["data.synthetic", "--out", str(tmp_path / "file" / "sample"), "--workers", "1"])
    assert run(lambda: command.main(command.parse_args())) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and len(error.splitlines()) == 1 and str(tmp_path / "file") in error


def test_ctrl_c_ends_the_command_with_one_line_and_leaves_nothing(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "data.synthetic", "--out", str(out), "--workers", "1"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not any(out.glob("**/*.jpg")):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and error.splitlines()[-1] == "interrupted" and "Traceback" not in error
    assert not any(out.iterdir())
