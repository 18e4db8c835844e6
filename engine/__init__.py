"""The training loop, the evaluator, and trained models as functions of images."""

from engine.embedder import Embedder, load_model
from engine.evaluator import do_inference, evaluate
from engine.processor import do_train

__all__ = ["Embedder", "do_inference", "do_train", "evaluate", "load_model"]
