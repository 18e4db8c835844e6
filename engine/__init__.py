"""The training loop and the evaluator."""

from engine.evaluator import do_inference, evaluate
from engine.processor import do_train

__all__ = ["do_inference", "do_train", "evaluate"]
