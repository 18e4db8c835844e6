"""SDTPS whose part that sees all patches runs, where it can, as the kernels of `modeling.kernels.selection`."""

import functools
import logging

import torch
from torch import Tensor

from modeling.kernels.selection import has_kernels, part_patches, score_patches
from modeling.precision import matmul_precision
from modeling.sdtps import NORM_FLOOR, RANGE_FLOOR, SDTPS, Choice, Selection, fuse_dropped, gather_tokens
from utils.kernels import can_launch, compare, proven, trial

log = logging.getLogger(__name__)


class FusedSDTPS(SDTPS):
    """`SDTPS` with the same weights and results; what is computed otherwise are its scores and the parting of the kept
    patches from the dropped, for patches in half precision on a GPU."""

    def select(self, v: Tensor, g: Tensor, present: Tensor | None = None) -> Selection:
        if self.num_kept == self.num_patches or not can_fuse(self, v):
            return super().select(v, g, present)
        choice, v = self._decide(v, g, present)
        kept, fused = part_patches(v, choice.scores, torch.cat([choice.kept, choice.dropped], dim=-1), self.num_kept)
        with matmul_precision("high"):  # TF32, of more digits than the patches have
            return self.finish(choice, kept, fused, present)

    def decide(self, v: Tensor, g: Tensor, present: Tensor | None = None) -> Choice:
        return self._decide(v, g, present)[0] if can_fuse(self, v) else super().decide(v, g, present)

    def _decide(self, v: Tensor, g: Tensor, present: Tensor | None) -> tuple[Choice, Tensor]:
        with torch.autocast(v.device.type, enabled=False):
            scores, predicted, v = self.score_by_kernels(v, g, present)
            return Choice(scores, predicted, *self.choose(scores)), v

    def score_by_kernels(self, v: Tensor, g: Tensor, present: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """`score` of patches in half precision; and these once more, see `score_patches`."""
        g = g.float()
        layers = [(first, second) for first, _, second in self.predictor.values()]
        w1, b1 = (torch.stack([getattr(first, name) for first, _ in layers]) for name in ("weight", "bias"))
        w2, b2 = (torch.cat([getattr(second, name) for _, second in layers]) for name in ("weight", "bias"))
        scores, predicted, v = score_patches(
            v,
            g,
            (w1, b1, w2, b2),
            self._similarity_weights(g, present).squeeze(-1),
            share=1 - 2 * self.beta,
            floors=(NORM_FLOOR, RANGE_FLOOR),
            similarity_grad=self.score_grad == "all",
        )
        return (scores.detach() if self.score_grad == "none" else scores), predicted, v


def can_fuse(sdtps: SDTPS, v: Tensor) -> bool:
    """Whether the kernels compute what an SDTPS does with patches (M, B, N, C), and are faster: in half precision on a
    GPU, where they have shown once that they do."""
    if torch.compiler.is_compiling() or v.dtype not in (torch.bfloat16, torch.float16):
        return False
    patches, channels = v.shape[2:]
    own = sdtps.similarity == "cosine" and patches == sdtps.num_patches
    return own and can_launch(v.device) and kernels_agree(patches, channels, v.dtype, v.device)


@functools.cache
def kernels_agree(num_patches: int, embed_dim: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernels have the scores, the tokens and the gradients of `SDTPS`. Tried once; where they do not, the
    log says why.

    Raises:
        torch.OutOfMemoryError: nothing is known then, and the next call tries again.
    """
    if not has_kernels(num_patches, embed_dim, max(1, embed_dim // 4)):
        log.info("SDTPS is not fused: there are no kernels for %d patches of %d channels", num_patches, embed_dim)
        return False
    return proven(
        lambda: relative_errors(num_patches, embed_dim, dtype, device),
        "SDTPS is not fused, so steps are slower",
    )


def relative_errors(
    num_patches: int, embed_dim: int, dtype: torch.dtype, device: torch.device, *, batch: int = 9
) -> dict[str, tuple[float, float]]:
    """The largest errors of scores, parted patches and gradients, by name, of a random SDTPS on random patches: by the
    kernels, and by `SDTPS` on the same. What is expected is `SDTPS` on these patches in float32; see
    `utils.kernels.compare`.

    Args:
        dtype: of the patches.
        batch: B.
    """
    with trial(device):
        sdtps = FusedSDTPS(embed_dim=embed_dim, num_patches=num_patches).to(device)
        weights = dict(sdtps.predictor.named_parameters())
        for weight in weights.values():
            torch.nn.init.normal_(weight, std=embed_dim**-0.5)
        shape = (len(sdtps.predictor), batch, num_patches)
        tokens = torch.randn(*shape[:2], num_patches + 1, embed_dim, device=device).to(dtype)  # behind a prefix token
        g = torch.randn(*shape[:2], embed_dim, device=device, requires_grad=True)
        present = torch.rand(batch, shape[0], device=device) < 0.8
        of_scores, of_tokens = torch.randn(shape, device=device), torch.randn(*shape, embed_dim, device=device)
        with torch.no_grad():
            kept, dropped = sdtps.choose(sdtps.score(tokens[:, :, 1:].float(), g, present)[0])

        def differentiated(tokens: Tensor, kernels: bool) -> list[Tensor]:
            tokens = tokens.detach().requires_grad_()
            patches, leaves = tokens[:, :, 1:], [tokens, g, *weights.values()]
            if kernels:
                scores, predicted, tap = sdtps.score_by_kernels(patches, g, present)
                parted = part_patches(tap, scores, torch.cat([kept, dropped], dim=-1), kept.shape[-1])
            else:
                scores, predicted = sdtps.score(patches.float(), g, present)
                parted = (
                    gather_tokens(patches.float(), kept),
                    fuse_dropped(patches.float(), Choice(scores, predicted, kept, dropped)),
                )
            made = torch.cat(parted, dim=2)
            loss = ((scores + predicted) * of_scores).sum() + (made * of_tokens[:, :, : made.shape[2]]).sum()
            grads = torch.autograd.grad(loss, leaves)

            alone = []
            for sdtps.score_grad in ("predictor", "all"):  # nobody takes the patches on
                score = sdtps.score_by_kernels if kernels else sdtps.score
                scored = score(patches if kernels else patches.float(), g, present)[0]
                alone += torch.autograd.grad((scored * of_scores).sum(), tokens)
            return [scores, predicted, made, *grads, *alone]

        results = differentiated(tokens, True), differentiated(tokens, False), differentiated(tokens.float(), False)
        alone = ["patches by the predictor", "patches by the scores"]
        names = ["scores", "predicted", "tokens", "patches", "globals", *weights, *alone]
        return compare(names, *results)
