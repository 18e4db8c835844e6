"""Thin commands over the packages."""
