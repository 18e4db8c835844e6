"""Sample data: a multi-spectral person re-identification data set, drawn by the computer in RGBNT201's layout.

    python -m data.synthetic --out datasets --preset mini

An image is a pure function of seed, split, identity, camera and frame, so every run gives the same files, whatever the
number of workers. A camera is a scene with its own light, colours and obstacles: backgrounds tell the camera, not the
person. What tells people apart is what they wear and carry, and some of it shows in one modality only.
"""

from data.synthetic.plan import GENERATOR_VERSION, PRESETS, Preset, Split
from data.synthetic.writer import contact_sheet, generate

__all__ = ["GENERATOR_VERSION", "PRESETS", "Preset", "Split", "contact_sheet", "generate"]
