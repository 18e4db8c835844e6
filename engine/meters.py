"""Running means that stay on the device until somebody reads them."""

import time

import torch
from torch import Tensor

from utils.distributed import gather_objects, is_main, rank, sum_over_ranks, world_size


class Readout:
    """Named 0-d tensors of one device on their way to the host: nobody waits for them until they are read.

    Args:
        parts: name of a part -> name -> value.

    Attributes:
        when: moment at which they were known to have arrived, of `time.perf_counter`.
    """

    def __init__(self, parts: dict[str, dict[str, Tensor]]):
        self.names = {part: tuple(values) for part, values in parts.items()}
        flat = torch.stack([value.detach().float() for values in parts.values() for value in values.values()])
        self.values = flat.to("cpu", non_blocking=flat.is_cuda)  # then into page-locked memory
        self.arrived = torch.cuda.current_stream(flat.device).record_event() if flat.is_cuda else None
        self.when = time.perf_counter()

    def read(self) -> dict[str, dict[str, float]]:
        """Waits for them, and for nothing that was launched later."""
        if self.arrived is not None:
            self.arrived.synchronize()
            self.arrived, self.when = None, time.perf_counter()
        values = iter(self.values.tolist())
        return {part: {name: next(values) for name in names} for part, names in self.names.items()}


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

    def means(self) -> dict[str, Tensor]:
        """The means over all ranks, 0-d tensors on the device; NaN for a value that was never finite."""
        total, count = sum_over_ranks(torch.stack([self.total, self.count]))
        return dict(zip(self.names, (total / count).unbind(), strict=True))

    def read(self) -> dict[str, float]:
        """`means`, read back in one transfer."""
        return Readout({"": self.means()}).read()[""]

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
