"""Sample data: multi-spectral re-identification data sets, drawn by the computer.

    python -m data.synthetic --out datasets --dataset RGBNT201 --preset mini

People in RGBNT201's layout, vehicles in RGBNT100's and MSVR310's. An image is a pure function of seed, split, identity,
place and frame, so every run gives the same files, whatever the number of workers. A camera or scene has its own light,
colours and obstacles: backgrounds tell the place, not who is seen. What tells people apart is what they wear and carry,
what tells vehicles apart is how they are built, painted and fitted out, and some of it shows in one modality only.
"""

from data.synthetic.plan import CameraSplit, Preset, SceneSplit
from data.synthetic.sets import SETS, SampleSet
from data.synthetic.sheet import contact_sheet
from data.synthetic.writer import generate

__all__ = ["SETS", "CameraSplit", "Preset", "SampleSet", "SceneSplit", "contact_sheet", "generate"]
