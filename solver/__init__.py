"""What training minimises and how it steps: loss terms, parameter groups, learning rates."""

from solver.make_loss import ReIDLoss, make_loss, triplet_loss
from solver.make_optimizer import make_optimizer
from solver.scheduler import create_scheduler

__all__ = ["ReIDLoss", "create_scheduler", "make_loss", "make_optimizer", "triplet_loss"]
