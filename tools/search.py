"""Finds the images of a gallery that are most like a query, prints them, and draws them if asked to.

The query is one image a modality, - where there is none. The gallery is a file that tools.extract wrote, with the same
run. The exact search reads it piece by piece; for galleries of many millions, --index faiss makes an index beside it
(GALLERY.faiss, about a byte a channel) and looks into a part of that.
"""

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from data.datasets import STRIP_BOXES, STRIP_SIZE
from data.images import read_image
from engine import load_model
from utils.cli import run
from utils.errors import UserError
from utils.feature_file import FeatureFile
from utils.logging import setup_logging
from utils.modalities import MODALITIES
from utils.search import build_index, import_faiss, nearest, nearest_in_index

log = logging.getLogger("tools.search")

EXAMPLES = """examples:
  python -m tools.search --run runs/sample/DeMo_SDTPS --gallery features.safetensors --query rgb.jpg ni.jpg ti.jpg
  python -m tools.search --run runs/sample/DeMo_SDTPS --gallery features.safetensors --query - - ti.jpg --out result.jpg
"""

CELL = (96, 192)
"""Width and height in pixels of one image in the picture, the other way round for images that are wide."""
GAP, CAPTION = 6, 40


def search(
    run_dir: Path,
    query: Sequence[str],
    gallery: FeatureFile,
    *,
    top: int = 10,
    camera: int | None = None,
    index: Path | None = None,
    device: str = "auto",
) -> list[tuple[int, float]]:
    """The best matches as (place in the gallery, similarity).

    Args:
        query: a path a modality, "-" where there is none.
        camera: of the query, from 0; None takes the model's mean camera embedding.
        index: faiss's, made where it is not there; None searches exactly.

    Raises:
        UserError: what the model, the images or the search have to say.
    """
    model = load_model(run_dir, device=device)
    if gallery.info.get("weights") != model.digest():
        raise UserError(
            f"the gallery was extracted with other weights ({gallery.info.get('run')}) than those of {run_dir}, so "
            "that distances mean nothing. Extract it again, or give --run the run that it comes from."
        )
    images = {m: [path] for m, path in zip(MODALITIES, query, strict=True) if path != "-"}
    if not images:
        raise UserError("--query: at least one image is needed.")
    branch = gallery.info.get("branch")
    features = model.embed(images, None if camera is None else [camera], branch).cpu()
    normalised = gallery.info.get("normalised") == "True"
    if normalised != model.cfg.TEST.FEAT_NORM:
        raise UserError("the gallery was extracted with another TEST.FEAT_NORM than the run's; extract it again.")
    start = time.perf_counter()
    if index is None:
        found = nearest(features, gallery.features, top, normalised=normalised)
    else:
        if not index.exists():  # `main` removes one that is older than the gallery
            build_index(gallery.features, index, normalised=normalised)
            start = time.perf_counter()
        found = nearest_in_index(features, index, top)
    log.info("%d entries searched in %.0f ms", len(gallery.features), 1000 * (time.perf_counter() - start))
    similarity, places = (x[0].tolist() for x in found)
    return [(place, value) for place, value in zip(places, similarity, strict=True) if place >= 0]


def table(gallery: FeatureFile, matches: Sequence[tuple[int, float]]) -> str:
    """The matches as text, best first."""
    lines = ["rank  similarity  identity  camera  image"]
    for rank, (place, similarity) in enumerate(matches, 1):
        known = [str(int(ids[place])) if ids[place] >= 0 else "-" for ids in (gallery.pids, gallery.camids)]
        first = next(path for path in gallery.paths[place] if path)
        lines.append(f"{rank:>4}  {similarity:>10.3f}  {known[0]:>8}  {known[1]:>6}  {first}")
    return "\n".join(lines)


def draw(query: Sequence[str], gallery: FeatureFile, matches: Sequence[tuple[int, float]]) -> Image.Image:
    """Query and matches side by side, a row a modality; grey where there is no image."""
    columns = [("query", [None if path == "-" else Path(path) for path in query])]
    for rank, (place, similarity) in enumerate(matches, 1):
        identity = f"id {int(gallery.pids[place])}" if gallery.pids[place] >= 0 else ""
        columns.append((f"{rank}: {similarity:.3f}\n{identity}", list(gallery.files(place))))
    opened = [(caption, _open(files)) for caption, files in columns]
    shown = next(image for _, images in opened for image in images if image is not None)
    width, height = CELL if shown.height >= shown.width else CELL[::-1]
    size = (len(columns) * (width + GAP) + GAP, CAPTION + len(MODALITIES) * (height + GAP))
    picture = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(picture)
    for i, (caption, images) in enumerate(opened):
        left = GAP + i * (width + GAP)
        pen.multiline_text((left, GAP), caption, fill="black")
        for row, image in enumerate(images):
            cell = Image.new("RGB", (width, height), "lightgrey")
            if image is not None:
                image.thumbnail(cell.size)
                cell.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
            picture.paste(cell, (left, CAPTION + row * (height + GAP)))
    return picture


def _open(files: Sequence[Path | None]) -> list[Image.Image | None]:
    """The images of one sample; a file that stands for all modalities is a strip of them."""
    decoded = [None if path is None else read_image(str(path)) for path in files]
    strip = decoded[0]
    if len(set(files)) == 1 and strip is not None and strip.size == STRIP_SIZE:
        return [strip.crop(box) for box in STRIP_BOXES]
    return decoded


def main(
    run_dir: Path,
    query: Sequence[str],
    gallery: Path,
    top: int,
    out: Path | None,
    camera: int | None,
    index: str,
    device: str,
) -> None:
    setup_logging()
    file = FeatureFile.load(gallery)
    path = None
    if index == "faiss":
        import_faiss()  # tells at once where it is not installed
        path = gallery.with_suffix(".faiss")
        if path.exists() and path.stat().st_mtime < gallery.stat().st_mtime:
            path.unlink()
    matches = search(run_dir, query, file, top=top, camera=camera, index=path, device=device)
    print(table(file, matches))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        draw(query, file, matches).save(out)
        log.info("wrote %s", out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--run", type=Path, required=True, dest="run_dir", metavar="RUN_DIR", help="as in tools.extract"
    )
    parser.add_argument("--query", nargs=3, required=True, metavar=MODALITIES, help="image files; - for a missing one")
    parser.add_argument("--gallery", type=Path, required=True, metavar="FILE", help="written by tools.extract")
    parser.add_argument("--top", type=int, default=10, help="how many matches; default 10")
    parser.add_argument("--out", type=Path, metavar="PICTURE", help="draw them into this .jpg or .png")
    parser.add_argument("--camera", type=int, help="camera of the query, from 0 as in training; default: unknown")
    parser.add_argument("--index", choices=("exact", "faiss"), default="exact", help="how to search; default exact")
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:N, mps or cpu")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options = vars(parser.parse_args())
    debug = options.pop("debug")
    sys.exit(run(lambda: main(**options), debug))
