"""Says what is right and what is wrong with a folder of data; without one, where the data sets and weights come from.

FOLDER is in the layout of RGBNT201, RGBNT100 or MSVR310 (or the folder above it), or a manifest (.csv). With
--config_file, the data and the weights of a config are looked at. Every image is decoded. The exit code is 2 where
something is wrong; a note is no fault: sample data, say, has not the published counts.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from tqdm import tqdm
from yacs.config import CfgNode

from configs import load_cfg
from data.datasets import LAYOUTS, DatasetSplits, Sample, count, load_dataset
from data.faults import DataError, listing
from data.folders import recognise
from data.images import check_images
from data.make_dataloader import load_splits
from data.manifest import load_manifest
from data.workers import count_workers
from modeling.pretrained import read_weights
from utils.cli import run
from utils.errors import UserError

EXAMPLES = """examples:
  python -m tools.check_data
  python -m tools.check_data datasets/RGBNT201
  python -m tools.check_data my/manifest.csv
  python -m tools.check_data --config_file configs/RGBNT201/DeMo_SDTPS.yml DATASETS.ROOT_DIR /data
"""

WHERE = """Where to get what. ROOT is DATASETS.ROOT_DIR, ./datasets unless the config says otherwise.

RGBNT201   persons, 171 to train and 30 to test: 3951 and 836 triples
           ROOT/RGBNT201/{train_171,test}/{RGB,NI,TI}/000030_cam1_1_12.jpg
RGBNT100   vehicles, 50 and 50: 8675 strips of three images, 1715 queries, a gallery of 8575
           ROOT/RGBNT100/rgbir/{bounding_box_train,query,bounding_box_test}/0502_c0001_000.jpg
MSVR310    vehicles, 155 and 155: 1032 triples, 591 queries, a gallery of 1055
           ROOT/MSVR310/{bounding_box_train,query3,bounding_box_test}/0038/{vis,ni,th}/0038_s014_v7_003.jpg

           Download links of all three: https://github.com/924973292/TOP-ReID#datasets
           Their authors: RGBNT100 https://github.com/ttaalle/multi-modal-vehicle-Re-ID
           MSVR310 https://github.com/superlollipop123/Cross-directional-Center-Network-and-MSVR310

your own   a CSV, see docs/own_data.md; folders of Market-1501's form: python -m tools.make_manifest FOLDER
samples    python -m data.synthetic --out datasets/sample --dataset RGBNT201 --preset mini

CLIP       ViT-B/16, about 350 MB. With MODEL.PRETRAIN_PATH_T empty, timm fetches its copy from huggingface.co.
           Or download OpenAI's ViT-B-16.pt and set MODEL.PRETRAIN_PATH_T to it; the long part is its SHA-256:
           https://openaipublic.azureedge.net/clip/models/\
5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f/ViT-B-16.pt
DINOv2/v3  timm fetches them in the same way; see the licences of both.

Where there is no network, fetch elsewhere and copy the folder ~/.cache/huggingface:
           python -c "import timm; timm.create_model('vit_base_patch16_clip_quickgelu_224.openai', pretrained=True)"
"""


@dataclass
class Findings:
    """What was found, as lines for people; `wrong` counts the kinds of faults."""

    lines: list[str] = field(default_factory=list)
    wrong: int = 0

    def right(self, text: str) -> None:
        self.lines.append(f"ok     {text}")

    def note(self, text: str) -> None:
        self.lines.append(f"note   {text}")

    def fault(self, what: str | UserError) -> None:
        self.wrong += what.kinds if isinstance(what, DataError) else 1
        self.lines.append("WRONG  " + str(what).replace("\n", "\n       "))

    def expect(self, names: Sequence[str], good: str, bad: str) -> None:
        """Right if there are no names, else a fault that lists some."""
        if names:
            self.fault(f"{bad} ({len(names)}): {listing(names)}")
        else:
            self.right(good)


def check_folder(path: Path) -> Findings:
    """Looks at a folder or a manifest."""
    findings = Findings()
    found = recognise(path) if path.is_dir() else None
    try:
        if path.suffix.lower() == ".csv" or (path / "manifest.csv").is_file():
            file = path if path.suffix.lower() == ".csv" else path / "manifest.csv"
            splits = load_manifest(file, file.parent)
        elif found:
            splits = load_dataset(found[0], path, home=found[1])
        else:
            layouts = "\n".join(f"{name}: {layout.home}/{layout.train} …" for name, layout in LAYOUTS.items())
            findings.fault(
                f"{path}: {'no layout that is known' if path.is_dir() else 'no such folder'}; known are\n{layouts}"
            )
            return findings
    except UserError as error:
        findings.fault(error)
        return findings
    findings.right(f"layout of {splits.name}: folders, file names, a partner in every modality")
    return check_splits(splits, findings)


def check_splits(splits: DatasetSplits, findings: Findings) -> Findings:
    """Looks at the samples of a data set and at every image."""
    samples = list(dict.fromkeys(splits.train + splits.query + splits.gallery))
    layout = LAYOUTS.get(splits.name)
    for i, title in enumerate(("train", "query", "gallery")):
        counts = count(getattr(splits, title))
        text = "{}: {} identities, {} samples, {} cameras".format(title, *counts)
        if layout is None or counts == layout.published[i]:
            findings.right(text + (", as published" if layout else ""))
        else:
            findings.note(text + "; the published set has {}, {}, {}".format(*layout.published[i]))
    lacking = sum(not all(sample.present) for sample in samples)
    if lacking:
        findings.note(f"{lacking} of {len(samples)} samples lack a modality")

    shared = sorted({s.pid for s in splits.train} & {s.pid for s in splits.query + splits.gallery})
    if shared:
        findings.note(f"identities in training and in the test ({len(shared)}): {listing([str(p) for p in shared])}")
    there = {sample.pid for sample in splits.gallery}
    findings.expect(
        sorted({str(sample.pid) for sample in splits.query} - {str(pid) for pid in there}),
        "every query's identity is in the gallery",
        "query identities that are not in the gallery",
    )
    place = (lambda s: s.camid) if splits.protocol == "camera" else (lambda s: s.sceneid)
    places: dict[int, set[int]] = {}
    for sample in splits.gallery:
        places.setdefault(sample.pid, set()).add(place(sample))
    alone = [s.path for s in splits.query if s.pid in there and not places[s.pid] - {place(s)}]
    if alone:
        findings.note(
            f"{len(alone)} queries have no match from another {splits.protocol} and do not count: {listing(alone, 2)}"
        )
    _check_files(samples, findings)
    return findings


def _check_files(samples: Sequence[Sample], findings: Findings) -> None:
    try:
        check_images(samples, workers=count_workers(-1) + 1)
    except UserError as error:
        findings.fault(error)
        return
    findings.right(f"{len({s.path for sample in samples for s in sample.sources})} image files decode")
    sizes: dict[tuple[int, int], int] = {}
    unequal = []
    for sample in tqdm(samples, desc="sizes", delay=2, leave=False, disable=None):
        own = {_size(source.path) for source in sample.sources}
        for size in own:
            sizes[size] = sizes.get(size, 0) + 1
        if len(own) > 1:
            unequal.append(sample.path)
    common = sorted(sizes, key=lambda size: -sizes[size])
    shown = ", ".join(f"{width} x {height}" for width, height in common[:3])
    findings.right(f"sizes (width x height): {shown}{f' and {len(common) - 3} others' if len(common) > 3 else ''}")
    if unequal:
        findings.note(
            f"{len(unequal)} samples have images of different sizes, which may not be aligned: {listing(unequal, 2)}"
        )
    else:
        findings.right("the images of each sample have one size")


def _size(path: str) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def check_config(cfg: CfgNode) -> Findings:
    """Looks at the data and the weights that a config names."""
    findings = Findings()
    try:
        splits = load_splits(cfg)
    except UserError as error:
        findings.fault(error)
    else:
        findings.right(f"{splits.name} is in {cfg.DATASETS.ROOT_DIR}: folders, file names, a partner in every modality")
        check_splits(splits, findings)
    weights = cfg.MODEL.PRETRAIN_PATH_T
    if not cfg.MODEL.PRETRAINED:
        findings.note("MODEL.PRETRAINED False: no weights are needed")
    elif not weights:
        findings.note(f"MODEL.PRETRAIN_PATH_T is empty: timm fetches {cfg.MODEL.TRANSFORMER_TYPE} from huggingface.co")
    else:
        try:
            findings.right(f"{weights} can be read: {len(read_weights(weights))} tensors")
        except UserError as error:
            findings.fault(f"MODEL.PRETRAIN_PATH_T: {error}")
    return findings


def main(folder: Path | None, config_file: Path | None, opts: Sequence[str]) -> None:
    if folder is None and config_file is None:
        print(WHERE, end="")
        return
    findings = check_folder(folder) if folder is not None else check_config(load_cfg(config_file, opts))
    print("\n".join(findings.lines))
    if findings.wrong:
        raise UserError(
            f"{findings.wrong} thing{'s' * (findings.wrong > 1)} wrong. python -m tools.check_data says where to get "
            "data and weights."
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", metavar="FOLDER|CSV")
    parser.add_argument("--config_file", type=Path, metavar="FILE", help="look at the data and weights of a config")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args, opts = parser.parse_known_args()
    if args.config_file is not None and args.folder is not None:
        args.folder, opts = None, [str(args.folder), *opts]  # the first KEY of KEY VALUE …
    sys.exit(run(lambda: main(args.folder, args.config_file, opts), args.debug))
