"""The training loss: identity classification and batch-hard triplets for every head, with a name for each term."""

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from yacs.config import CfgNode

from modeling.regions import region
from utils.distributed import gather_alike, share
from utils.errors import UserError

SMOOTHING = 0.1


def triplet_loss(features: Tensor, pid: Tensor, margin: float | None = None, joined: bool = False) -> Tensor:
    """Batch-hard triplet loss (Hermans et al., "In Defense of the Triplet Loss for Person Re-Identification", 2017).

    For each anchor, with d_ap its largest distance within its identity and d_an its smallest to another identity, the
    mean over the anchors of softplus(d_ap - d_an), or of max(0, d_ap - d_an + margin). Distances are Euclidean, not
    squared, between features as they are, in float32 at least.

    Equally hard ones share the gradient. An anchor alone with its identity has d_ap = 0. A batch of one identity has no
    negatives: its loss is a zero that backward() accepts. Equal features have distance 0 and pass no gradient.

    Args:
        features: (..., B, D); losses are apart for what stands before the batch.
        pid: (B,) integers.
        margin: the hinge's margin; None for the soft margin.
        joined: the batch is that of all ranks, in equal parts, and every rank computes this: they share the distances.

    Returns:
        (...)
    """
    with torch.autocast(features.device.type, enabled=False):
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        same = pid[:, None] == pid
        distance = _joined_distances(features) if joined else _Distances.apply(features, False)
        d_ap = distance.masked_fill(~same, -math.inf).amax(dim=-1)
        d_an = distance.masked_fill(same, math.inf).amin(dim=-1)
        losses = F.softplus(d_ap - d_an) if margin is None else F.relu(d_ap - d_an + margin)
        return torch.where(same.all(), 0.0, losses).mean(dim=-1)


class _Distances(torch.autograd.Function):
    """Euclidean distances of all pairs, (..., B, D) -> (..., B, B).

    The gradient is a product with a (B, B) matrix, where that of torch.cdist visits all pairs once for each side.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, joined: bool) -> Tensor:  # type: ignore[override]
        own = share(features.shape[-2]) if joined else range(features.shape[-2])
        rows = features[..., own.start : own.stop, :]
        distance = torch.cdist(rows, features, compute_mode="donot_use_mm_for_euclid_dist")
        if joined:
            distance = gather_alike(distance.movedim(-2, 0)).flatten(0, 1).movedim(0, -2)
        ctx.save_for_backward(features, distance)
        return distance

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        features, distance = ctx.saved_tensors
        pull = torch.where(distance > 0, grad / distance, 0.0)
        pull = pull + pull.mT
        features = features - features.mean(-2, keepdim=True)  # their differences are exact where they lie close
        return pull.sum(-1, keepdim=True) * features - pull @ features, None


@torch.compiler.disable
def _joined_distances(features: Tensor) -> Tensor:
    """Each rank computes the rows of its own part: of R ranks, the whole would be R^2 times what one of them needs."""
    return _Distances.apply(features, True)


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
                the joined batch of all ranks, all of which call.

        Returns:
            total: scalar, attached to the graph.
            terms: `id/<head>` and `triplet/<head>` -> scalar, without weight and without graph.

        Raises:
            UserError: every term has weight 0.
        """
        features, pids = mined or (output.features, pid)
        losses: dict[str, Tensor] = {}
        weights: dict[str, float] = {}
        for name, own_weight, function, tensors, more in (
            ("id", self.id_weight, self._identity_losses, output.logits, (pid,)),
            ("triplet", self.triplet_weight, self._triplet_losses, features, (pids, mined is not None)),
        ):
            own = {head: own_weight * self.branch_weight(head, epoch) for head in output.logits}
            kinds = {head: (own[head] > 0, tensors[head].dtype, tensors[head].shape) for head in own}
            for heads in _alike(kinds):
                with torch.set_grad_enabled(own[heads[0]] > 0 and torch.is_grad_enabled()):
                    found = function(torch.stack([tensors[head] for head in heads]), *more)
                losses.update(zip([f"{name}/{head}" for head in heads], found, strict=True))
            weights.update({f"{name}/{head}": weight for head, weight in own.items()})
        terms = {f"{name}/{head}": losses[f"{name}/{head}"].detach() for head in own for name in ("id", "triplet")}
        weighted = [weights[name] * losses[name] for name in terms if weights[name] > 0]
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
    def _identity_losses(self, logits: Tensor, pid: Tensor) -> Tensor:
        """Logits of some heads (G, B, num_classes) -> (G,)."""
        assert logits.shape[2] == self.num_classes, f"{logits.shape[2]} logits for {self.num_classes} classes"
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = F.cross_entropy(
            logits.flatten(0, 1), pid.repeat(len(logits)), label_smoothing=self.smoothing, reduction="none"
        )
        return losses.unflatten(0, logits.shape[:2]).mean(1)

    @region
    def _triplet_losses(self, features: Tensor, pid: Tensor, joined: bool) -> Tensor:
        """Features of some heads (G, B, D) -> (G,)."""
        return triplet_loss(features, pid, self.margin, joined)


def _alike(kinds: dict[str, Any]) -> list[list[str]]:
    """Heads of equal kinds together."""
    groups: dict[Any, list[str]] = {}
    for head, kind in kinds.items():
        groups.setdefault(kind, []).append(head)
    return list(groups.values())
