"""Where the images of a shot lie: file names and folders of the data sets.

A layout is a function of a shot: file -> the images that lie side by side in it. "MASK" shows what is visible of the
subject.
"""

from __future__ import annotations

from collections.abc import Callable

from data.synthetic.plan import Shot
from utils.modalities import MODALITIES

MASK = "MASK"
Files = dict[str, tuple[str, ...]]
Layout = Callable[[Shot], Files]


def rgbnt201(shot: Shot) -> Files:
    """A folder a modality; files are named by identity, camera, sequence and frame."""
    stem = f"{shot.pid:06d}_cam{shot.camera}_{shot.sequence}_{shot.index + 1}"
    images: Files = {f"{shot.split}/{modality}/{stem}.jpg": (modality,) for modality in MODALITIES}
    return images | {f"{shot.split}/MASK/{stem}.png": (MASK,)}


def rgbnt100(shot: Shot) -> Files:
    """Strips of the three modalities; queries are gallery files that lie in a folder of their own too."""
    stem = f"{shot.pid:04d}_c{shot.camera:04d}_{shot.index:03d}"
    folders = [f"rgbir/{split}" for split in (shot.split, *["query"] * shot.query)]
    images = {f"{folder}/{stem}.jpg": MODALITIES for folder in folders}
    return images | {f"{folder}/MASK/{stem}.png": (MASK,) for folder in folders}


def msvr310(shot: Shot) -> Files:
    """A folder an identity, the modalities inside; queries are gallery files that lie in a folder of their own too."""
    stem = f"{shot.pid:04d}_s{shot.scene:03d}_v{shot.camera}_{shot.index:03d}"
    folders = [f"{split}/{shot.pid:04d}" for split in (shot.split, *["query3"] * shot.query)]
    names = dict(zip(("vis", "ni", "th"), MODALITIES, strict=True))
    images: Files = {
        f"{folder}/{name}/{stem}.jpg": (modality,) for folder in folders for name, modality in names.items()
    }
    return images | {f"{folder}/MASK/{stem}.png": (MASK,) for folder in folders}
