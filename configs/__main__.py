"""Prints every config key with its default, allowed values and meaning: `python -m configs > docs/configuration.md`."""

import sys

from configs.defaults import describe

HEADER = """# Configuration

Every key, from `configs/defaults.py`; this page is `python -m configs`.
"""

sys.stdout.write(f"{HEADER}\n{describe().strip()}\n")
