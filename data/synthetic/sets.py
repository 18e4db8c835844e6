"""The data sets that can be written: who is seen, how the files lie, and how much there is of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from data.synthetic import layout, person, vehicle
from data.synthetic.identity import sample_identity
from data.synthetic.people import render_person
from data.synthetic.plan import CameraSplit, Preset, SceneSplit, Shot, Source, generator
from data.synthetic.vehicle_identity import sample_vehicle
from data.synthetic.vehicles import render_vehicle
from utils.errors import UserError

LEAST_DIFFERENCES = 4
"""In how many visible traits every two identities of a split differ at least."""


@dataclass(frozen=True)
class SampleSet:
    """A data set: a subject (`sample` draws an identity, `render` a shot of it), a layout and presets.

    Args:
        sample: random numbers -> an identity; its `traits` name what can be seen of it.
        render: (source, shot, identity) -> the images (modality -> (H, W, 3) uint8), the visible share (H, W).
        size: height and width of an image, in pixels.
        version: raised whenever the same seed gives other pictures.
        stream: what sets its random numbers apart from those of other data sets.
    """

    name: str
    sample: Callable[[np.random.Generator], Any]
    render: Callable[[Source, Shot, Any], tuple[dict[str, np.ndarray], np.ndarray]]
    size: tuple[int, int]
    layout: layout.Layout
    presets: Mapping[str, Preset]
    version: int = 1
    stream: tuple[str, ...] = ()

    def source(self, seed: int) -> Source:
        """Where the random numbers of this data set with this seed come from."""
        return (seed, self.version, *self.stream)

    def identities(self, seed: int, preset: Preset, split: str) -> list[Any]:
        """The identities of a split, by their number. A longer list starts with the shorter one."""
        return _identities(self.sample, self.source(seed), split, preset.splits[split].num_identities)

    def find_preset(self, preset: str | Preset) -> Preset:
        """The preset of that name; counts of one's own are what they are.

        Raises:
            UserError: there is none of that name.
        """
        if isinstance(preset, Preset):
            return preset
        if preset not in self.presets:
            raise UserError(f"preset is '{preset}': expected one of {', '.join(self.presets)}.")
        return self.presets[preset]


@lru_cache(maxsize=4)
def _identities(sample: Callable, source: Source, split: str, count: int) -> list[Any]:
    rng = generator(source, "identities", split)
    chosen: list[Any] = []
    while len(chosen) < count:
        candidate = sample(rng)
        if all(differences(candidate, other) >= LEAST_DIFFERENCES for other in chosen):
            chosen.append(candidate)
    return chosen


def differences(one: Any, other: Any) -> int:
    """In how many visible traits two identities differ."""
    return sum(a != b for a, b in zip(one.traits, other.traits, strict=True))


RGBNT201 = {
    "mini": Preset(
        "mini",
        {
            "train_171": CameraSplit({(1, 2): 32, (1, 3): 4, (2, 4): 4}, triples={(1, 2): 432, (3, 4): 48}),
            "test": CameraSplit({(1, 2): 24}, triples={(1, 2): 192}),
        },
    ),
    "full": Preset(
        "full",
        {
            "train_171": CameraSplit(
                {(1,): 56, (2,): 56, (3,): 4, (4,): 4, (1, 2): 47, (1, 3): 2, (2, 4): 2},
                triples={(1, 2): 3734, (3, 4): 217},
            ),
            "test": CameraSplit({(1, 2): 30}, triples={(1, 2): 836}),
        },
    ),
}

_FOUR, _EIGHT = (1, 2, 3, 4), (1, 2, 3, 4, 5, 6, 7, 8)
RGBNT100 = {
    "mini": Preset(
        "mini",
        {
            "bounding_box_train": CameraSplit({_FOUR: 16}, triples={_FOUR: 256}),
            "bounding_box_test": CameraSplit({_FOUR: 12}, triples={_FOUR: 120}, queries=40),
        },
    ),
    "full": Preset(
        "full",
        {
            "bounding_box_train": CameraSplit({_EIGHT: 50}, triples={_EIGHT: 8675}),
            "bounding_box_test": CameraSplit({_EIGHT: 50}, triples={_EIGHT: 8575}, queries=1715),
        },
    ),
}

MSVR310 = {
    "mini": Preset(
        "mini",
        {
            "bounding_box_train": SceneSplit({1: (12, 48), 2: (8, 72)}, num_scenes=6),
            "bounding_box_test": SceneSplit({1: (6, 20), 2: (10, 60)}, num_scenes=6, queries=30),
        },
    ),
    "full": Preset(
        "full",
        {
            "bounding_box_train": SceneSplit({1: (103, 450), 3: (52, 582)}, num_scenes=20),
            "bounding_box_test": SceneSplit({1: (103, 464), 3: (52, 591)}, num_scenes=20, queries=591),
        },
    ),
}

SETS = {
    "RGBNT201": SampleSet("RGBNT201", sample_identity, render_person, person.SIZE, layout.rgbnt201, RGBNT201),
    "RGBNT100": SampleSet(
        "RGBNT100",
        sample_vehicle,
        render_vehicle,
        vehicle.SIZE,
        layout.rgbnt100,
        RGBNT100,
        stream=("RGBNT100",),
    ),
    "MSVR310": SampleSet(
        "MSVR310",
        sample_vehicle,
        render_vehicle,
        vehicle.SIZE,
        layout.msvr310,
        MSVR310,
        stream=("MSVR310",),
    ),
}
"""By name. `full` counts as the published set does; `mini` is for two CPU cores.

In both vehicle sets the queries are part of the gallery, as they are in the published ones: the same files under the
same names, which the protocol leaves out of their own ranking. People are version 1 for good: models were trained on
them.
"""


def find_set(dataset: str) -> SampleSet:
    """The data set of that name.

    Raises:
        UserError: there is none.
    """
    if dataset not in SETS:
        raise UserError(f"dataset is '{dataset}': expected one of {', '.join(SETS)}.")
    return SETS[dataset]
