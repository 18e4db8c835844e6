"""Which pictures sample data consists of: the list of shots that follows from the counts of a preset."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

FRAMES_PER_SEQUENCE = 4
"""How many frames of a track share a heading and a place."""

Key = str | int
Source = tuple[Key, ...]
"""Where all random numbers of a data set come from: its seed, then whatever sets it apart from other data sets."""


def generator(source: Source, *key: Key) -> np.random.Generator:
    """The source of random numbers of the one thing that `key` names; `source` starts with an integer."""
    words = [int.from_bytes(part.encode(), "little") if isinstance(part, str) else int(part) for part in source + key]
    return np.random.default_rng(words)


@dataclass(frozen=True)
class Shot:
    """One triple of images: frame `index` of the track of identity `number` of its split in one place.

    A place is a camera, or a scene where there are scenes: then `camera` is the view. `index` and `number` count from
    0, `pid` and `place` from 1, `camera` as the file names do.
    """

    split: str
    number: int
    pid: int
    camera: int
    index: int
    scene: int | None = None
    query: bool = False

    @property
    def place(self) -> int:
        return self.camera if self.scene is None else self.scene

    @property
    def sequence(self) -> int:
        return self.index // FRAMES_PER_SEQUENCE + 1


@dataclass(frozen=True)
class CameraSplit:
    """How many identities a split has and which cameras saw them.

    `identities` maps the cameras that saw an identity to the number of such identities; `triples` maps groups of
    cameras to the number of triples that they hold together. The groups hold every camera once. `queries` of the
    triples are queries too, where a data set keeps these apart.
    """

    identities: Mapping[tuple[int, ...], int]
    triples: Mapping[tuple[int, ...], int]
    queries: int = 0

    @property
    def num_identities(self) -> int:
        return sum(self.identities.values())

    @property
    def num_triples(self) -> int:
        return sum(self.triples.values())

    def shots(self, rng: np.random.Generator, name: str, first_pid: int) -> Iterator[Shot]:
        """The shots of each identity, camera by camera."""
        groups = [cameras for cameras, count in self.identities.items() for _ in range(count)]
        order = rng.permutation(len(groups))
        tracks = [(number, camera) for number, group in enumerate(order) for camera in groups[group]]
        lengths: dict[tuple[int, int], int] = {}
        for cameras, triples in self.triples.items():
            members = [track for track in tracks if track[1] in cameras]
            lengths |= zip(members, _apportion(rng, triples, len(members)), strict=True)
        for number, camera in tracks:
            for index in range(lengths[number, camera]):
                yield Shot(name, number, first_pid + number, camera, index)


@dataclass(frozen=True)
class SceneSplit:
    """How many identities a split has, in how many scenes each was seen, and the triples of these.

    `groups` maps the number of scenes that saw an identity to (identities, triples). The scenes are drawn from
    `num_scenes`, the views from `num_views`. Queries are taken from identities that several scenes saw.
    """

    groups: Mapping[int, tuple[int, int]]
    num_scenes: int
    queries: int = 0
    num_views: int = 8
    least: int = 2
    most: int = 31

    @property
    def num_identities(self) -> int:
        return sum(identities for identities, _ in self.groups.values())

    @property
    def num_triples(self) -> int:
        return sum(triples for _, triples in self.groups.values())

    def shots(self, rng: np.random.Generator, name: str, first_pid: int) -> Iterator[Shot]:
        """The shots of each identity, scene by scene; an identity has `least` to `most`, a scene one at least."""
        sizes = [
            (scenes, size)
            for scenes, (identities, triples) in self.groups.items()
            for size in _scatter(rng, triples, identities, max(scenes, self.least), self.most)
        ]
        for number, chosen in enumerate(rng.permutation(len(sizes))):
            num_scenes, size = sizes[chosen]
            scenes = np.sort(rng.choice(self.num_scenes, num_scenes, replace=False)) + 1
            for scene, share in zip(scenes, np.array_split(np.arange(size), num_scenes), strict=True):
                views = np.resize(rng.permutation(self.num_views), len(share))
                for index, view in enumerate(views):
                    yield Shot(name, number, first_pid + number, int(view), index, int(scene))


@dataclass(frozen=True)
class Preset:
    """The size of a data set: splits by folder name. No two splits share an identity."""

    name: str
    splits: Mapping[str, CameraSplit | SceneSplit]

    def counts(self) -> dict[str, dict[str, int]]:
        """Identities and triples of each split, and queries where there are any."""
        return {
            name: {"identities": split.num_identities, "triples": split.num_triples}
            | ({"queries": split.queries} if split.queries else {})
            for name, split in self.splits.items()
        }


def plan(preset: Preset, source: Source) -> list[Shot]:
    """Every triple of the data set, identity by identity; `pid` counts on from one split to the next."""
    shots, first_pid = [], 1
    for name, split in preset.splits.items():
        drawn = list(split.shots(generator(source, "plan", name), name, first_pid))
        shots += _with_queries(generator(source, "queries", name), drawn, split.queries)
        first_pid += split.num_identities
    return shots


def _with_queries(rng: np.random.Generator, shots: list[Shot], count: int) -> list[Shot]:
    """Turn `count` of the shots into queries: only identities that several places saw, evenly over their tracks."""
    places: dict[int, set[int]] = {}
    for shot in shots:
        places.setdefault(shot.number, set()).add(shot.place)
    able = [row for row in rng.permutation(len(shots)) if len(places[shots[row].number]) > 1]
    able.sort(key=lambda row: shots[row].index)
    chosen = set(able[:count])
    assert len(chosen) == count, "fewer triples can be queries than are asked for"
    return [replace(shot, query=row in chosen) for row, shot in enumerate(shots)]


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


def _scatter(rng: np.random.Generator, total: int, parts: int, least: int, most: int) -> list[int]:
    """Split `total` into whole numbers from `least` to `most`: many small ones, a few large ones."""
    sizes, odds = np.full(parts, least), rng.lognormal(0, 0.8, parts)
    for _ in range(total - least * parts):
        open_odds = odds * (sizes < most)
        sizes[rng.choice(parts, p=open_odds / open_odds.sum())] += 1
    return sizes.tolist()
