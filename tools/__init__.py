"""Thin commands over the packages."""

from utils.cli import tell_interrupts

tell_interrupts()  # before any of them loads what is slow to load
