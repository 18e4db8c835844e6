"""Pictures of what the patch selection does, as uint8 tensors.

Shape letters: M modalities, N patches, H W pixels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

GAP = 2  # white pixels between panels
DARKENED = 0.2  # brightness that a dropped patch keeps
OUTLINE = (1.0, 0.9, 0.2)  # where kept and dropped patches meet: dark clothes are not dropped ones
HEAT = ((0.0, 0.0, 0.2), (0.3, 0.0, 0.6), (0.85, 0.15, 0.4), (1.0, 0.6, 0.1), (1.0, 1.0, 0.7))  # low to high score


@torch.no_grad()
def draw_selection(
    images: Tensor,
    mask: Tensor,
    scores: Tensor,
    grid: tuple[int, int],
    mean: tuple[float, float, float] | list[float],
    std: tuple[float, float, float] | list[float],
) -> Tensor:
    """One sample: a row a modality, with the image, its kept patches (outlined, the others darkened) and its scores.

    Scores are coloured from dark blue (lowest of that modality) to light yellow (highest). The patch grid is stretched
    over the image, which is exact where patches tile it and close where they overlap.

    Args:
        images: (M, 3, H, W), normalised by `mean` and `std`.
        mask: (M, N) bool, True where a patch is kept.
        scores: (M, N).
        grid: patches down and across, N = their product.

    Returns:
        (3, M * H + gaps, 3 * W + gaps) uint8 on the images' device.
    """
    images, scores = images.float(), scores.float()
    modalities, _, *size = images.shape
    pixels = (images * _per_channel(std, images) + _per_channel(mean, images)).clamp(0, 1)

    kept = F.interpolate(mask.float().view(modalities, 1, *grid), size=size)  # nearest: patches stay square
    chosen = torch.where(_inner_edge(kept), _per_channel(OUTLINE, images), pixels * (DARKENED + (1 - DARKENED) * kept))

    low, high = scores.amin(dim=1, keepdim=True), scores.amax(dim=1, keepdim=True)
    heat = _colours((scores - low) / (high - low).clamp_min(1e-6)).view(modalities, *grid, 3).permute(0, 3, 1, 2)
    grey = pixels.mean(dim=1, keepdim=True)
    heat = 0.3 * grey + 0.7 * F.interpolate(heat, size=size)

    rows = [_join(panels, dim=2) for panels in zip(pixels, chosen, heat, strict=True)]
    return (_join(rows, dim=1) * 255).round().to(torch.uint8)


@torch.no_grad()
def draw_share(share: Tensor, grid: tuple[int, int], cell: int = 12) -> Tensor:
    """The share of images that keep each patch (M, N), from dark blue (none) to light yellow (all), side by side.

    Args:
        share: (M, N), in [0, 1].
        grid: patches down and across, N = their product.
        cell: pixels a side of one patch.

    Returns:
        (3, rows * cell, M * columns * cell + gaps) uint8 on the CPU.
    """
    heat = (_colours(share.float().cpu()) * 255).round().to(torch.uint8).unflatten(1, grid).permute(0, 3, 1, 2)
    large = heat.repeat_interleave(cell, dim=2).repeat_interleave(cell, dim=3)
    return _join(tuple(large), dim=2, white=255)


def stack_samples(pictures: list[Tensor]) -> Tensor:
    """Put pictures (3, H, W) of one size side by side, with a wider gap between them."""
    return _join(pictures, dim=2, gap=4 * GAP, white=255)


def _inner_edge(kept: Tensor) -> Tensor:
    """Where kept pixels (M, 1, H, W), ones among zeros, touch dropped ones: bool of that shape."""
    return (kept > 0) & (-F.max_pool2d(-kept, kernel_size=3, stride=1, padding=1) < 1)


def _per_channel(values: tuple[float, float, float] | list[float], like: Tensor) -> Tensor:
    return like.new_tensor(values).view(3, 1, 1)


def _colours(values: Tensor) -> Tensor:
    """Colours (..., 3) of values in [0, 1], linear between the stops of HEAT; what is not a number is the lowest."""
    stops = values.new_tensor(HEAT)
    place = values.nan_to_num(0.0).clamp(0, 1) * (len(stops) - 1)
    below = place.long().clamp_max(len(stops) - 2)
    return torch.lerp(stops[below], stops[below + 1], (place - below)[..., None])


def _join(panels: list[Tensor] | tuple[Tensor, ...], dim: int, gap: int = GAP, white: int = 1) -> Tensor:
    """Concatenate (3, H, W) panels along `dim` (1 down, 2 across) with white between them."""
    shape = list(panels[0].shape)
    shape[dim] = gap
    between = panels[0].new_full(shape, white)
    return torch.cat([piece for panel in panels for piece in (between, panel)][1:], dim=dim)
