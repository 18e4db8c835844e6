"""Tells a sick run early, from the numbers that the loop writes anyway: each finding names the figure, what it means,
and the key to change.

A rule is a few lines in one of `Diagnosis`'s four methods, each of which looks at one kind of record. The thresholds
leave the shipped sample runs of a finetuned ViT silent; the reason beside each says what healthy runs show.
"""

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from configs.validate import MIN_IDENTITIES
from solver.make_loss import ReIDLoss
from utils.logging import MetricsWriter

log = logging.getLogger(__name__)

SCORE_EXPLODES = 100.0
"""Score over value gradient: 0.1 to 0.3 in finetuned runs, 2 with random ViT-B, up to 20 at moments in toy networks of
random weights; an unbounded mask term gives 1e9."""
SCORE_STARVES = 0.003
"""The same ratio: 0.0016 where no similarity is attached and the scores only choose, 0.04 where all are."""
SATURATED_MEAN = 0.02
"""Distance of the mean prediction from 0 or 1: a sigmoid's slope there is under a twelfth of the one in the middle."""
SATURATED_SPREAD = 0.005
"""Spread of the predictions inside an image; 0.02 at the start, before the predictor has learned anything."""
COLLAPSED_SPREAD = 0.2
"""Share of the first spread seen: in healthy runs the spread grows, or stays within a tenth."""
FLAT_IMPORTANCE = 0.1
"""Range of the kept scores over tau: the best patch outweighs the worst by a tenth; 1.0 to 2.2 in finetuned runs."""
SKIPPED_SHARE = 0.05
"""Share of an epoch's steps skipped under fp16; growing the scale costs one step in 2000."""
SCALE_SEARCH = 16
"""Steps that a run may skip at its start: the scale begins at 2^16."""
LEARNING_STEPS = 50
"""Steps before a loss or an accuracy is judged; a finetuned ViT is far from chance by then."""
UNINFORMED_SHARE = 0.97
"""Share of the loss of a network that knows nothing; random ViT-B is at 0.88 after its warm-up, CLIP at 0.83 after 2
epochs."""
UNINFORMED_ID = 0.95
"""Share of ln(ids) that an uninformed identity term keeps: long distances alone can make a triplet term large."""
LEARNED_ACCURACY = 0.2
"""Accuracy under which such a loss is told whatever its identity term; a sick run was at 0.05 after 4 epochs."""
CHANCE_FACTOR = 2.0
"""Accuracy over that of guessing; a CLIP backbone is at 9 times chance after one epoch, a random one at 5 after two."""
GRADIENT_VANISHES = 1e-3
"""Backbone's gradient norm over the heads': 1 to 2 in every healthy run."""
GRADIENT_GROWS = 30.0
"""Backbone's gradient norm over that of the first window; in healthy runs it stays within a few times that."""
NORM_IMBALANCE = 10.0
"""Largest over smallest feature norm of two branches: the smaller one is 1 % of the squared distances of `both`."""
AGREEMENT = 0.95
"""Intersection over union of two modalities' kept sets: 0.3 to 0.6 in healthy runs, a third by chance at ratio 0.5."""
FIXED_PLACES = 0.95
"""Spread of the kept share over the cells, over its largest possible value: 0.2 to 0.75 in healthy runs."""
RATIO_ONE = 0.9
"""Above this SDTPS_SPARSE_RATIO nearly all is kept, and the same places by necessity."""


@dataclass(frozen=True)
class Finding:
    """A rule that fired: its name, the figure that it looked at, what to tell, and how loudly."""

    rule: str
    value: float
    message: str
    level: int = logging.WARNING


class Diagnosis:
    """Rules over the records of a run; call it with each record, in order.

    Args:
        cfg: the resolved config; tells which figures are on purpose.
        loss_fn: tells the weights of the heads and the loss of a network that knows nothing.
        step: the global step after which this process begins; where a run is resumed, its figures begin anew.
    """

    def __init__(self, cfg: CfgNode, loss_fn: ReIDLoss, step: int = 0):
        self.cfg, self.loss_fn = cfg, loss_fn
        self.told: dict[str, int] = {}  # rule -> epoch in which it was told last
        # random weights need the whole warm-up to come to anything, and their tokens are much alike until then
        self.patience = 0 if cfg.MODEL.PRETRAINED else max(0, cfg.SOLVER.WARMUP_ITERS - 1)
        self.first: dict[str, float] = {}  # name -> the first value seen of what is compared with its start
        self.epoch, self.step = -1, step
        self.first_step = self.epoch_step = step  # before the process, and before the epoch under way
        self.skipped = self.epoch_skipped = 0.0
        self.rules: dict[str, Callable[[dict[str, float]], Iterator[Finding]]] = {
            "probe": self._probe,
            "train": self._train,
            "epoch": self._whole_epoch,
            "eval": self._evaluation,
        }

    def __call__(self, kind: str, step: int, epoch: int, values: dict[str, float]) -> list[Finding]:
        """What is wrong in a record, each rule once an epoch; what is on purpose is told once a run, as information.

        Args:
            kind: "probe", "train", "epoch" or "eval"; of others only what is not finite is told.
            step: global step.
            epoch: from 1; 0 is the evaluation before training.
            values: name -> number.
        """
        if epoch != self.epoch:
            self.epoch, self.epoch_step, self.epoch_skipped = epoch, self.step, self.skipped
        self.step = step
        found = [*_non_finite(values), *(self.rules[kind](values) if kind in self.rules else ())]
        fresh = []
        for finding in found:
            once = finding.level < logging.WARNING and finding.rule in self.told
            if not once and self.told.get(finding.rule) != epoch:
                self.told[finding.rule] = epoch
                fresh.append(finding)
        return fresh

    def _probe(self, s: dict[str, float]) -> Iterator[Finding]:
        """The sdtps branch's gradient at the backbone, through scores and through values."""
        if "backbone_score" not in s:
            return
        score, value, m = s["backbone_score"], s["backbone_value"], self.cfg.MODEL
        ratio = score / max(value, 1e-12)
        seen = f"the backbone's gradient through the scores is {score:.2g}, {ratio:.2g} times that through the values"
        if ratio > SCORE_EXPLODES:
            yield Finding(
                "score_gradient_explodes",
                ratio,
                f"{seen}: the score path rules the backbone, and overflows under fp16. Set MODEL.SDTPS_TEMPERATURE up "
                "(0.3 is usual, 0.1 the lowest); if it was changed, look at how the scores enter the aggregation.",
            )
        elif m.SDTPS_SCORE_GRAD == "none" or m.SDTPS_TEMPERATURE == 0:
            key = "MODEL.SDTPS_SCORE_GRAD none" if m.SDTPS_SCORE_GRAD == "none" else "MODEL.SDTPS_TEMPERATURE 0"
            yield Finding(
                "score_gradient_off",
                ratio,
                f"{seen}: {key} leaves the scores without what the kept patches could teach them. If that is not meant "
                "as a control, set MODEL.SDTPS_SCORE_GRAD all and MODEL.SDTPS_TEMPERATURE 0.3.",
                logging.INFO,
            )
        elif ratio < SCORE_STARVES:
            yield Finding(
                "score_gradient_starves",
                ratio,
                f"{seen}: the scores hardly learn. Set MODEL.SDTPS_TEMPERATURE down ({m.SDTPS_TEMPERATURE:g} now, 0.3 "
                f"is usual) and MODEL.SDTPS_SCORE_GRAD all ({m.SDTPS_SCORE_GRAD} now).",
            )

    def _train(self, s: dict[str, float]) -> Iterator[Finding]:
        """A window of steps."""
        yield from self._identities()
        yield from self._backbone_gradient(s)
        yield from self._skipped_steps(s)
        yield from self._scores(s)

    def _identities(self) -> Iterator[Finding]:
        solver, instances = self.cfg.SOLVER, self.cfg.DATALOADER.NUM_INSTANCE
        identities = solver.IMS_PER_BATCH // (solver.ACCUMULATION * instances)
        if identities < MIN_IDENTITIES and "few_identities" not in self.told:
            yield Finding(
                "few_identities",
                identities,
                f"{identities} identities in each micro-batch of {identities * instances} triples: batch-hard triplets "
                "find few hard negatives, and the BNNeck's statistics are noise. Set SOLVER.IMS_PER_BATCH up "
                f"({solver.IMS_PER_BATCH} now), DATALOADER.NUM_INSTANCE ({instances}) or SOLVER.ACCUMULATION "
                f"({solver.ACCUMULATION}) down, to {MIN_IDENTITIES} identities or more.",
            )

    def _backbone_gradient(self, s: dict[str, float]) -> Iterator[Finding]:
        norm, heads = s.get("grad_norm/backbone", math.nan), s.get("grad_norm/heads", math.nan)
        start = self._start("grad_norm/backbone", norm)
        if norm < GRADIENT_VANISHES * heads:
            yield Finding(
                "backbone_gradient_vanishes",
                norm,
                f"the backbone's gradient norm is {norm:.2g}, the heads' {heads:.2g}: next to nothing reaches the "
                "backbone. Look at MODEL.PRETRAIN_PATH_T (do these weights belong to this backbone?) and "
                "MODEL.TRIPLET_LOSS_WEIGHT; lower SOLVER.BASE_LR if the features have collapsed.",
            )
        if norm > GRADIENT_GROWS * start:
            yield Finding(
                "backbone_gradient_grows",
                norm,
                f"the backbone's gradient norm is {norm:.2g}, at the beginning it was {start:.2g}: training runs away. "
                "Lower SOLVER.BACKBONE_LR and SOLVER.BASE_LR, lengthen SOLVER.WARMUP_ITERS, or set SOLVER.GRAD_CLIP.",
            )

    def _skipped_steps(self, s: dict[str, float]) -> Iterator[Finding]:
        if "skipped_steps" not in s:
            return
        self.skipped = s["skipped_steps"]
        steps, skipped = self.step - self.epoch_step, self.skipped - self.epoch_skipped
        skipped -= SCALE_SEARCH if self.epoch_step == self.first_step else 0
        if steps > 0 and skipped > SKIPPED_SHARE * steps:
            yield Finding(
                "skipped_steps",
                skipped / steps,
                f"{self.skipped - self.epoch_skipped:.0f} of the {steps} steps of this epoch overflowed under fp16 and "
                f"were skipped (scale {s.get('scale', math.nan):g}): their images teach nothing. Set SOLVER.AMP bf16 "
                "or float32, or lower SOLVER.BASE_LR and BACKBONE_LR.",
            )

    def _scores(self, s: dict[str, float]) -> Iterator[Finding]:
        """What SDTPS's scores look like, in each modality."""
        m = self.cfg.MODEL
        for name, spread in _of(s, "sdtps/predicted_spread/") if m.SDTPS_BETA < 0.5 else ():
            start, mean = self._start(name, spread), s.get(name.replace("_spread", "_mean"), 0.5)
            if spread < SATURATED_SPREAD and min(mean, 1 - mean) < SATURATED_MEAN:
                yield Finding(
                    "predictor_saturated",
                    mean,
                    f"{name} is {spread:.2g} around a mean of {mean:.2g}: the sigmoid is saturated, so that the "
                    "predictor tells no patches apart and learns no more. Lower SOLVER.SDTPS_LR_FACTOR "
                    f"({self.cfg.SOLVER.SDTPS_LR_FACTOR:g} now), or leave the score to the similarities: "
                    "MODEL.SDTPS_BETA 0.5.",
                )
            elif spread < COLLAPSED_SPREAD * start:
                yield Finding(
                    "predictor_collapses",
                    spread,
                    f"{name} is {spread:.2g}, at the beginning it was {start:.2g}: the predictor scores all patches "
                    f"alike. Set MODEL.SDTPS_SCORE_GRAD all ({m.SDTPS_SCORE_GRAD} now), lower SOLVER.WEIGHT_DECAY or "
                    f"SOLVER.SDTPS_LR_FACTOR ({self.cfg.SOLVER.SDTPS_LR_FACTOR:g} now).",
                )
        if m.SDTPS_TEMPERATURE == 0 or self.epoch <= self.patience:
            return
        for name, kept_range in _of(s, "sdtps/kept_range/"):
            weight = kept_range / m.SDTPS_TEMPERATURE
            if weight < FLAT_IMPORTANCE:
                yield Finding(
                    "importance_flat",
                    weight,
                    f"{name} is {kept_range:.2g}, {weight:.2g} of MODEL.SDTPS_TEMPERATURE: the best kept patch weighs "
                    f"{math.exp(weight):.2f} times the worst, so that importance hardly matters. Set "
                    f"MODEL.SDTPS_TEMPERATURE down ({m.SDTPS_TEMPERATURE:g} now, not under 0.1); if the loss does not "
                    "fall either, the patches are all alike: look at SOLVER.BACKBONE_LR first.",
                )

    def _whole_epoch(self, s: dict[str, float]) -> Iterator[Finding]:
        """The means of an epoch's losses and of its accuracy."""
        m, solver = self.cfg.MODEL, self.cfg.SOLVER
        if self.step < LEARNING_STEPS or self.epoch <= self.patience:
            return
        rates = f"SOLVER.BACKBONE_LR ({solver.BACKBONE_LR:g} now: 5e-6 suits CLIP, 1e-4 to 3e-4 random weights)"
        chance = 1 / self.loss_fn.num_classes
        if s.get("acc", math.nan) < CHANCE_FACTOR * chance:
            yield Finding(
                "accuracy_at_chance",
                s["acc"],
                f"the accuracy of epoch {self.epoch} is {100 * s['acc']:.2g} %, guessing gives {100 * chance:.2g} %: "
                f"nothing is learned yet. Look at {rates}, MODEL.PRETRAINED ({m.PRETRAINED}) and the identities in a "
                "batch (SOLVER.IMS_PER_BATCH, DATALOADER.NUM_INSTANCE).",
            )
        stuck, losses, levels = [], 0.0, 0.0
        for head in [name.removeprefix("id/") for name in s if name.startswith("id/")]:
            wait = self.patience + 1 + (2 * m.SDTPS_WARMUP_EPOCHS if head.startswith("sdtps") else 0)
            loss, level, share = self._loss_of_head(head, s)
            knows_nothing = share >= UNINFORMED_ID or s.get("acc", math.nan) < LEARNED_ACCURACY
            if self.epoch > wait and level > 0 and loss >= UNINFORMED_SHARE * level and knows_nothing:
                stuck.append(head)
                losses, levels = losses + loss, levels + level
        if stuck:
            yield Finding(
                "loss_uninformed",
                losses / levels,
                f"the loss of {', '.join(stuck)} in epoch {self.epoch} is {losses:.2f}, a network that knows nothing "
                f"has {levels:.2f}: nothing is learned yet. Look at {rates}, SOLVER.BASE_LR ({solver.BASE_LR:g} now), "
                "and the identities in a batch (SOLVER.IMS_PER_BATCH, DATALOADER.NUM_INSTANCE).",
            )

    def _loss_of_head(self, head: str, s: dict[str, float]) -> tuple[float, float, float]:
        """A head's loss, that of a head that knows nothing, and its identity term over ln(ids), 1 if it has none."""
        loss_fn, identity = self.loss_fn, s[f"id/{head}"]
        terms = loss_fn.id_weight * identity + loss_fn.triplet_weight * s[f"triplet/{head}"]
        share = identity / math.log(loss_fn.num_classes) if loss_fn.id_weight > 0 else 1.0
        return loss_fn.branch_weight(head, self.epoch) * terms, loss_fn.uninformed([head], self.epoch), share

    def _evaluation(self, s: dict[str, float]) -> Iterator[Finding]:
        """Features and choices on test images, after training has begun."""
        if self.epoch == 0:
            return
        norms = {name: value for name, value in _of(s, "feature_norm/") if name != "feature_norm/both"}
        if len(norms) > 1 and not self.cfg.TEST.BRANCH_NORM:
            (small, low), *_, (large, high) = sorted(norms.items(), key=lambda item: item[1])
            if high > NORM_IMBALANCE * low:
                yield Finding(
                    "branch_norms_differ",
                    high / max(low, 1e-12),
                    f"{large} is {high:.3g}, {small} {low:.2g}: the smaller branch has no say in `both`. Set "
                    "TEST.BRANCH_NORM True (test_net.py does without training again).",
                )
        ratio = self.cfg.MODEL.SDTPS_SPARSE_RATIO
        if ratio > RATIO_ONE:
            return
        advice = "Look at pictures/; set MODEL.SDTPS_GLOBAL class, MODEL.SDTPS_BETA towards 0.25."
        for name, agreement in _of(s, "sdtps/agreement/"):
            if agreement > AGREEMENT:
                yield Finding(
                    "choices_agree",
                    agreement,
                    f"{name} is {agreement:.2f}: the modalities keep the same patches, as if they were one image. "
                    f"{advice}",
                )
        for name, spread in _of(s, "sdtps/cell_spread/"):
            largest = math.sqrt(ratio * (1 - ratio))
            if spread > FIXED_PLACES * largest:
                yield Finding(
                    "choice_ignores_image",
                    spread,
                    f"{name} is {spread:.2f} of at most {largest:.2f}: the same places are kept in every image, "
                    f"whatever it shows. {advice}",
                )

    def _start(self, name: str, value: float) -> float:
        """The first finite value seen under this name."""
        return self.first.setdefault(name, value) if math.isfinite(value) else math.nan


class DiagnosingWriter(MetricsWriter):
    """A MetricsWriter that diagnoses what it writes: findings go to the log, and as records of kind "diagnosis"."""

    def __init__(self, output_dir: str | Path, diagnosis: Diagnosis, resume_step: int | None = None):
        super().__init__(output_dir, resume_step)
        self.diagnosis = diagnosis

    def scalars(self, step: int, epoch: float, values: dict[str, Any], kind: str = "train") -> None:
        super().scalars(step, epoch, values, kind)
        numbers = {name: float(value) for name, value in values.items()}
        for finding in self.diagnosis(kind, step, int(epoch), numbers):
            log.log(finding.level, "diagnosis %s: %s", finding.rule, finding.message)
            super().scalars(step, epoch, {finding.rule: finding.value}, kind="diagnosis")


def _non_finite(s: dict[str, float]) -> Iterator[Finding]:
    names = [name for name, value in s.items() if not math.isfinite(value)]
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        yield Finding(
            "non_finite",
            len(names),
            f"not finite in any step: {', '.join(names[:3])}{more}. Look for broken images, set SOLVER.AMP bf16 or "
            "float32, lower SOLVER.BASE_LR and BACKBONE_LR, or set SOLVER.GRAD_CLIP.",
        )


def _of(s: dict[str, float], prefix: str) -> list[tuple[str, float]]:
    """The values whose names begin so."""
    return [(name, value) for name, value in s.items() if name.startswith(prefix)]
