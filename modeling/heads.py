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
        self.classifier = nn.Linear(feature_dim, num_classes, bias=False)
        nn.init.normal_(self.classifier.weight, std=0.001)

    def forward(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """feature (B, D) -> normalised feature (B, D) and logits (B, ids)."""
        normalised = self.bottleneck(feature)
        half = normalised.is_cuda and torch.is_autocast_enabled("cuda")
        return normalised, aligned_linear(normalised, self.classifier.weight) if half else self.classifier(normalised)


ALIGNED = 8
"""Outputs whose multiples a product in half precision is fast for: RGBNT201's 171 took 75 us, 176 take 6 (one H200)."""


def aligned_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T, (B, V), (W, V) -> (B, W), by a product of `ALIGNED` outputs."""
    return F.linear(x, F.pad(weight, (0, 0, 0, -len(weight) % ALIGNED)))[:, : len(weight)]
