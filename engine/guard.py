"""Keeps a non-finite loss or gradient away from the weights without waiting for the device in every step."""

import torch
from torch import Tensor, nn

from utils.distributed import any_rank
from utils.errors import UserError


class NonFiniteError(UserError):
    """Training met a NaN or an infinity; the weights are those of the last good step."""


class FiniteGuard:
    """Watches losses and gradients, and blocks the update of a step in which one of them is not finite.

    The verdict is a flag on the device. Without a gradient scaler the first bad step raises it for good: no later
    step changes weights or batch statistics, and `raise_if_bad` (called where the host reads back anyway, and before
    every save) stops the training and tells what was not finite, and when. With the fp16 scaler, overflow is part of
    its search for a scale: such a step is skipped and counted. All ranks come to the same verdict.

    Args:
        model: its floating buffers (batch statistics) are restored after a bad step.
        optimizer: updated through `step`.
        scaler: a disabled one means no fp16.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler):
        self.optimizer, self.scaler = optimizer, scaler
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.names, self.parameters = tuple(named), list(named.values())
        stored = model.state_dict().keys()
        self.buffers = [b for n, b in model.named_buffers() if n in stored and b.is_floating_point()]
        self.saved = [b.clone() for b in self.buffers]
        device = self.parameters[0].device
        self.bad = torch.zeros((), dtype=torch.bool, device=device)
        self.bad_step = torch.full((), -1, dtype=torch.long, device=device)
        self.bad_values: Tensor | None = None  # of terms and gradients in that step
        self.term_names: tuple[str, ...] = ()
        self.skipped = torch.zeros((), dtype=torch.long, device=device)
        self.streak = torch.zeros((), dtype=torch.long, device=device)

    def before_forward(self) -> None:
        """Remembers the batch statistics, which a forward pass changes."""
        if self.buffers:
            torch._foreach_copy_(self.saved, self.buffers)

    def gradient_norms(self) -> Tensor:
        """Norm of every trainable parameter's gradient (P,), zero where there is none."""
        zero = self.parameters[0].new_zeros((), dtype=torch.float32)
        present = [i for i, p in enumerate(self.parameters) if p.grad is not None]
        norms = torch._foreach_norm([self.parameters[i].grad for i in present])
        result = [zero] * len(self.parameters)
        for i, norm in zip(present, norms, strict=True):
            result[i] = norm.float()
        return torch.stack(result)

    def step(self, step: int, terms: dict[str, Tensor], norms: Tensor) -> Tensor:
        """Updates the weights unless this step is bad.

        Args:
            step: global step, for the message.
            terms: the losses, 0-d tensors.
            norms: from `gradient_norms`, after unscaling.

        Returns:
            Whether this step was blocked, 0-d bool on the device.
        """
        bad_values = any_rank(~torch.cat([torch.stack([v.detach().float() for v in terms.values()]), norms]).isfinite())
        bad_now = bad_values.any()
        if self.scaler.is_enabled():
            self.skipped += bad_now
            self.streak = torch.where(bad_now, self.streak + 1, 0)
            blocked = bad_now
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            first = bad_now & ~self.bad
            self.bad_step = torch.where(first, step, self.bad_step)
            known = bad_values if self.bad_values is None else self.bad_values
            self.bad_values = torch.where(first, bad_values, known)
            self.term_names = tuple(terms)
            self.bad |= bad_now
            blocked = self.bad
            self._step_unless(blocked)
        if self.buffers:
            torch._foreach_copy_(
                self.buffers, [torch.where(blocked, s, b) for s, b in zip(self.saved, self.buffers, strict=True)]
            )
        return blocked

    def _step_unless(self, blocked: Tensor) -> None:
        if self.optimizer.defaults.get("fused"):  # the kernels read the flag on the device
            self.optimizer.grad_scale, self.optimizer.found_inf = None, blocked.float()
            self.optimizer.step()
            del self.optimizer.grad_scale, self.optimizer.found_inf
        elif not blocked:
            self.optimizer.step()

    def raise_if_bad(self, longest_streak: int = 100) -> None:
        """Reads the flag back.

        Raises:
            NonFiniteError: a step was bad; or, with the fp16 scaler, `longest_streak` steps in a row were skipped.
        """
        if self.scaler.is_enabled():
            if (streak := int(self.streak)) >= longest_streak:
                raise NonFiniteError(
                    f"{streak} steps in a row overflowed under fp16, the scale is down to {self.scaler.get_scale():g}. "
                    "Set SOLVER.AMP to bf16 or float32, or lower SOLVER.BASE_LR and BACKBONE_LR."
                )
            return
        if self.bad_values is None or not self.bad:
            return
        values = self.bad_values.tolist()
        terms = [name for name, bad in zip(self.term_names, values, strict=False) if bad]
        grads = [name for name, bad in zip(self.names, values[len(self.term_names) :], strict=True) if bad]
        what = []
        if terms:
            what.append(f"the loss terms {', '.join(terms)}")
        if grads:
            more = f" and {len(grads) - 3} more" if len(grads) > 3 else ""
            what.append(f"the gradients of {', '.join(grads[:3])}{more}")
        raise NonFiniteError(
            f"Not finite in step {int(self.bad_step)}: {'; '.join(what)}. The weights were left as they were before "
            "that step. Look for broken images, lower SOLVER.BASE_LR and BACKBONE_LR, set SOLVER.GRAD_CLIP, or try "
            "SOLVER.AMP float32."
        )
