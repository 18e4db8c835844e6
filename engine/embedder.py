"""A trained model as a function from images to features: what search, export and other people's code start from."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from tqdm import tqdm
from yacs.config import CfgNode

from configs import load_cfg
from data.datasets import Sample
from data.images import read_image
from data.make_dataloader import TripleDataset, collate
from data.transforms import EvalTransform, make_transforms
from engine.device import autocast_dtype, select_device
from engine.output import CONFIG_FILE, LAST
from modeling import ReIDModel, ReIDOutput
from modeling.trained import load_trained
from utils.checkpoint import read_file
from utils.errors import UserError
from utils.modalities import MODALITIES

log = logging.getLogger(__name__)

AnyImage: TypeAlias = "Image.Image | Tensor | str | Path | None"


class Embedder(nn.Module):
    """A model with what its config says about its input and its features; called, it is the model.

    Attributes:
        model: see `modeling.make_model`.
        cfg: its config.
        transform: decoded images -> network input.
    """

    def __init__(self, model: ReIDModel, cfg: CfgNode):
        super().__init__()
        self.model, self.cfg = model, cfg
        self.transform: EvalTransform = make_transforms(cfg)[1]
        self.eval()

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def branches(self) -> tuple[str, ...]:
        """The features that there are, best last."""
        return (*self.model.branches, "both") if len(self.model.branches) > 1 else self.model.branches

    def digest(self) -> str:
        """What tells one set of weights from another: 16 hexadecimal digits of SHA-256 over all tensors."""
        found = hashlib.sha256()
        for name, tensor in self.model.state_dict().items():
            found.update(name.encode())
            found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return found.hexdigest()[:16]

    @property
    def num_cameras(self) -> int:
        """Cameras with an embedding of their own."""
        embedding = self.model.backbone.cam_embed
        return 0 if embedding is None else len(embedding)

    def forward(
        self, images: dict[str, Tensor], camid: Tensor | None = None, present: Tensor | None = None
    ) -> ReIDOutput:
        return self.model(images, camid, present)

    def embed(
        self, images: Mapping[str, Sequence[AnyImage]], camid: Sequence[int] | None = None, branch: str | None = None
    ) -> Tensor:
        """Features of images as they come: of any size, as files or decoded.

        Args:
            images: modality -> B images, each a path, a PIL image, or a uint8 tensor (3, H, W). A modality may be left
                out, or None where a sample lacks it; each sample needs at least one.
            camid: the camera of each sample, from 0 as in training; None takes the mean camera embedding.
            branch: which feature, one of `branches`; None takes the last: `both`, or the only one.

        Returns:
            (B, D) float32 on the model's device, of length 1 under TEST.FEAT_NORM.

        Raises:
            UserError: an unknown modality, branch or camera, lists of different lengths, a sample without an image, a
                file that cannot be decoded, or something that is no image.
        """
        rows = _samples(images)
        if camid is not None and len(camid) != len(rows):
            raise UserError(f"camid has {len(camid)} entries for {len(rows)} samples.")
        features = []
        for start in range(0, len(rows), self.cfg.TEST.IMS_PER_BATCH):
            stop = start + self.cfg.TEST.IMS_PER_BATCH
            batch = [self._prepare(row) for row in rows[start:stop]]
            present = torch.tensor([[image is not None for image in row] for row in rows[start:stop]])
            cameras = None if camid is None else torch.as_tensor(camid[start:stop])
            stacked = dict(zip(MODALITIES, torch.stack(batch, dim=1), strict=True))
            features.append(self._features(stacked, cameras, None if present.all() else present, branch))
        return torch.cat(features)

    def embed_samples(
        self, samples: Sequence[Sample], *, branch: str | None = None, use_camera: bool = True, workers: int = 0
    ) -> Tensor:
        """Features (N, D) of a data set's samples, on the CPU; otherwise as `embed`."""
        loader = DataLoader(
            TripleDataset(samples, self.transform),
            batch_size=self.cfg.TEST.IMS_PER_BATCH,
            collate_fn=collate,
            num_workers=workers,
        )
        features = []
        for batch in tqdm(loader, desc="features", leave=False, disable=None):
            camid = batch.camid if use_camera else None
            features.append(self._features(batch.images, camid, batch.present, branch).cpu())
        return torch.cat(features)

    def _prepare(self, row: Sequence[AnyImage]) -> Tensor:
        """The images of one sample -> (M, 3, H, W), zeros where there is none."""
        decoded = [_decode(image) for image in row if image is not None]
        pixels = iter(self.transform(decoded))
        height, width = self.transform.size
        return torch.stack([torch.zeros(3, height, width) if image is None else next(pixels) for image in row])

    @torch.no_grad()
    def _features(
        self, images: dict[str, Tensor], camid: Tensor | None, present: Tensor | None, branch: str | None
    ) -> Tensor:
        branch = self.branches[-1] if branch is None else branch
        if branch not in self.branches:
            raise UserError(f"there is no branch {branch!r}; this model has {', '.join(self.branches)}.")
        if camid is not None and self.num_cameras and not 0 <= int(camid.min()) <= int(camid.max()) < self.num_cameras:
            raise UserError(
                f"cameras {int(camid.min())} to {int(camid.max())}, but the model knows 0 to {self.num_cameras - 1}; "
                "leave the camera out to take the mean of those."
            )
        device = self.device
        dtype = autocast_dtype(self.cfg.SOLVER.AMP, device)
        moved = [None if x is None else x.to(device) for x in (camid, present)]
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            output = self.model({m: x.to(device) for m, x in images.items()}, *moved)
        feature = output.features[branch].float()
        return F.normalize(feature, dim=-1) if self.cfg.TEST.FEAT_NORM else feature


def load_model(run_dir: str | Path, *, device: str = "auto", opts: Sequence[Any] = ()) -> Embedder:
    """The model of a run, ready to embed images.

    Args:
        run_dir: the folder that training wrote, for its config.yml and its best checkpoint (where there is none, its
            last one); or one checkpoint in such a folder.
        device: "auto" takes CUDA, else MPS, else the CPU.
        opts: KEY, VALUE, … that change its config, such as TEST.NECK_FEAT after.

    Raises:
        UserError: config or checkpoint are missing or do not fit each other.
    """
    given = Path(run_dir).expanduser()
    folder = given if given.is_dir() else given.parent
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(f"{folder}: no {CONFIG_FILE} there; give the folder that train_net.py wrote (OUTPUT_DIR).")
    cfg = load_cfg(folder / CONFIG_FILE, opts)
    checkpoint = find_checkpoint(folder, cfg.MODEL.NAME) if given.is_dir() else given
    model = load_trained(cfg, read_file(checkpoint), checkpoint)
    log.info("the model of %s", checkpoint)
    return Embedder(model.to(select_device(device)), cfg)


def find_checkpoint(run_dir: Path, name: str) -> Path:
    """The best checkpoint of a run, else its last.

    Raises:
        UserError: there is neither.
    """
    candidates = (run_dir / f"{name}best.pth", run_dir / LAST)
    for path in candidates:
        if path.is_file():
            return path
    raise UserError(f"{run_dir}: neither {' nor '.join(path.name for path in candidates)} is there; train first.")


def _samples(images: Mapping[str, Sequence[AnyImage]]) -> list[list[AnyImage]]:
    """Modality -> B images, as B rows of one image or None a modality."""
    if unknown := sorted(set(images) - set(MODALITIES)):
        raise UserError(f"unknown modalities {', '.join(unknown)}; known are {', '.join(MODALITIES)}.")
    lengths = {name: len(listed) for name, listed in images.items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise UserError(f"as many images of each modality are needed, at least one; got {lengths}.")
    columns = [images.get(name, [None] * next(iter(lengths.values()))) for name in MODALITIES]
    rows = [list(row) for row in zip(*columns, strict=True)]
    for i, row in enumerate(rows):
        if all(image is None for image in row):
            raise UserError(f"sample {i} has no image in any modality.")
    return rows


def _decode(image: Image.Image | Tensor | str | Path) -> Image.Image:
    if isinstance(image, (str, Path)):
        return read_image(str(image))
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if isinstance(image, Tensor) and image.dtype == torch.uint8 and image.dim() == 3 and len(image) == 3:
        return v2.functional.to_pil_image(image.cpu())
    what = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
    raise UserError(f"an image is a path, a PIL image or a uint8 tensor (3, H, W); got {what}.")
