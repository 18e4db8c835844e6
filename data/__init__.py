"""From image files to batches: data sets, decoding, augmentation, identity sampling, loaders."""

from .make_dataloader import Batch, EvalLoader, ReidData, TrainLoader, make_dataloader
from .workers import tell_lost_workers

__all__ = ["Batch", "EvalLoader", "ReidData", "TrainLoader", "make_dataloader", "tell_lost_workers"]
