"""The three image modalities, in the order in which every tensor, module and file of this project lists them."""

MODALITIES = ("RGB", "NI", "TI")
"""RGB (visible light), NI (near-infrared), TI (thermal infrared)."""
