"""The classification head of every branch."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling.batch_norm import SyncedBatchNorm1d


class BNNeck(nn.Module):
    """Batch normalisation without shift, then a linear classifier (Luo et al., Bag of Tricks for re-ID, 2019).

    Metric losses see the feature before the normalisation, the classifier the one behind it.
    """

    def __init__(self, feature_dim: int, num_classes: int):
        super().__init__()
        self.bottleneck = SyncedBatchNorm1d(feature_dim)
        self.bottleneck.bias.requires_grad_(False)
        self.classifier = Classifier(feature_dim, num_classes)
        nn.init.normal_(self.classifier.weight, std=0.001)

    def forward(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """feature (B, D) -> normalised feature (B, D) and logits (B, ids)."""
        normalised = self.bottleneck(feature)
        return normalised, self.classifier(normalised)


ALIGNED = 8
"""Outputs whose multiples are fast in half precision: a product of RGBNT201's 171 took 75 us, of 176 it takes 6 (one
H200, 64 rows of 2304)."""


class Classifier(nn.Linear):
    """`nn.Linear` without bias, (B, D) -> (B, ids). In half precision on CUDA its outputs are filled up to a multiple
    of `ALIGNED`, and the rest is cut off again."""

    def __init__(self, feature_dim: int, num_classes: int):
        super().__init__(feature_dim, num_classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        missing = -self.out_features % ALIGNED
        if not (missing and x.is_cuda and torch.is_autocast_enabled("cuda")):
            return super().forward(x)
        return F.linear(x, F.pad(self.weight, (0, 0, 0, missing)))[..., : self.out_features]
