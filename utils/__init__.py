"""Metrics, checkpoint files, logging and pictures: helpers that know no model."""
