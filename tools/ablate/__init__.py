"""Tells a module's effect from noise: the same training with and without it, by several seeds; see docs/ablation.md."""
