"""The model that joins it all: backbone, then the branches `ori`, `moe` and `sdtps`, each with its head."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from yacs.config import CfgNode

from modeling import foreign
from modeling.backbone import Backbone
from modeling.fused_sdtps import FusedSDTPS
from modeling.fusion import Fusion
from modeling.heads import BNNeck
from modeling.pooling import Reduce, make_pool
from modeling.pretrained import load_pretrained
from modeling.regions import region
from modeling.sdtps import SDTPS, Choice, Selection, fuse_dropped, gather_tokens
from utils.errors import UserError
from utils.modalities import MODALITIES


@dataclass
class ReIDOutput:
    """What the model returns, in training and in evaluation alike."""

    features: dict[str, Tensor] = field(default_factory=dict)
    """(B, D) of each branch: `ori`, `moe`, `sdtps`, those that the model has; `both` joins them in this order. With a
    head per modality also `RGB`, `NI`, `TI`."""
    logits: dict[str, Tensor] = field(default_factory=dict)
    """(B, ids) of each head: the branches, with `RGB`, `NI`, `TI` in the place of `ori` if each modality has a head;
    in training also `sdtps_aux` where there is one."""
    selection: Selection | None = None
    """What SDTPS chose."""


@dataclass
class Encoded:
    """The backbone's view of a batch, modality first: patches (M, B, N, C) and class tokens (M, B, C)."""

    patches: Tensor
    class_tokens: Tensor
    present: Tensor | None = None
    stream: Tensor | None = None
    """Where patches leave the backbone: the tokens (M, B, L, W) from which it goes on. Patches and class tokens are
    then those of its middle."""


class ReIDModel(nn.Module):
    """Multi-modal re-identification model; `make_model` builds it from a config.

    Args:
        backbone: images (B, 3, H, W) and cameras (B,) -> patches (B, N, C) and globals (B, C).
        num_classes: identities of the classifiers.
        global_local: reduce each global together with its pooled patches.
        head_per_modality: a head for each modality in the place of one on the concatenated globals (DIRECT 0).
        fusion: branch `moe`, from per-modality patches and globals; None for none.
        sdtps: branch `sdtps`; None for none.
        sdtps_pool: name of the pooling behind it.
        sdtps_global: "class" scores patches against the class token, "reduced" against the reduced global.
        sdtps_after_block: the block of the backbone behind which the dropped patches leave it, joined to one token that
            stays; 0 selects behind the last.
        sdtps_aux_head: in training, a second head `sdtps_aux` on SDTPS's tokens, pooled by attention alone.
        sdtps_only: no other branch than `sdtps`.
        neck_feat: features in evaluation are taken "before" or "after" the BNNeck.
        branch_norm: in evaluation, bring each branch to unit length before `both` joins them.
        frozen: the backbone receives no gradient, drops no paths, and its untrained camera embedding adds nothing.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        num_classes: int,
        global_local: bool = False,
        head_per_modality: bool = False,
        fusion: Fusion | None = None,
        sdtps: SDTPS | None = None,
        sdtps_pool: str = "cross",
        sdtps_global: str = "class",
        sdtps_after_block: int = 0,
        sdtps_aux_head: bool = False,
        sdtps_only: bool = False,
        neck_feat: str = "before",
        branch_norm: bool = False,
        frozen: bool = False,
    ):
        super().__init__()
        width = backbone.embed_dim
        self.backbone, self.frozen = backbone.requires_grad_(not frozen), frozen
        if frozen and backbone.cam_embed is not None:
            nn.init.zeros_(backbone.cam_embed)
        self.fusion, self.sdtps = fusion, sdtps
        self.sdtps_only, self.sdtps_global = sdtps_only, sdtps_global
        self.neck_feat, self.branch_norm = neck_feat, branch_norm
        needs_reduced = not sdtps_only or sdtps_global == "reduced"
        self.reduce = Reduce(width) if global_local and needs_reduced else None

        head_dims = {}  # `ori` first: its initial weights do not depend on the branches beside it
        if not sdtps_only:
            if head_per_modality:
                head_dims.update(dict.fromkeys(MODALITIES, width))
            else:
                head_dims["ori"] = len(MODALITIES) * width
        if fusion is not None:
            head_dims["moe"] = fusion.feature_dim
        if sdtps is not None:
            head_dims["sdtps"] = len(MODALITIES) * width
        self.heads = nn.ModuleDict({name: BNNeck(dim, num_classes) for name, dim in head_dims.items()})
        if sdtps is not None:
            self.pool = make_pool(sdtps_pool, width, backbone.fused)
            self.aux_pool = make_pool("attention", width) if sdtps_aux_head else None
            if sdtps_aux_head:
                self.heads["sdtps_aux"] = BNNeck(len(MODALITIES) * width, num_classes)
            if sdtps_after_block:
                backbone.split(sdtps_after_block)
        self.train()

    def train(self, mode: bool = True) -> "ReIDModel":
        """Training mode, in which a frozen backbone stays in evaluation mode."""
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    @property
    def branches(self) -> tuple[str, ...]:
        """The branches of this model, in the order in which `both` joins them."""
        ori = () if self.sdtps_only else ("ori",)
        return ori + tuple(name for name in ("moe", "sdtps") if name in self.heads)

    def forward(
        self, images: dict[str, Tensor], camid: Tensor | None = None, present: Tensor | None = None
    ) -> ReIDOutput:
        """
        Args:
            images: per modality (B, 3, H, W), normalised.
            camid: (B,) int64 camera of each sample; None takes the mean camera embedding.
            present: (B, M) bool, which modalities each sample has, in the order RGB, NI, TI; None means all. A missing
                one passes through the backbone as a zero image, as in DeMo, and SDTPS leaves it out.
        """
        return self.decode(self.encode(images, camid, present))

    def encode(self, images: dict[str, Tensor], camid: Tensor | None = None, present: Tensor | None = None) -> Encoded:
        """Runs the backbone once over all modalities."""
        x = _stack([images[m] for m in MODALITIES])  # (M, B, 3, H, W)
        if present is not None:
            x = torch.where(present.T[:, :, None, None, None], x, 0.0)
        cameras = None if camid is None else camid.repeat(len(MODALITIES))
        patches, class_tokens, stream = self._encode(x.flatten(0, 1), cameras)
        shape = x.shape[:2]
        stream = None if stream is None else stream.unflatten(0, shape)
        return Encoded(patches.unflatten(0, shape), class_tokens.unflatten(0, shape), present, stream)

    def _encode(self, x: Tensor, camid: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Images (B, 3, H, W) -> patches, class tokens, and the stream where patches leave the backbone."""
        if not self.backbone.split_after:
            return *self.backbone(x, camid), None
        stream = self.backbone.begin(x, camid)
        return *self.backbone.project(stream), stream

    def leave_out(self, encoded: Encoded, present: Tensor, camid: Tensor | None = None) -> Encoded:
        """What `encode` would give with `present`, from the encoding of all modalities.

        A missing image is a zero image, so its tokens depend on the camera alone: they are made once for each camera.

        Args:
            encoded: of all images that there are.
            present: (B, M) bool, False also where an image was missing before.
            camid: (B,) as given to `encode`.
        """
        like = encoded.patches
        cameras, row = (None, torch.zeros(like.shape[1], dtype=torch.long, device=like.device))
        if camid is not None and self.backbone.cam_embed is not None:
            cameras, row = camid.unique(return_inverse=True)
        blank = like.new_zeros(1 if cameras is None else len(cameras), 3, *self.backbone.img_size)
        patches, class_tokens, stream = self._encode(blank, cameras)

        there = present.T.unsqueeze(-1)  # (M, B, 1)
        return Encoded(
            torch.where(there.unsqueeze(-1), encoded.patches, patches[row]),
            torch.where(there, encoded.class_tokens, class_tokens[row]),
            present,
            None if stream is None else torch.where(there.unsqueeze(-1), encoded.stream, stream[row]),
        )

    def decode(self, encoded: Encoded) -> ReIDOutput:
        """Everything behind `encode`: what is left of the backbone, the branches and their heads."""
        return self._branches(*self.finish_backbone(encoded))

    def finish_backbone(self, encoded: Encoded) -> tuple[Encoded, Choice | None]:
        """Where patches leave the backbone: chooses, and takes the kept ones and the dropped, as one token before them,
        through the other blocks. Elsewhere everything is finished."""
        if encoded.stream is None:
            return encoded, None
        choice, stream = self._drop(encoded)
        shape = stream.shape[:2]
        patches, class_tokens = self.backbone.end(stream.flatten(0, 1))
        return Encoded(patches.unflatten(0, shape), class_tokens.unflatten(0, shape), encoded.present), choice

    @region
    def _drop(self, encoded: Encoded) -> tuple[Choice, Tensor]:
        """Chooses by the tokens of the backbone's middle, and what stays of its stream: prefix, fused, kept."""
        assert self.sdtps is not None and encoded.stream is not None
        choice = self.sdtps.decide(encoded.patches, encoded.class_tokens, encoded.present)
        prefix, patches = encoded.stream.tensor_split([self.backbone.vit.num_prefix_tokens], dim=2)
        kept = gather_tokens(patches, choice.kept)
        return choice, torch.cat([prefix, fuse_dropped(patches, choice), kept], dim=2)

    @region
    def _branches(self, encoded: Encoded, choice: Choice | None) -> ReIDOutput:
        """Everything behind the backbone."""
        patches, class_tokens = encoded.patches, encoded.class_tokens
        globals_ = class_tokens
        if self.reduce is not None:
            globals_ = self.reduce(class_tokens, patches.mean(dim=2))
        by_modality = dict(zip(MODALITIES, globals_.unbind(0), strict=True))

        features, selection = {}, None
        if "ori" in self.branches:
            features["ori"] = globals_.transpose(0, 1).flatten(1)
        if self.fusion is not None:
            features["moe"] = self.fusion(dict(zip(MODALITIES, patches.unbind(0), strict=True)), by_modality)
        if self.sdtps is not None:
            if choice is None:
                anchors = globals_ if self.sdtps_global == "reduced" else class_tokens
                selection = self.sdtps.select(patches, anchors, encoded.present)
            else:
                fused, kept = patches.split([patches.shape[2] - self.sdtps.num_kept, self.sdtps.num_kept], dim=2)
                selection = self.sdtps.finish(choice, kept, fused, encoded.present)
            tokens = torch.stack([selection.tokens[m] for m in MODALITIES])
            pools = {"sdtps": self.pool}
            if self.aux_pool is not None and self.training:
                pools["sdtps_aux"] = self.aux_pool
            for name, pool in pools.items():
                pooled = pool(tokens, class_tokens, encoded.present)
                if encoded.present is not None:
                    pooled = torch.where(encoded.present.T.unsqueeze(-1), pooled, 0.0)
                features[name] = pooled.transpose(0, 1).flatten(1)
        if "RGB" in self.heads:
            features.update(by_modality)

        logits = {}
        for name, head in self.heads.items():
            if name not in features:  # the auxiliary one, in evaluation
                continue
            normalised, logits[name] = head(features[name])
            if not self.training and self.neck_feat == "after":
                features[name] = normalised
        if "RGB" in self.heads:
            features["ori"] = torch.cat([features[m] for m in MODALITIES], dim=-1)
        if len(self.branches) > 1:
            features["both"] = torch.cat([self._joined(features[name]) for name in self.branches], dim=-1)
        return ReIDOutput(features, logits, selection)

    def _joined(self, feature: Tensor) -> Tensor:
        return F.normalize(feature, dim=-1) if self.branch_norm and not self.training else feature

    def translate_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Renames the weights of a DeMo checkpoint, or one of its fork, to this model's names; ours pass unchanged."""
        return foreign.translate(state)

    def explain_mismatch(self, name: str, file_shape: Sequence[int]) -> str:
        """Why a checkpoint's tensor of that shape does not fit, in words; "" if there is nothing to say."""
        return foreign.explain_mismatch(name, file_shape, None if self.sdtps is None else self.sdtps.num_kept)


def _stack(images: list[Tensor]) -> Tensor:
    """torch.stack, without a copy of images that lie one behind the other in memory, as those of cached batches do."""
    first, size = images[0], images[0].numel() * images[0].element_size()
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if traced or any(type(image) is not Tensor or image.requires_grad for image in images):
        return torch.stack(images)
    storage = first.untyped_storage().data_ptr()
    for i, image in enumerate(images):
        alike = image.shape == first.shape and image.dtype == first.dtype and image.is_contiguous()
        if not (
            alike and image.untyped_storage().data_ptr() == storage and image.data_ptr() == first.data_ptr() + i * size
        ):
            return torch.stack(images)
    return first.as_strided((len(images), *first.shape), (first.numel(), *first.stride()))


def make_model(cfg: CfgNode, *, num_classes: int, num_cameras: int, pretrained: bool = True) -> ReIDModel:
    """Builds the model that a config describes.

    Args:
        cfg: see `configs.load_cfg`.
        num_classes: identities of the training set.
        num_cameras: cameras of the data set; used if MODEL.SIE_CAMERA.
        pretrained: load the backbone's weights as the config says; False fetches nothing and starts at random.

    Raises:
        UserError: the backbone is unknown, its weights cannot be had or do not fit, or HEAD does not divide the width.
    """
    m = cfg.MODEL
    fused = cfg.SOLVER.FUSED_BLOCKS and not cfg.SOLVER.DETERMINISTIC
    backbone = Backbone(
        m.TRANSFORMER_TYPE,
        img_size=tuple(cfg.INPUT.SIZE_TRAIN),
        stride=tuple(m.STRIDE_SIZE),
        depth=m.DEPTH,
        num_cameras=num_cameras if m.SIE_CAMERA else 0,
        sie_coe=m.SIE_COE,
        drop_path=m.DROP_PATH,
        drop=m.DROP_OUT,
        attn_drop=m.ATT_DROP_RATE,
        fused=fused,
    )
    if pretrained and m.PRETRAINED:
        load_pretrained(backbone, m.PRETRAIN_PATH_T)
    backbone.set_grad_checkpointing(cfg.SOLVER.GRAD_CHECKPOINT)

    with torch.random.fork_rng(devices=[]):  # switching these branches leaves the initial weights of the rest alone
        fusion = _make_fusion(m, backbone) if m.HDM and m.ATM else None
        sdtps = _make_sdtps(m, backbone, FusedSDTPS if fused else SDTPS) if m.USE_SDTPS else None
    return ReIDModel(
        backbone,
        num_classes=num_classes,
        global_local=m.GLOBAL_LOCAL,
        head_per_modality=m.DIRECT == 0,
        fusion=fusion,
        sdtps=sdtps,
        sdtps_pool=m.SDTPS_POOL,
        sdtps_global=m.SDTPS_GLOBAL,
        sdtps_after_block=m.SDTPS_AFTER_BLOCK,
        sdtps_aux_head=m.SDTPS_AUX_HEAD,
        sdtps_only=m.SDTPS_ONLY,
        neck_feat=cfg.TEST.NECK_FEAT,
        branch_norm=cfg.TEST.BRANCH_NORM,
        frozen=m.FROZEN,
    )


def _make_fusion(m: CfgNode, backbone: Backbone) -> Fusion:
    if backbone.embed_dim % m.HEAD:
        raise UserError(f"MODEL.HEAD is {m.HEAD}, expected a divisor of the feature width {backbone.embed_dim}")
    return Fusion(backbone.embed_dim, m.HEAD)


def _make_sdtps(m: CfgNode, backbone: Backbone, kind: type[SDTPS]) -> SDTPS:
    return kind(
        embed_dim=backbone.embed_dim,
        num_patches=backbone.num_patches,
        sparse_ratio=m.SDTPS_SPARSE_RATIO,
        aggr_ratio=m.SDTPS_AGGR_RATIO,
        beta=m.SDTPS_BETA,
        temperature=m.SDTPS_TEMPERATURE,
        score_grad=m.SDTPS_SCORE_GRAD,
        similarity=m.SDTPS_SIMILARITY,
        use_gumbel=m.SDTPS_USE_GUMBEL,
        gumbel_tau=m.SDTPS_GUMBEL_TAU,
        choice=m.SDTPS_CHOICE,
    )
