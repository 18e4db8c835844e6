"""Masks beside the images: found in every layout, brought to the patch grid, counted by hand."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import train_net
from data.masks import mask_path, person_patches
from data.synthetic import SETS
from data.synthetic.layout import MASK
from data.synthetic.plan import Shot
from modeling.sdtps import SDTPS


def write_mask(path, rows, scale=1):
    """Writes 0 and 1 as black and white, each a square of `scale` pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.kron(255 * np.array(rows), np.ones((scale, scale))).astype(np.uint8)).save(path)
    return path


@pytest.mark.parametrize("name", SETS)
def test_found_where_the_sample_data_puts_them(name, tmp_path):
    """The layout's own files: beside each file with the RGB image there is the mask of the same shot."""
    fields = dict(split="test", pid=7, camera=2, sequence=1, index=3, query=False, scene=4)
    known = {key: fields.get(key, 0) for key in Shot.__dataclass_fields__}
    files = SETS[name].layout(Shot(**known))
    (mask,) = [file for file, parts in files.items() if parts == (MASK,)]
    (image,) = [file for file, parts in files.items() if parts[0] == "RGB"]
    assert mask_path(tmp_path / image) is None
    write_mask(tmp_path / mask, [[1]])
    assert mask_path(tmp_path / image) == tmp_path / mask


def test_patches_by_hand(tmp_path):
    """4 x 4 pixels in patches of 2 x 2: half of the pixels is enough, one is not."""
    mask = [[1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 1]]
    for name, rows in (("a", mask), ("b", np.zeros((4, 4)))):
        write_mask(tmp_path / "MASK" / f"{name}.png", rows, scale=3)  # the image is three times as large
    paths = [str(tmp_path / "RGB" / f"{name}.jpg") for name in "ab"]
    person = person_patches(paths, (4, 4), (2, 2), (2, 2))
    assert person.tolist() == [[True, False, True, True], [False] * 4]
    overlapping = person_patches(paths[:1], (4, 4), (2, 2), (1, 2))
    assert overlapping.tolist() == [[True, False, True, True, True, True]]  # rows 0-1, 1-2, 2-3


def test_masks_of_some_images_or_broken_ones_are_not_used(tmp_path, caplog):
    write_mask(tmp_path / "MASK" / "a.png", np.ones((4, 4)))
    (tmp_path / "MASK" / "broken.png").write_bytes(b"no picture")
    paths = [str(tmp_path / "RGB" / f"{name}.jpg") for name in ("a", "b", "broken")]
    grid = ((4, 4), (2, 2), (2, 2))
    assert person_patches(paths[1:2], *grid) is None and not caplog.records
    assert person_patches(paths[:2], *grid) is None and "b.jpg has no mask" in caplog.text
    assert person_patches(paths[::2], *grid) is None and "broken.png: cannot be decoded" in caplog.text


@pytest.fixture
def masked_yaml(tmp_path, tiny_yaml, tiny_dataset):
    """The tiny data set with masks beside the test images: the left column of the 4 x 2 patches is the person."""
    root = tmp_path / "data"
    root.mkdir()
    home = root / "RGBNT201"
    home.mkdir()
    (home / "train_171").symlink_to(tiny_dataset / "RGBNT201" / "train_171")
    (home / "test").mkdir()
    for modality in ("RGB", "NI", "TI"):
        (home / "test" / modality).symlink_to(tiny_dataset / "RGBNT201" / "test" / modality)
    for image in sorted((home / "test" / "RGB").iterdir()):
        write_mask(home / "test" / "MASK" / f"{image.stem}.png", [[1, 0]] * 4, scale=16)
    tiny_yaml.write_text(tiny_yaml.read_text().replace(str(tiny_dataset), str(root)))
    return tiny_yaml


def test_evaluation_counts_the_persons_patches(masked_yaml, tmp_path, monkeypatch):
    """A choice of the left column and one patch more: all of the person in 5 patches of 8."""

    def left_and_one(self, scores):
        order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7]).expand_as(scores)
        return order[..., : self.num_kept], order[..., self.num_kept :]

    monkeypatch.setattr(SDTPS, "choose", left_and_one)
    train_net.main(str(masked_yaml), ["SOLVER.MAX_EPOCHS", "2", "MODEL.SDTPS_SPARSE_RATIO", "0.6"])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["kind"] == "eval"][-1]
    for m in ("RGB", "NI", "TI"):
        assert last[f"sdtps/person_recall/{m}"] == 1
        assert last[f"sdtps/person_precision/{m}"] == pytest.approx(4 / 5)
    assert last["sdtps/person_recall/chance"] == 5 / 8 and last["sdtps/person_precision/chance"] == 1 / 2
