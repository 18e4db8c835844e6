"""Random input for all that reads files of others: whatever comes, a reader gives a result or a UserError.

Texts are made of pieces of real ones, files of real ones with bytes changed, so that the examples come past the first
check. Prints how many examples each reader took and refused; hypothesis shows the smallest one that it fails on.

python tests/faults/fuzz.py --examples 10000 [--only checkpoint] [--seed 1]
"""

import argparse
import logging
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

import hypothesis  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import save as safetensors_bytes  # noqa: E402
from yacs.config import CfgNode  # noqa: E402

from configs import dump, load_cfg, validate  # noqa: E402
from configs.defaults import FLAT_KEYS, KEYS  # noqa: E402
from data.datasets import LAYOUTS, load_dataset  # noqa: E402
from data.images import read_image  # noqa: E402
from engine.checkpoint import read_start  # noqa: E402
from modeling.pretrained import read_weights  # noqa: E402
from utils.errors import UserError  # noqa: E402
from utils.modalities import MODALITIES  # noqa: E402

VALUES = ["3", "0.5", "-1", "1e-4", ".nan", ".inf", "''", "yes", "no", "null", "~", "[]", "[256, 128]", "{}", "0x1f"]
VALUES += ["!!python/object/apply:os.system [ls]", "!!int x", "!!float ''", "!!bool 3", "!!timestamp x", "!!binary é"]
VALUES += [
    "!!set {a}",
    "!!omap [a]",
    "2001-99-99",
    "1:99",
    "&a [*a]",
    "*a",
    "&a 3",
    "'",
    '"',
    "[",
    "{",
    "|",
    ">",
    "- 1",
]
WORDS = [*KEYS, *(name.rpartition(".")[2] for name in FLAT_KEYS), "_BASE_", "<<", "? a", "MODEL.NAME", "PROMPT", "é"]
MODES = ("RGB", "L", "P", "CMYK", "1")


@dataclass(frozen=True)
class Reader:
    """What is tried: a function, and the examples it gets, `(folder, example)`."""

    examples: st.SearchStrategy
    read: Callable[[Path, object], object]


def yaml_text() -> st.SearchStrategy[str]:
    value = st.sampled_from(VALUES) | st.text(max_size=8) | st.floats().map(str) | st.integers().map(str)
    key = st.sampled_from(WORDS) | st.text(max_size=6)
    line = st.builds("{}{}: {}".format, st.sampled_from(["", "  ", "    ", "\t", "- "]), key, value)
    lines = st.lists(line | key | value, max_size=8).map("\n".join)
    known = st.sampled_from([(name, FLAT_KEYS[name].default) for name in FLAT_KEYS if "." in name])
    setting = st.builds(
        "{0[0]}: {{{0[1]}: {1}}}".format, known.map(lambda k: k[0].split(".")), known.map(lambda k: k[1])
    )
    own = known.map(lambda k: "{}: {{{}: {}}}".format(*k[0].split("."), k[1] if k[1] != "" else "''"))
    return lines | own | setting | st.lists(own, max_size=4).map("\n".join) | st.text(max_size=60)


def read_yaml(folder: Path, text: object) -> CfgNode:
    path = folder / "fuzz.yml"
    path.write_bytes(str(text).encode(errors="surrogatepass"))
    return _valid(load_cfg(path), folder)


def options() -> st.SearchStrategy[list]:
    scalar = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10) | st.sampled_from(VALUES)
    key = st.sampled_from([*FLAT_KEYS]) | st.sampled_from(WORDS) | st.text(max_size=10)
    own = st.sampled_from([[name, default] for name, default in ((n, k.default) for n, k in FLAT_KEYS.items())])
    pair = st.tuples(key, scalar | st.lists(scalar, max_size=3)).map(list)
    pairs = st.lists(pair, max_size=4) | st.lists(own, max_size=4) | st.builds(lambda a, b: [a, b], own, pair)
    return pairs.map(lambda found: [word for pair in found for word in pair]) | st.lists(
        st.text(max_size=6), max_size=3
    )


def read_options(folder: Path, opts: object) -> CfgNode:
    assert isinstance(opts, list)
    return _valid(load_cfg(None, opts), folder)


def _valid(cfg: CfgNode, folder: Path) -> CfgNode:
    """What the loader lets through is valid, and comes back from its own text."""
    validate(cfg)
    (folder / "again.yml").write_text(dump(cfg))
    assert load_cfg(folder / "again.yml") == cfg
    return cfg


def file_names() -> st.SearchStrategy[tuple[str, list[str]]]:
    def of(name: str) -> st.SearchStrategy[tuple[str, list[str]]]:
        near = st.from_regex(LAYOUTS[name].pattern, fullmatch=True) | st.sampled_from([LAYOUTS[name].example[:-4]])
        stem = st.builds("{}{}".format, near, st.sampled_from(["", "_1_00", " é", "\udcff"])) | st.text(max_size=12)
        file = st.builds("{}{}".format, stem, st.sampled_from([".jpg", ".JPG", ".png", ".txt", ""]))
        files = st.lists(near.map("{}.jpg".format), min_size=2, max_size=4) | st.lists(file, min_size=1, max_size=4)
        return st.tuples(st.just(name), files)

    return st.sampled_from([*LAYOUTS]).flatmap(of)


def read_names(folder: Path, example: object) -> object:
    name, files = example  # type: ignore[misc]
    layout, home = LAYOUTS[name], folder / "set" / LAYOUTS[name].home
    parts = {"RGBNT201": MODALITIES, "RGBNT100": ("",), "MSVR310": ("1/vis", "1/ni", "1/th")}[name]
    shutil.rmtree(folder / "set", ignore_errors=True)
    for split in dict.fromkeys((layout.train, layout.query, layout.gallery)):
        for part in parts:
            (home / split / part).mkdir(parents=True)
            for file in files:
                if file.strip("./") and not {"/", "\0"} & {*file} and len(os.fsencode(file)) < 256:
                    (home / split / part / file).touch()
    splits = load_dataset(name, folder / "set", train=True)
    for sample in splits.train + splits.query + splits.gallery:
        torch.tensor([sample.pid, sample.camid, sample.sceneid])
        assert 0 <= sample.camid < splits.num_cameras
    return splits


def mutated(originals: Sequence[tuple[str, bytes]]) -> st.SearchStrategy[tuple[str, bytes]]:
    """Real files, cut, with a stretch of bytes overwritten, inserted or left out, up to four times."""
    change = st.tuples(st.floats(0, 1, exclude_max=True), st.sampled_from("oicd"), st.binary(min_size=1, max_size=6))

    def apply(original: tuple[str, bytes], changes: list[tuple[float, str, bytes]]) -> tuple[str, bytes]:
        name, content = original
        for place, kind, new in changes:
            at = int(place * len(content))
            behind = {"o": content[at + len(new) :], "i": content[at:], "d": content[at + 4 * len(new) :], "c": b""}
            content = content[:at] + (new if kind in "oi" else b"") + behind[kind]
        return name, content

    return st.builds(apply, st.sampled_from(originals), st.lists(change, min_size=1, max_size=4))


def checkpoints() -> list[tuple[str, bytes]]:
    state = {"version": 1, "model": {"w": torch.arange(6.0), "b": torch.ones(2, 2).half()}, "trained_model": None}
    state |= {"optimizer": {"name": "Adam", "moments": {"w": {"step": torch.tensor(1.0)}}}, "scaler": {}, "rng": {}}
    state |= {
        "epoch": 1,
        "step": 0,
        "global_step": 3,
        "best": None,
        "meters": None,
        "identities": [1, 2],
        "config": "{}",
    }
    zipped, legacy, program = BytesIO(), BytesIO(), BytesIO()
    torch.save(state, zipped)
    torch.save(state, legacy, _use_new_zipfile_serialization=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), program)
    tensors = safetensors_bytes({"w": torch.ones(3), "b": torch.ones(2, 2).half()})
    files = {
        "a.pth": zipped.getvalue(),
        "b.pth": legacy.getvalue(),
        "c.pt": program.getvalue(),
        "d.safetensors": tensors,
    }
    return [*files.items()]


def read_checkpoint(folder: Path, example: object) -> object:
    name, content = example  # type: ignore[misc]
    path = folder / name
    path.write_bytes(content)
    weights = read_weights(path)
    assert all(isinstance(tensor, torch.Tensor) for tensor in weights.values())
    return read_start(str(path)) if name == "a.pth" else weights


def images() -> list[tuple[str, bytes]]:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 12, 3), dtype=np.uint8))
    files = []
    for mode, kind in ((mode, kind) for mode in MODES for kind in ("png", "jpeg", "bmp")):
        file = BytesIO()
        try:
            noise.convert(mode).save(file, format=kind)
        except OSError:  # not every format has every mode
            continue
        files.append((f"{mode}.{kind}", file.getvalue()))
    return files


def read_picture(folder: Path, example: object) -> object:
    name, content = example  # type: ignore[misc]
    path = folder / name
    path.write_bytes(content)
    image = read_image(str(path))
    assert image.mode == "RGB"
    return image


READERS: dict[str, Callable[[], Reader]] = {
    "config file": lambda: Reader(yaml_text(), read_yaml),
    "key and value": lambda: Reader(options(), read_options),
    "file names": lambda: Reader(file_names(), read_names),
    "checkpoint": lambda: Reader(mutated(checkpoints()), read_checkpoint),
    "image": lambda: Reader(mutated(images()), read_picture),
}


def fuzz(name: str, examples: int, seed: int | None = None) -> Counter[str]:
    """Tries a reader; the examples are the same in every call, unless a seed is given.

    Returns:
        How many examples were "taken" and "refused".

    Raises:
        Exception: whatever the reader raised besides UserError, on the smallest example that makes it do so.
    """
    reader, count = READERS[name](), Counter[str]()
    with tempfile.TemporaryDirectory() as folder:

        def attempt(example: object) -> None:
            try:
                reader.read(Path(folder), example)
                count["taken"] += 1
            except UserError as error:
                assert str(error).strip() and len(str(error)) < 20_000
                count["refused"] += 1

        test = hypothesis.given(reader.examples)(attempt)
        if seed is not None:
            test = hypothesis.seed(seed)(test)
        checks = [*hypothesis.HealthCheck]
        hypothesis.settings(
            max_examples=examples, derandomize=seed is None, deadline=None, database=None, suppress_health_check=checks
        )(test)()
    return count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=10_000, help="for each reader")
    parser.add_argument("--only", choices=READERS)
    parser.add_argument("--seed", type=int, help="other examples than the usual ones")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    failed = 0
    names = [args.only] if args.only else [*READERS]
    for name in names:
        begin = time.perf_counter()
        try:
            count = fuzz(name, args.examples, args.seed)
        except Exception:
            failed += 1
            logging.getLogger(__name__).exception("%s", name)
            continue
        print(f"{name:<14} {count['taken']:6} taken {count['refused']:6} refused", end="  ")
        print(f"{time.perf_counter() - begin:4.0f} s", flush=True)
    print(f"{len(names) - failed} of {len(names)} readers let nothing but a UserError through")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
