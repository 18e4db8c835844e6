"""The image backbone: a timm ViT with a camera embedding and, for CLIP, the projection into its joint space.

Shape letters: B batch, N patches, L tokens (prefix and patches), W width of the ViT, C channels after the projection.
"""

import difflib
import functools
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models.eva import Eva
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from modeling import fused_vit
from modeling.block_parts import use_drop_path, use_recomputed_activation
from modeling.kernels.residual import layer_norm
from modeling.regions import region
from utils.errors import UserError

ALIASES = {"ViT-B-16": "vit_base_patch16_clip_quickgelu_224.openai"}
"""Names that users of CLIP-based re-identification know, and what timm calls them."""

VIT_FAMILIES = ("vision_transformer", "deit", "eva")
"""The timm modules whose models are plain ViTs: a class token, perhaps registers, and one token a patch."""


GROUP = 4
"""Blocks that are compiled together, at most: fewer, larger regions start faster in every step but take longer to
compile."""


class Backbone(nn.Module):
    """A ViT of timm that returns patch tokens and a global feature, whatever prefix tokens it has between them.

    Args:
        vit_name: "ViT-B-16" (CLIP) or the name of a ViT in timm, with or without a tag of pretrained weights.
        img_size: (height, width) of every image, in pixels.
        stride: (vertical, horizontal) step between patches, in pixels; smaller than the patch makes them overlap. The
            grid has floor((size - patch) / stride) + 1 patches a side. None takes the patch size.
        depth: number of blocks, counted from the first; 0 takes all that the named ViT has.
        num_cameras: size of the camera embedding; 0 for none.
        sie_coe: factor on the camera embedding (side information embedding, TransReID, ICCV 2021).
        drop_path: stochastic depth of the last block, rising linearly from 0 at the first.
        drop: dropout behind the linear layers of attention and MLP.
        attn_drop: dropout of the attention weights.
        fused: use the kernels of `modeling.fused_vit` where they compute the same.

    Attributes:
        grid: (rows, columns) of patches; num_patches is their product.
        width: W; embed_dim: C.
        vit: timm's module; proj: Linear (W -> C), or Identity where the ViT has no projection.
        cam_embed: (num_cameras, W), or None.
        split_after: the block behind which `begin` stops; 0 where the backbone is not split.

    Raises:
        UserError: the name is unknown or no ViT, or the images and the stride do not suit its patches.
    """

    def __init__(
        self,
        vit_name: str,
        *,
        img_size: tuple[int, int],
        stride: tuple[int, int] | None = None,
        depth: int = 0,
        num_cameras: int = 0,
        sie_coe: float = 1.0,
        drop_path: float = 0.0,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        fused: bool = True,
    ):
        super().__init__()
        self.timm_name = find_vit(vit_name)
        self.img_size, self.depth_limit, self.sie_coe = (img_size[0], img_size[1]), depth, sie_coe
        self.grad_checkpointing, self.split_after, self.fused = False, 0, fused

        def create(size: tuple[int, int]) -> nn.Module:
            return timm.create_model(
                self.timm_name,
                pretrained=False,
                num_classes=0,
                img_size=size,
                dynamic_img_size=False,
                drop_path_rate=drop_path,
                proj_drop_rate=drop,
                attn_drop_rate=attn_drop,
                **({"depth": depth} if depth else {}),
            )

        if depth:
            with torch.device("meta"):
                blocks = len(timm.create_model(self.timm_name, pretrained=False).blocks)
            if depth > blocks:
                raise UserError(
                    f"MODEL.DEPTH is {depth}, but {vit_name} has {blocks} blocks; give 1 to {blocks}, or 0 for all."
                )
        self.vit = create(self.img_size)
        if self.vit.cls_token is None or not isinstance(self.vit.patch_embed, PatchEmbed):
            raise UserError(
                f"MODEL.TRANSFORMER_TYPE: {vit_name} has no class token or no plain patch embedding; choose a ViT "
                "that has both, such as ViT-B-16, vit_base_patch16_224 or vit_base_patch16_dinov3."
            )
        patch = self.vit.patch_embed.patch_size
        stride = patch if stride is None else (stride[0], stride[1])
        self.grid = patch_grid(self.img_size, patch, stride)
        self.num_patches = self.grid[0] * self.grid[1]
        if stride != patch:
            # What timm lays out for the image whose patches stand side by side in this grid, then moved together.
            self.vit = create((self.grid[0] * patch[0], self.grid[1] * patch[1]))
            self.vit.patch_embed.img_size, self.vit.patch_embed.proj.stride = self.img_size, stride
        self.vit.attn_pool = None  # a pooling head of some ViTs: the class token is the global here
        use_drop_path(self.vit)
        use_recomputed_activation(self.vit)

        self.width = self.embed_dim = self.vit.embed_dim
        self.proj: nn.Module = nn.Identity()
        if projection := projection_dim(self.vit.pretrained_cfg):
            self.embed_dim = projection
            self.proj = nn.Linear(self.width, projection, bias=False)
            nn.init.normal_(self.proj.weight, std=self.width**-0.5)

        self.cam_embed = nn.Parameter(torch.empty(num_cameras, self.width)) if num_cameras else None
        if self.cam_embed is not None:
            nn.init.trunc_normal_(self.cam_embed, std=0.02)

    def forward(self, x: Tensor, camid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """
        Args:
            x: (B, 3, H, W) normalised images; modalities are stacked along the batch.
            camid: (B,) int64 camera of each image; None takes the mean camera embedding.

        Returns:
            Patch tokens (B, N, C) and globals (B, C): the class token, behind the same norm and projection.

        Raises:
            UserError: the images are not of the size given at construction.
        """
        fused = self.fuses(self.vit.num_prefix_tokens + self.num_patches, x.device)
        tokens, ropes = self._start(x, camid, fused)
        return self._finish(tokens, ropes, 0, fused)

    def begin(self, x: Tensor, camid: Tensor | None = None) -> Tensor:
        """Images, as in `forward` -> tokens (B, L, W) behind block `split_after`: prefix tokens, then patches."""
        fused = self.fuses(self.vit.num_prefix_tokens + self.num_patches, x.device)
        tokens, ropes = self._start(x, camid, fused)
        return self._run(tokens, ropes, 0, self.split_after, fused)

    def end(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens of `begin`, of which some have left -> all but the prefix (B, ., C), and globals (B, C)."""
        fused = self.fuses(tokens.shape[1], tokens.device)
        return self._finish(tokens, [None] * len(self.vit.blocks), self.split_after, fused)

    def project(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Norm and projection behind the last block, tokens (B, L, W) -> patches (B, N, C), class token (B, C)."""
        if self.fuses(tokens.shape[1], tokens.device) and (norm := self._plain_norm()):
            return self._apart(self.proj(layer_norm(tokens, norm)))
        return self._project(tokens)

    def fuses(self, num_tokens: int, device: torch.device) -> bool:
        """Whether a pass over that many tokens an image would use the kernels of `modeling.fused_vit`."""
        return self.fused and fused_vit.can_fuse(self.vit.blocks, num_tokens, device)

    def _start(self, x: Tensor, camid: Tensor | None, fused: bool) -> tuple[Tensor, list[Tensor | None]]:
        if x.shape[-2:] != self.img_size:
            raise UserError(
                f"got images of {x.shape[-2]}x{x.shape[-1]} pixels, but this backbone was built for "
                f"{self.img_size[0]}x{self.img_size[1]} (height x width, INPUT.SIZE_TRAIN)."
            )
        if fused and fused_vit.can_embed(self.vit):
            class_tokens = self._add_camera(self.vit.cls_token.expand(len(x), -1, -1), camid).squeeze(1)
            return fused_vit.embed(self.vit, self._patchify(x), class_tokens), [None] * len(self.vit.blocks)
        return self._embed(x, camid)

    def _finish(self, tokens: Tensor, ropes: list[Tensor | None], first: int, fused: bool) -> tuple[Tensor, Tensor]:
        """Blocks from the first to the end, norm and projection, tokens (B, L, W) -> as `forward`."""
        norm = self._plain_norm() if fused else None
        tokens = self._run(tokens, ropes, first, len(self.vit.blocks), fused, norm)
        return self._project(tokens) if norm is None else self._apart(self.proj(tokens))

    def _run(
        self,
        tokens: Tensor,
        ropes: list[Tensor | None],
        first: int,
        last: int,
        fused: bool,
        norm: nn.LayerNorm | None = None,
    ) -> Tensor:
        """Blocks first to last - 1, (B, L, W) -> (B, L, W): fused, with a norm behind them if one is given, or in
        groups of equal size so that few compile."""
        blocks = tuple(self.vit.blocks[first:last])
        learns = tokens.requires_grad or any(p.requires_grad for block in blocks for p in block.parameters())
        again = self.grad_checkpointing and torch.is_grad_enabled() and learns
        kept = fused_vit.draw_branches(blocks, tokens) if fused else []  # no random state is needed to compute it again
        group = len(blocks) if fused else group_size(self.split_after, len(self.vit.blocks))
        size = 1 if self.grad_checkpointing else group
        for i in range(0, len(blocks), size):
            end = i + size
            run: Callable[..., Tensor] = fused_vit.run_kept if fused else self._transform
            if again:
                run = functools.partial(checkpoint, run, use_reentrant=False, preserve_rng_state=not fused)
            if fused:
                tokens = run(blocks[i:end], tokens, kept[2 * i : 2 * end], norm if end == len(blocks) else None)
            else:
                tokens = run(blocks[i:end], tokens, ropes[first + i : first + end])
        return tokens

    def _plain_norm(self) -> nn.LayerNorm | None:
        """The norm behind the last block where it is all that stands before the projection; without a projection,
        which takes half precision anyway, the norm's own float32 goes on."""
        norm = self.vit.norm
        plain = isinstance(norm, nn.LayerNorm) and norm.bias is not None and isinstance(self.vit.fc_norm, nn.Identity)
        return norm if plain and isinstance(self.proj, nn.Linear) else None

    @region
    def _embed(self, x: Tensor, camid: Tensor | None) -> tuple[Tensor, list[Tensor | None]]:
        """Images -> tokens (B, L, W) with position and camera, and the rope of each block: Eva's take one."""
        vit = self.vit
        embedded = vit._pos_embed(self._patchify(x))
        tokens, rope = embedded if isinstance(vit, Eva) else (embedded, None)
        tokens = vit.norm_pre(self._add_camera(tokens, camid))
        device = x.device.type
        if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) is torch.bfloat16:
            tokens = tokens.bfloat16()  # the residual stream is then no wider than what the blocks add to it
        return tokens, list(rope) if rope is not None and vit.rope_mixed else [rope] * len(vit.blocks)

    @region
    def _transform(self, blocks: tuple[nn.Module, ...], tokens: Tensor, ropes: list[Tensor | None]) -> Tensor:
        """Some of the transformer blocks, (B, L, W) -> (B, L, W)."""
        for block, rope in zip(blocks, ropes, strict=True):
            tokens = block(tokens) if rope is None else block(tokens, rope=rope)
        return tokens

    @region
    def _project(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Norm and projection as written."""
        tokens = self.proj(self.vit.fc_norm(self.vit.norm(tokens)))  # timm fills one of the two norms
        return self._apart(tokens)

    def _apart(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, L, C) -> patches (B, N, C) and class token (B, C)."""
        prefix, patches = tokens.split(
            [self.vit.num_prefix_tokens, tokens.shape[1] - self.vit.num_prefix_tokens], dim=1
        )
        return patches, prefix[:, 0]

    def _patchify(self, x: Tensor) -> Tensor:
        """Images -> embedded patches (B, N, W); where patches do not overlap, one matrix product does what timm's
        convolution does."""
        embed = self.vit.patch_embed
        rows, columns = embed.proj.kernel_size
        if embed.proj.stride != (rows, columns):
            return embed(x)
        if torch.is_autocast_enabled(x.device.type):  # as the product does; earlier, there is less to move
            x = x.to(torch.get_autocast_dtype(x.device.type))
        x = x[..., : self.grid[0] * rows, : self.grid[1] * columns]
        return embed.norm(F.linear(_cut(x, rows, columns), embed.proj.weight.flatten(1), embed.proj.bias))

    def _add_camera(self, tokens: Tensor, camid: Tensor | None) -> Tensor:
        """Adds the camera's embedding to the class token of (B, L, W); patch tokens do not see the camera."""
        if self.cam_embed is None:
            return tokens
        camera = self.cam_embed.mean(dim=0, keepdim=True) if camid is None else F.embedding(camid, self.cam_embed)
        return torch.cat([tokens[:, :1] + self.sie_coe * camera.unsqueeze(1), tokens[:, 1:]], dim=1)

    def split(self, after: int) -> None:
        """Lets `begin` stop behind a block and `end` go on.

        Args:
            after: blocks in `begin`, 1 to one less than there are.

        Raises:
            UserError: there is no such place, or the ViT has rotary positions, which belong to the whole grid.
        """
        depth = len(self.vit.blocks)
        if not 1 <= after < depth:
            raise UserError(
                f"MODEL.SDTPS_AFTER_BLOCK is {after}, but {self.timm_name} has {depth} blocks here: give 1 to "
                f"{depth - 1}, or 0 to select behind the last."
            )
        if isinstance(self.vit, Eva):
            raise UserError(
                f"MODEL.SDTPS_AFTER_BLOCK is {after}, but the blocks of {self.timm_name} take rotary positions of the "
                "whole grid: set it to 0, or choose a ViT with a position embedding, such as ViT-B-16."
            )
        self.split_after = after

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Where there will be a backward pass, keep only the input of each block and compute the rest again in it."""
        self.grad_checkpointing = enable


def _cut(x: Tensor, rows: int, columns: int) -> Tensor:
    """Images (B, 3, H, W) -> the pixels of each patch side by side, (B, N, 3 * rows * columns)."""
    dtype, together = x.dtype, 8 // x.element_size()
    eager = not torch.compiler.is_compiling() and not x.requires_grad and x.is_contiguous()
    if eager and columns % together == 0 and x.storage_offset() % together == 0:  # copied eight bytes at a time
        x, columns = x.view(torch.int64), columns // together
    patches = x.unflatten(3, (-1, columns)).unflatten(2, (-1, rows)).permute(0, 2, 4, 1, 3, 5)
    return patches.flatten(3).flatten(1, 2).view(dtype)


def group_size(split_after: int, depth: int) -> int:
    """The largest number of blocks up to `GROUP` by which both parts of a backbone can be cut into equal groups."""
    return max(size for size in range(1, GROUP + 1) if split_after % size == 0 and (depth - split_after) % size == 0)


def find_vit(name: str) -> str:
    """The timm name behind `name`.

    Raises:
        UserError: timm has no such ViT; the message gives the nearest names.
    """
    timm_name = ALIASES.get(name, name)
    architecture, _, tag = timm_name.partition(".")
    vits = [vit for family in VIT_FAMILIES for vit in timm.list_models(module=family)]
    if architecture in vits:
        tagged = timm.list_models(f"{architecture}.*", pretrained=True)
        if not tag or timm_name in tagged:
            return timm_name
        known = ", ".join(tagged) or "none"
        raise UserError(f"MODEL.TRANSFORMER_TYPE: timm has no weights {timm_name}; of this ViT it has {known}.")
    nearest = difflib.get_close_matches(architecture, [*ALIASES, *vits], n=3, cutoff=0.5)
    fault = "is no plain ViT" if timm.is_model(architecture) else "is not known to timm"
    hint = f"nearest: {', '.join(nearest)}" if nearest else "try ViT-B-16 or vit_base_patch16_224"
    raise UserError(f"MODEL.TRANSFORMER_TYPE: {name} {fault}; {hint}.")


def patch_grid(img_size: tuple[int, int], patch: tuple[int, int], stride: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of the patches that fit into an image, all arguments (vertical, horizontal) in pixels.

    Raises:
        UserError: the image is smaller than a patch, or the stride leaves pixels out between patches.
    """
    if any(not 1 <= s <= p for s, p in zip(stride, patch, strict=True)):
        raise UserError(
            f"MODEL.STRIDE_SIZE is {list(stride)}, but the patches of this ViT are {patch[0]}x{patch[1]} pixels and a "
            f"larger step leaves pixels out between them: set it to {list(patch)}, or smaller for overlap."
        )
    if any(size < p for size, p in zip(img_size, patch, strict=True)):
        raise UserError(f"INPUT.SIZE_TRAIN is {list(img_size)}, smaller than a patch of {patch[0]}x{patch[1]} pixels.")
    rows, columns = ((size - p) // s + 1 for size, p, s in zip(img_size, patch, stride, strict=True))
    return rows, columns


def projection_dim(pretrained_cfg: dict) -> int:
    """Width of the projection behind a CLIP image tower, 0 for other ViTs.

    timm keeps the projection as `head`; in a CLIP model finetuned to classify ("ft" in the tag) that is a classifier.
    """
    is_clip = "_clip_" in pretrained_cfg["architecture"] and "ft" not in (pretrained_cfg.get("tag") or "").split("_")
    return pretrained_cfg["num_classes"] if is_clip else 0


def resize_position_grid(positions: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Resizes the position embedding of a grid of patches, bilinearly without antialiasing, as DeMo does.

    Args:
        positions: (old[0] * old[1], W), row by row, without the entries of prefix tokens.
        old: (rows, columns) of the grid that `positions` has.
        new: (rows, columns) wanted.

    Returns:
        (new[0] * new[1], W)
    """
    if old == new:
        return positions
    planes = positions.T.reshape(1, -1, *old)
    return F.interpolate(planes, size=new, mode="bilinear", align_corners=False).flatten(2)[0].T
