"""The training loss: identity classification and batch-hard triplets for every head, with a name for each term."""

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from yacs.config import CfgNode

from modeling.regions import region
from utils.errors import UserError

SMOOTHING = 0.1


def triplet_loss(features: Tensor, pid: Tensor, margin: float | None = None) -> Tensor:
    """Batch-hard triplet loss (Hermans et al., "In Defense of the Triplet Loss for Person Re-Identification", 2017).

    For each anchor, with d_ap its largest distance within its identity and d_an its smallest to another identity, the
    mean over the anchors of softplus(d_ap - d_an), or of max(0, d_ap - d_an + margin). Distances are Euclidean, not
    squared, between features as they are, in float32 at least.

    An anchor alone with its identity has d_ap = 0. A batch of one identity has no negatives: its loss is a zero that
    backward() accepts. Equal features have distance 0 and pass no gradient.

    Args:
        features: (B, D).
        pid: (B,) integers.
        margin: the hinge's margin; None for the soft margin.
    """
    with torch.autocast(features.device.type, enabled=False):
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        same = pid[:, None] == pid
        distance = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")
        d_ap = distance.masked_fill(~same, -math.inf).amax(dim=1)
        d_an = distance.masked_fill(same, math.inf).amin(dim=1)
        losses = F.softplus(d_ap - d_an) if margin is None else F.relu(d_ap - d_an + margin)
        return torch.where(same.all(), 0.0, losses).mean()


def make_loss(cfg: CfgNode, num_classes: int) -> "ReIDLoss":
    """The loss as the config asks for it."""
    return ReIDLoss(
        num_classes,
        id_weight=cfg.MODEL.ID_LOSS_WEIGHT,
        triplet_weight=cfg.MODEL.TRIPLET_LOSS_WEIGHT,
        smoothing=SMOOTHING if cfg.MODEL.IF_LABELSMOOTH == "on" else 0.0,
        margin=None if cfg.MODEL.NO_MARGIN else cfg.SOLVER.MARGIN,
        sdtps_weight=cfg.MODEL.SDTPS_LOSS_WEIGHT,
        sdtps_warmup_epochs=cfg.MODEL.SDTPS_WARMUP_EPOCHS,
    )


class ReIDLoss:
    """Sum over the heads of branch_weight * (id_weight * identity + triplet_weight * triplet).

    A term of weight 0 is computed for the log alone: it leaves the gradients of what only it uses at None.

    Args:
        num_classes: identities that the classifiers tell apart.
        id_weight, triplet_weight: weights of the two terms of every head.
        smoothing: label smoothing (Szegedy et al., 2016) of the identity term, spread over all classes.
        margin: of the triplet term; None for the soft margin.
        sdtps_weight: weight of the SDTPS head, and of its auxiliary one, once warmed up.
        sdtps_warmup_epochs: epochs in which they have weight 0; over as many again it rises to the full one.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        id_weight: float = 1.0,
        triplet_weight: float = 1.0,
        smoothing: float = SMOOTHING,
        margin: float | None = None,
        sdtps_weight: float = 1.0,
        sdtps_warmup_epochs: int = 0,
    ) -> None:
        self.num_classes = num_classes
        self.id_weight = id_weight
        self.triplet_weight = triplet_weight
        self.smoothing = smoothing
        self.margin = margin
        self.sdtps_weight = sdtps_weight
        self.sdtps_warmup_epochs = sdtps_warmup_epochs

    def __call__(
        self, output: Any, pid: Tensor, epoch: int, mined: tuple[dict[str, Tensor], Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch in an epoch (the first is 1).

        Args:
            output: has `logits`, head -> (B, num_classes), and `features`, which holds (B, D) under the same names.
            pid: (B,) labels from 0.
            mined: features and labels of the batch in which triplets are sought, where that is more than this one:
                the joined batch of all ranks.

        Returns:
            total: scalar, attached to the graph.
            terms: `id/<head>` and `triplet/<head>` -> scalar, without weight and without graph.

        Raises:
            UserError: every term has weight 0.
        """
        weighted, terms = [], {}
        features, pids = mined or (output.features, pid)
        for head, logits in output.logits.items():
            branch_weight = self.branch_weight(head, epoch)
            for name, weight, function, tensor, labels in (
                ("id", branch_weight * self.id_weight, self._identity_loss, logits, pid),
                ("triplet", branch_weight * self.triplet_weight, self._triplet_loss, features[head], pids),
            ):
                with torch.set_grad_enabled(weight > 0 and torch.is_grad_enabled()):
                    loss = function(tensor, labels)
                terms[f"{name}/{head}"] = loss.detach()
                if weight > 0:
                    weighted.append(weight * loss)
        if not weighted:
            raise UserError(
                f"epoch {epoch}: every loss of {', '.join(terms)} has weight 0, so there is nothing to learn; check "
                "MODEL.ID_LOSS_WEIGHT, TRIPLET_LOSS_WEIGHT, SDTPS_LOSS_WEIGHT and SDTPS_WARMUP_EPOCHS"
            )
        return torch.stack(weighted).sum(), terms

    def branch_weight(self, head: str, epoch: int) -> float:
        """The weight of a head in an epoch (the first is 1); only those of the SDTPS heads can differ from 1."""
        if head not in ("sdtps", "sdtps_aux"):
            return 1.0
        warmup = self.sdtps_warmup_epochs
        share = min(max((epoch - warmup) / warmup, 0.0), 1.0) if warmup else 1.0
        return self.sdtps_weight * share

    def uninformed(self, heads: Iterable[str], epoch: int) -> float:
        """The total that a network without any knowledge has: equal logits, and triplets whose distances are equal."""
        triplet = math.log(2) if self.margin is None else self.margin
        each = self.id_weight * math.log(self.num_classes) + self.triplet_weight * triplet
        return each * sum(self.branch_weight(head, epoch) for head in heads)

    @region
    def _identity_loss(self, logits: Tensor, pid: Tensor) -> Tensor:
        assert logits.shape[1] == self.num_classes, f"{logits.shape[1]} logits for {self.num_classes} classes"
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, pid, label_smoothing=self.smoothing)

    @region
    def _triplet_loss(self, features: Tensor, pid: Tensor) -> Tensor:
        return triplet_loss(features, pid, self.margin)
