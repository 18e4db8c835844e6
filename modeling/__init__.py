"""Backbone, branches and the model that joins them. `make_model` is the entry."""

from modeling.make_model import Encoded, ReIDModel, ReIDOutput, make_model

__all__ = ["Encoded", "ReIDModel", "ReIDOutput", "make_model"]
