"""Running means that stay on the device until somebody reads them."""

import torch
from torch import Tensor

from utils.distributed import gather_objects, is_main, rank, sum_over_ranks, world_size


class Meters:
    """Means of named scalars over the steps since the last reset; a non-finite value is left out of its mean."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.names: tuple[str, ...] = ()
        self.total = self.count = torch.zeros(0)

    def update(self, values: dict[str, Tensor]) -> None:
        """Adds one step of 0-d tensors on one device; other names than in the step before begin anew."""
        stacked = torch.stack([v.detach().float() for v in values.values()])
        if self.names != tuple(values):
            self.names = tuple(values)
            self.total, self.count = torch.zeros_like(stacked), torch.zeros_like(stacked)
        finite = stacked.isfinite()
        self.total += torch.where(finite, stacked, 0.0)
        self.count += finite

    def read(self) -> dict[str, float]:
        """The means over all ranks, read back in one transfer; NaN for a value that was never finite."""
        total, count = sum_over_ranks(torch.stack([self.total, self.count]))
        return dict(zip(self.names, (total / count).tolist(), strict=True))

    def state_dict(self) -> dict:
        """Names, and the sums of each rank as a row (R, names)."""
        total, count = zip(*gather_objects((self.total.cpu(), self.count.cpu())), strict=True)
        return {"names": list(self.names), "total": torch.stack(total), "count": torch.stack(count)}

    def load_state_dict(self, state: dict, device: torch.device) -> None:
        """Takes each rank's own row; of a run with another number of ranks, the main rank takes the sum."""
        self.names = tuple(state["names"])
        self.total, self.count = (self._own(state[key].to(device)) for key in ("total", "count"))

    @staticmethod
    def _own(rows: Tensor) -> Tensor:
        rows = rows.reshape(-1, rows.shape[-1])
        if len(rows) == world_size():
            return rows[rank()].clone()
        return rows.sum(0) if is_main() else torch.zeros_like(rows[0])
