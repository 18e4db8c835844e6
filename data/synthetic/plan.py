"""Which pictures the sample data consists of: presets, and the list of shots that follows from one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

GENERATOR_VERSION = 1
"""Raised whenever the same seed gives other pictures."""

FRAMES_PER_SEQUENCE = 4
"""How many frames of a track share a heading and a place."""


@dataclass(frozen=True)
class Split:
    """How many identities a split has and where they were seen.

    `identities` maps the cameras that saw an identity to the number of such identities; `triples` maps groups of
    cameras to the number of triples that they hold together. The groups hold every camera once.
    """

    identities: Mapping[tuple[int, ...], int]
    triples: Mapping[tuple[int, ...], int]

    @property
    def num_identities(self) -> int:
        return sum(self.identities.values())

    @property
    def num_triples(self) -> int:
        return sum(self.triples.values())


@dataclass(frozen=True)
class Preset:
    """The size of a data set: splits by folder name. No two splits share an identity."""

    name: str
    splits: Mapping[str, Split]

    def counts(self) -> dict[str, dict[str, int]]:
        """Identities and triples of each split."""
        return {name: {"identities": s.num_identities, "triples": s.num_triples} for name, s in self.splits.items()}


PRESETS = {
    "mini": Preset(
        "mini",
        {
            "train_171": Split({(1, 2): 32, (1, 3): 4, (2, 4): 4}, triples={(1, 2): 432, (3, 4): 48}),
            "test": Split({(1, 2): 24}, triples={(1, 2): 192}),
        },
    ),
    "full": Preset(
        "full",
        {
            "train_171": Split(
                {(1,): 56, (2,): 56, (3,): 4, (4,): 4, (1, 2): 47, (1, 3): 2, (2, 4): 2},
                triples={(1, 2): 3734, (3, 4): 217},
            ),
            "test": Split({(1, 2): 30}, triples={(1, 2): 836}),
        },
    ),
}
"""`full` counts as RGBNT201 does; `mini` is for two CPU cores."""


@dataclass(frozen=True)
class Shot:
    """One triple of images: frame `index` of the track of identity `number` of its split on one camera.

    `index` and `number` count from 0, `pid` and `camera` from 1.
    """

    split: str
    number: int
    pid: int
    camera: int
    index: int

    @property
    def sequence(self) -> int:
        return self.index // FRAMES_PER_SEQUENCE + 1

    @property
    def stem(self) -> str:
        """The file name without its ending, as RGBNT201 has it: identity, camera, sequence, frame."""
        return f"{self.pid:06d}_cam{self.camera}_{self.sequence}_{self.index + 1}"


def plan(preset: Preset, seed: int) -> list[Shot]:
    """Every triple of the data set, identity by identity; `pid` counts on from one split to the next."""
    shots, first_pid = [], 1
    for name, split in preset.splits.items():
        rng = generator(seed, "plan", name)
        groups = [cameras for cameras, count in split.identities.items() for _ in range(count)]
        order = rng.permutation(len(groups))
        tracks = [(number, camera) for number, group in enumerate(order) for camera in groups[group]]
        lengths = {}
        for cameras, triples in split.triples.items():
            members = [track for track in tracks if track[1] in cameras]
            lengths |= zip(members, _apportion(rng, triples, len(members)), strict=True)
        for number, camera in tracks:
            shots += [Shot(name, number, first_pid + number, camera, index) for index in range(lengths[number, camera])]
        first_pid += len(groups)
    return shots


def generator(seed: int, *key: str | int) -> np.random.Generator:
    """The source of random numbers of the one thing that `key` names."""
    words = [int.from_bytes(part.encode(), "little") if isinstance(part, str) else int(part) for part in key]
    return np.random.default_rng([seed, GENERATOR_VERSION, *words])


def _apportion(rng: np.random.Generator, total: int, parts: int) -> list[int]:
    """Split `total` into whole numbers, all within a quarter of their mean."""
    sizes = np.full(parts, total // parts)
    sizes[: total % parts] += 1
    rng.shuffle(sizes)
    step = total // parts // 4
    for first in range(0, parts - 1, 2):
        moved = rng.integers(0, step + 1)
        sizes[first] -= moved
        sizes[first + 1] += moved
    return sizes.tolist()
