"""Bad inputs among the images, and odd ones that have to load."""

import os
import shutil

from entry import BASE, TEST, WEIGHT, Case
from spoil import (
    ANY,
    ONE,
    SET,
    cut,
    deep_grey,
    each,
    empty,
    loop,
    msvr310,
    only_identities,
    picture,
    png,
    put,
    remove,
    rename,
    rgbnt100,
)

DATA = (
    Case(
        "no data",
        ("not found", "DATASETS.ROOT_DIR", "python -m data.synthetic --out", "--preset mini (or --preset full"),
        "DATASETS.ROOT_DIR datasets/sample_full",
    ),
    Case("a file for the data", ("not found", "data.synthetic"), spoil=each(remove("data"), put("data", ""))),
    Case("a name that no file has", ("DATASETS.ROOT_DIR",), "DATASETS.ROOT_DIR " + "x" * 300),
    Case("no training folder", ("folders that are missing", "train_171"), spoil=remove(f"{SET}/train_171")),
    Case(
        "no test folder",
        ("folders that are missing", "RGBNT201/test"),
        f"{WEIGHT} OUTPUT_DIR run",
        spoil=remove(f"{SET}/test"),
        script=TEST,
    ),
    Case("an empty folder", ("folders without an image", "train_171/NI"), spoil=empty(f"{SET}/train_171/NI")),
    Case("no folder of a modality", ("folders that are missing", "test/TI"), spoil=remove(f"{SET}/test/TI")),
    Case("links in a circle", ("folders that are missing", "test/RGB"), spoil=loop),
    Case("one modality short", ("no partner of the same name", "000001_cam1_1_00.jpg"), spoil=remove(ONE)),
    Case(
        "one image more in one modality",
        ("no partner of the same name", "train_171/RGB"),
        spoil=lambda here: shutil.copy(here / ONE, here / SET / "train_171/NI/000009_cam1_1_00.jpg"),
    ),
    Case(
        "no thermal folder of a vehicle",
        ("folders that are missing", "0002/th"),
        "DATASETS.NAMES MSVR310",
        spoil=msvr310,
    ),
    Case(
        "wrong extension",
        ("folders without an image (.jpg", "train_171/RGB"),
        spoil=rename(f"{SET}/train_171/RGB/*", lambda path: f"{path.stem}.gif"),
    ),
    Case(
        "names of another kind",
        ("do not parse", "000030_cam1_1_12.jpg"),
        spoil=rename(f"{SET}/train_171/*/000001*", lambda path: f"person{path.stem}.jpg"),
    ),
    Case(
        "camera 0",
        ("do not parse", "counted from 1"),
        spoil=rename(f"{SET}/train_171/*/000001*", lambda path: path.name.replace("cam1", "cam0")),
    ),
    Case(
        "camera 12345",
        ("cameras above 999",),
        spoil=rename(f"{SET}/train_171/*/000001*", lambda path: path.name.replace("cam1", "cam12345")),
    ),
    Case(
        "an identity beyond all numbers",
        ("identities above",),
        "DATASETS.NAMES RGBNT100",
        spoil=rgbnt100(f"bounding_box_train/{'9' * 30}_c0001_001.jpg"),
    ),
    Case(
        "two files of one name",
        ("share a name up to the suffix",),
        spoil=lambda here: shutil.copy(here / ONE, (here / ONE).with_suffix(".png")),
    ),
    Case(
        "a folder named as an image",
        (ONE, "cannot be decoded"),
        spoil=each(remove(ONE), lambda here: (here / ONE).mkdir()),
    ),
    Case(
        "a link to nothing",
        (ONE, "no such file"),
        spoil=each(remove(ONE), lambda here: (here / ONE).symlink_to("gone")),
    ),
    Case("an image without a byte", (ONE, "cannot be decoded", "Copy them again"), spoil=put(ONE, "")),
    Case("half an image", (ONE, "truncated", "Copy them again"), spoil=cut(ONE, 0.5)),
    Case("half an image, without the check", (ANY, "truncated"), "DATASETS.CHECK False", spoil=cut(ANY, 0.5)),
    Case(
        "half an image, in a worker",
        (ANY, "truncated"),
        "DATASETS.CHECK False DATALOADER.NUM_WORKERS 1",
        spoil=cut(ANY, 0.5),
    ),
    Case("half an image, into the cache", (ONE, "truncated"), "DATALOADER.CACHE memory", spoil=cut(ONE, 0.5)),
    Case(
        "a text named as an image",
        (ONE, "cannot be decoded"),
        spoil=put(ONE, "version https://git-lfs.github.com/spec/v1\n"),
    ),
    Case("a gigantic image", (ONE, "megapixels", "Scale it down"), spoil=put(ONE, png(10000, 12000))),
    Case("an image bomb", (ONE, "megapixels", "Scale it down"), spoil=put(ONE, png(2**20, 2000))),
    Case(
        "an image that only claims its size",
        (ONE, "megapixels"),
        spoil=put(ONE, png(2**24, 2**24, rows=2)),
    ),
    Case("strips of another size", ("640x128", "768x128"), "DATASETS.NAMES RGBNT100", spoil=rgbnt100(size=(640, 128))),
    Case("one identity only", ("one identity only", "at least two"), spoil=only_identities("000000*")),
    Case("fewer identities than a batch takes", ("lower IMS_PER_BATCH", "has 6"), "SOLVER.IMS_PER_BATCH 64"),
    Case(
        "an identity that the gallery lacks",
        ("gallery", "0010"),
        "DATASETS.NAMES RGBNT100",
        spoil=rgbnt100(query=("0009_c0002_001.jpg", "0010_c0002_001.jpg")),
    ),
    Case(
        "one camera for all of the test",
        ("no query", "camera"),
        f"{WEIGHT} OUTPUT_DIR run",
        spoil=remove(f"{SET}/test/*/*cam2*"),
        script=TEST,
    ),
    Case(
        "an image that may not be read",
        (ONE, "denied"),
        spoil=each(
            lambda here: shutil.copy(here / ONE, here / "x"),
            lambda here: os.replace(here / "x", here / ONE),
            lambda here: (here / ONE).chmod(0),
        ),
        as_nobody=True,
    ),
    Case(
        "a folder that may not be read",
        ("test/TI", "denied"),
        spoil=lambda here: (here / SET / "test/TI").chmod(0),
        as_nobody=True,
    ),
)

LOADS = (
    Case("CMYK", spoil=picture(ONE, "CMYK", (10, 90, 0, 30))),
    Case("a palette", spoil=picture(ONE.replace("jpg", "png"), "P", 3)),
    Case("a palette with transparency", spoil=picture(ONE.replace("jpg", "png"), "P", 3, transparency=b"\0\1")),
    Case("grey", spoil=picture(ONE, "L", 90)),
    Case("black and white", spoil=picture(ONE.replace("jpg", "bmp"), "1", 1)),
    Case("grey of 16 bits", spoil=deep_grey(ONE.replace("jpg", "png"))),
    Case("transparency", spoil=picture(ONE.replace("jpg", "png"), "RGBA", (1, 2, 3, 0))),
    Case("names in capitals", spoil=rename(f"{SET}/train_171/TI/*", lambda path: f"{path.stem}.JPG")),
    Case("spaces and unicode in names", spoil=rename(f"{SET}/*/*/*", lambda path: f"{path.stem} ü 数.jpg")),
    Case(
        "spaces and unicode in folders",
        yaml="DATASETS: {ROOT_DIR: './mes données 数'}",
        spoil=lambda here: (here / "data").rename(here / "mes données 数"),
    ),
    Case("a name that is not UTF-8", spoil=rename(f"{SET}/test/*/*", lambda path: f"{path.stem}_\udcff.jpg")),
    Case("a link to the data", "", "DATASETS.ROOT_DIR link", spoil=lambda here: (here / "link").symlink_to("data")),
    Case(
        "an image of one identity",
        spoil=lambda here: [p.unlink() for p in (here / SET / "train_171").glob("*/000001*") if "_00" not in p.name],
    ),
    Case(
        "other files among the images",
        spoil=each(put(f"{SET}/test/RGB/Thumbs.db", "x"), put(f"{SET}/test/RGB/._x.jpg", "x")),
    ),
    Case("numbers as texts", yaml="SOLVER: {BASE_LR: '1e-3', SEED: '7'}\nMODEL: {SDTPS_BETA: 1e-1}"),
    Case("yes and no", yaml="MODEL: {USE_SDTPS: 'no', IF_LABELSMOOTH: 'no'}"),
    Case("a YAML with Windows' line ends", yaml="SOLVER:\r\n  SEED: 3\r\n"),
    Case("a YAML with a byte order mark", yaml=f"\ufeff{BASE}".encode()),
    Case("an alias that is used twice", yaml="INPUT:\n  PIXEL_MEAN: &a [0.5, 0.4, 0.3]\n  PIXEL_STD: *a"),
)
