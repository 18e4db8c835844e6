"""t-SNE (van der Maaten and Hinton, JMLR 2008) of few points, exact, begun at their principal components."""

import torch
from torch import Tensor
from tqdm import tqdm

EXAGGERATION, EXAGGERATED_STEPS = 12.0, 150
STEPS = 500


def principal_components(points: Tensor) -> Tensor:
    """(N, 2): the two directions of largest variance of (N, D); zeros where there are fewer."""
    centred = points.float() - points.float().mean(dim=0)
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    found = (u * s)[:, :2]
    return torch.nn.functional.pad(found, (0, 2 - found.shape[1]))


def affinities(points: Tensor, perplexity: float) -> Tensor:
    """Symmetric neighbourhood probabilities (N, N), summing to 1: each row's entropy is log(perplexity) before that."""
    squared = torch.cdist(points, points).square()
    squared = squared / squared[squared > 0].mean().clamp_min(1e-12) if (squared > 0).any() else squared
    low, high = torch.zeros(len(points), 1), torch.full((len(points), 1), torch.inf)
    precision = torch.ones(len(points), 1)
    diagonal = torch.eye(len(points), dtype=torch.bool)
    for _ in range(64):
        logits = (-squared * precision).masked_fill(diagonal, -torch.inf)
        rows = logits.softmax(dim=1)
        entropy = -(rows * rows.clamp_min(1e-30).log()).sum(dim=1, keepdim=True)
        too_wide = entropy > torch.log(torch.tensor(perplexity))
        low, high = torch.where(too_wide, precision, low), torch.where(too_wide, high, precision)
        precision = torch.where(high.isinf(), precision * 2, (low + high) / 2)
    return ((rows + rows.T) / (2 * len(points))).clamp_min(1e-12)


def tsne(points: Tensor, perplexity: float = 30.0, steps: int = STEPS) -> Tensor:
    """Places points (N, D) in the plane (N, 2) so that neighbours stay neighbours; the same for the same points.

    Gradient descent with momentum and gains, all pairs in every step: 1000 points take some seconds.
    """
    points = points.float().cpu()
    if len(points) < 8:
        return principal_components(points)
    p = affinities(points, min(perplexity, (len(points) - 1) / 3))
    y = principal_components(points)
    y = 1e-4 * y / y.std().clamp_min(1e-12)
    moved, gains = torch.zeros_like(y), torch.ones_like(y)
    rate = max(len(points) / EXAGGERATION / 4, 50.0)
    for step in tqdm(range(steps), desc="map", leave=False, disable=None):
        early = step < EXAGGERATED_STEPS
        near = 1 / (1 + torch.cdist(y, y).square())
        near.fill_diagonal_(0)
        pull = ((EXAGGERATION if early else 1.0) * p - near / near.sum()) * near
        gradient = 4 * (pull.sum(dim=1, keepdim=True) * y - pull @ y)
        gains = torch.where(gradient.sign() == moved.sign(), gains * 0.8, gains + 0.2).clamp_min(0.01)
        moved = (0.5 if early else 0.8) * moved - rate * gains * gradient
        y = y + moved
        y = y - y.mean(dim=0)
    return y
