"""Running means that stay on the device until somebody reads them."""

import torch
from torch import Tensor


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
        """The means, read back in one transfer; NaN for a value that was never finite."""
        return dict(zip(self.names, (self.total / self.count).tolist(), strict=True))

    def state_dict(self) -> dict:
        return {"names": list(self.names), "total": self.total.clone().cpu(), "count": self.count.clone().cpu()}

    def load_state_dict(self, state: dict, device: torch.device) -> None:
        self.names = tuple(state["names"])
        self.total, self.count = (state[key].clone().to(device) for key in ("total", "count"))
