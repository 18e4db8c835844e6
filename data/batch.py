"""What training and evaluation iterate over."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """B triples.

    Attributes:
        images: modality -> (B, 3, H, W) float32, normalised; zeros where a sample lacks the modality.
        pid: (B,) int64, training labels 0..ids-1, in evaluation the identities as the files name them.
        camid: (B,) int64, cameras from 0.
        sceneid: (B,) int64, -1 where the data set has no scenes.
        index: (B,) int64, place in the list of training or of evaluation triples.
        path: B paths of the RGB images, or of the first modality that a sample has.
        present: (B, M) bool, which modalities each sample has; None where no sample of the data set lacks one.
    """

    images: dict[str, Tensor]
    pid: Tensor
    camid: Tensor
    sceneid: Tensor
    index: Tensor
    path: list[str]
    present: Tensor | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The batch on a device; paths stay as they are."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory, from which `to(device, non_blocking=True)` copies while the host goes on."""
        return self._map(torch.Tensor.pin_memory)

    def part(self, first: int, end: int) -> "Batch":
        """Triples first .. end - 1, as views."""
        return replace(self._map(lambda tensor: tensor[first:end]), path=self.path[first:end])

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        return replace(
            self,
            images={modality: function(image) for modality, image in self.images.items()},
            **{name: function(getattr(self, name)) for name in ("pid", "camid", "sceneid", "index")},
            present=None if self.present is None else function(self.present),
        )
