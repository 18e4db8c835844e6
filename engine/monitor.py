"""What to watch while SDTPS learns: statistics of its scores and choices, and how its gradient reaches the backbone."""

import functools
from itertools import combinations

import torch
from torch import Tensor

from data import Batch
from modeling import ReIDModel, ReIDOutput
from modeling.regions import uncompiled
from modeling.sdtps import Selection
from solver.make_loss import ReIDLoss
from solver.make_optimizer import group_of
from utils.distributed import sum_over_ranks
from utils.modalities import MODALITIES


class PartNorms:
    """Joins the gradient norms of single parameters to those of the parts that learn together: backbone, heads, sdtps.

    Args:
        names: of the parameters, in the order in which their norms will come.
        device: where the norms are.
    """

    def __init__(self, names: tuple[str, ...], device: torch.device):
        parts = [group_of(name).partition(".")[0] for name in names]
        self.parts = (*sorted(set(parts)), "total")
        members = [[part in (own, "total") for own in parts] for part in self.parts]
        self.members = torch.tensor(members, device=device)  # (parts, P)

    def __call__(self, norms: Tensor) -> dict[str, Tensor]:
        """norms (P,) -> the norm of each part and the total, 0-d tensors on the device."""
        totals = torch.where(self.members, norms.square(), 0.0).sum(dim=1).sqrt()
        return {f"grad_norm/{part}": total for part, total in zip(self.parts, totals.unbind(), strict=True)}


def selection_statistics(selection: Selection) -> dict[str, Tensor]:
    """Mean over the batch, per modality:

    - `predicted_spread`: standard deviation of the predictor's score inside an image; near 0 it tells patches apart
      no more, or is saturated;
    - `predicted_mean`: its mean; a spread near 0 with a mean near 0 or 1 is saturation;
    - `kept_range`: best minus worst score among the kept patches; over tau it is how much importance can weigh.
    """
    result = {}
    for m in MODALITIES:
        kept = selection.scores[m].gather(-1, selection.kept[m])
        result[f"sdtps/predicted_spread/{m}"] = selection.predicted[m].std(-1, correction=0).mean()
        result[f"sdtps/predicted_mean/{m}"] = selection.predicted[m].mean()
        result[f"sdtps/kept_range/{m}"] = (kept.amax(-1) - kept.amin(-1)).mean()
    return result


class SelectionMonitor:
    """Gathers over an evaluation: the statistics above, agreement of modalities, and where the kept patches lie.

    Args:
        person: (images, N) bool, which patches show the person, for all images of the evaluation, on the device of the
            selections; None if that is not known.
    """

    def __init__(self, person: Tensor | None = None):
        self.images = 0
        self.sums: dict[str, Tensor] = {}
        self.cells: dict[str, Tensor] = {}
        self.person = person
        self.person_patches: Tensor | int = 0
        self.person_kept: dict[str, Tensor] = {}

    def update(self, selection: Selection, index: Tensor | None = None) -> None:
        """Adds a batch; index (B,) is the place of its images in `person`."""
        batch = len(selection.mask["RGB"])
        self.images += batch
        values = selection_statistics(selection)
        for a, b in combinations(MODALITIES, 2):
            both = (selection.mask[a] & selection.mask[b]).sum(-1)
            either = (selection.mask[a] | selection.mask[b]).sum(-1)
            values[f"sdtps/agreement/{a}-{b}"] = (both / either).mean()  # intersection over union of the kept sets
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value * batch
        for m in MODALITIES:
            self.cells[m] = self.cells.get(m, 0) + selection.mask[m].sum(0)
        if self.person is not None and index is not None:
            person = self.person[index]
            self.person_patches += person.sum()
            for m in MODALITIES:
                self.person_kept[m] = self.person_kept.get(m, 0) + (selection.mask[m] & person).sum()

    def join_ranks(self) -> None:
        """Puts together what the ranks have seen of their shares."""
        sums = torch.stack(list(self.sums.values())).double()
        self.images = int(sum_over_ranks(torch.tensor(self.images, device=sums.device)))
        self.sums = dict(zip(self.sums, sum_over_ranks(sums), strict=True))
        self.cells = {m: sum_over_ranks(count) for m, count in self.cells.items()}
        if isinstance(self.person_patches, Tensor):
            self.person_patches = sum_over_ranks(self.person_patches)
            self.person_kept = {m: sum_over_ranks(count) for m, count in self.person_kept.items()}

    def read(self) -> dict[str, float]:
        """Means over the images, and over all their patches:

        - `cell_spread`: standard deviation of the share of images that keep a patch, over the grid's cells: 0 if every
          place is kept alike, the higher the more the choice hangs on the place alone;
        - `person_recall`: share of the person's patches that were kept; `person_precision`: share of the kept patches
          that are the person's. Their `chance` is what patches kept at random give.

        Empty where nothing was seen.
        """
        if not self.images:
            return {}
        sums = torch.stack(list(self.sums.values())).tolist()
        result = {name: value / self.images for name, value in zip(self.sums, sums, strict=True)}
        cells = dict(zip(self.cells, torch.stack(list(self.cells.values())).cpu(), strict=True))
        for m, count in cells.items():
            result[f"sdtps/cell_spread/{m}"] = float((count / self.images).std(correction=0))
        if isinstance(self.person_patches, Tensor):
            person, *found = torch.stack([self.person_patches, *self.person_kept.values()]).tolist()
            for m, hits in zip(self.person_kept, found, strict=True):
                kept, patches = int(cells[m].sum()), self.images * len(cells[m])
                result[f"sdtps/person_recall/{m}"] = hits / max(person, 1)
                result[f"sdtps/person_precision/{m}"] = hits / kept
                result["sdtps/person_recall/chance"] = kept / patches
                result["sdtps/person_precision/chance"] = person / patches
        return result

    def cell_share(self) -> dict[str, Tensor]:
        """Per modality (N,): the share of images that keep each patch."""
        return {m: (count / self.images).cpu() for m, count in self.cells.items()}


PROBE_SAMPLES = 16
"""Of a batch, that the gradient probe looks at."""


def probe_is_sparing(at_once: int, dtype: torch.dtype | None) -> bool:
    """Whether the gradient probe checkpoints the backbone: where its samples are no small part of those that a step
    takes at once, or of twice the size, it would need much memory beside what a recorded step keeps for itself.

    Args:
        at_once: samples of a micro-batch.
        dtype: autocast type of the step; the probe has bf16 or float32.
    """
    return at_once < 4 * PROBE_SAMPLES or dtype is torch.float16


def score_gradient_probe(
    model: ReIDModel,
    batch: Batch,
    loss_fn: ReIDLoss,
    epoch: int,
    dtype: torch.dtype | None = None,
    sparing: bool = True,
) -> dict[str, Tensor]:
    """How the sdtps branch's loss reaches the backbone: gradient norms in total, through values and through scores, 0-d
    tensors on the device.

    Encodes once, in evaluation mode, and differentiates twice, once with the scores attached as the model has them and
    once detached; it changes no weight, no batch statistics and no gradient of the caller. Empty if the branch
    does not train in this epoch or the backbone is frozen. fp16 would lose small gradients without a scaler, so that
    float32 takes its place. Of several ranks, each looks at its own samples alone.

    Args:
        sparing: checkpoint the backbone also where the model does not; see `probe_is_sparing`.
    """
    dtype = None if dtype is torch.float16 else dtype
    parameters = [p for p in model.backbone.parameters() if p.requires_grad]
    if model.sdtps is None or not parameters or loss_fn.branch_weight("sdtps", epoch) == 0:
        return {}
    score_grad, training, checkpointed = model.sdtps.score_grad, model.training, model.backbone.grad_checkpointing
    gradients: list[list[Tensor]] = []
    precision = functools.partial(torch.autocast, batch.pid.device.type, dtype=dtype, enabled=dtype is not None)
    model.eval()
    model.backbone.set_grad_checkpointing(checkpointed or sparing)
    try:
        with uncompiled(model, loss_fn):  # what is checkpointed is computed again in the backward pass
            with precision():
                encoded = model.encode(batch.images, batch.camid, batch.present)
            for mode in (score_grad, "none"):
                model.sdtps.score_grad = mode
                with precision():
                    output = model.decode(encoded)
                    alone = ReIDOutput({"sdtps": output.features["sdtps"]}, {"sdtps": output.logits["sdtps"]})
                    loss, _ = loss_fn(alone, batch.pid, epoch)
                grads = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=not gradients)
                gradients.append(
                    [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]
                )
    finally:
        model.sdtps.score_grad = score_grad
        model.backbone.set_grad_checkpointing(checkpointed)
        model.train(training)
    total, value = gradients
    norms = {"total": total, "value": value, "score": torch._foreach_sub(total, value)}
    return {f"backbone_{k}": torch.nn.utils.get_total_norm(g) for k, g in norms.items()}
