"""One YAML, checked as a whole: ``load_cfg(config_file, opts)`` gives the frozen config of a run."""

from configs.defaults import describe, get_cfg
from configs.loading import diff, dump, load_cfg, print_config
from configs.validate import validate, warn

__all__ = ["describe", "diff", "dump", "get_cfg", "load_cfg", "print_config", "validate", "warn"]
