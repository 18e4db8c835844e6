"""One HTML page that tells what a run, or two runs side by side, came to: python -m tools.report --help."""
