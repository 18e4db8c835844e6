"""Sample vehicles: published counts, both layouts as the parsers read them, and what is drawn."""

from collections import Counter, defaultdict
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.datasets import LAYOUTS, STRIP_BOXES, load_dataset
from data.synthetic import SETS, CameraSplit, Preset, SceneSplit, contact_sheet, generate
from data.synthetic import __main__ as command
from data.synthetic.canvas import Canvas, View
from data.synthetic.finish import uniform
from data.synthetic.imaging import GLOW, TI
from data.synthetic.plan import plan
from data.synthetic.sets import differences
from data.synthetic.vehicle import HEIGHT, SLOTS, WIDTH, draw_vehicle
from data.synthetic.vehicle_body import BODIES
from data.synthetic.vehicle_identity import EXTRAS, GRILLES, HEADLIGHTS, LIVERIES, RIMS, TAIL_LIGHTS, sample_vehicle

TINY = {
    "RGBNT100": Preset(
        "tiny",
        {
            "bounding_box_train": CameraSplit({(1, 2): 2}, {(1, 2): 6}),
            "bounding_box_test": CameraSplit({(1, 2): 2}, {(1, 2): 6}, queries=3),
        },
    ),
    "MSVR310": Preset(
        "tiny",
        {
            "bounding_box_train": SceneSplit({1: (2, 5)}, num_scenes=2),
            "bounding_box_test": SceneSplit({1: (1, 2), 2: (2, 5)}, num_scenes=2, queries=3),
        },
    ),
}
both = pytest.mark.parametrize("name", TINY)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("vehicles")
    for name, preset in TINY.items():
        generate(path, preset, seed=1, workers=1, masks=True, dataset=name)
    return path


def plan_of(name, split=""):
    return [shot for shot in plan(TINY[name], SETS[name].source(1)) if split in shot.split]


@both
@pytest.mark.parametrize("preset", ["mini", "full"])
def test_plans_have_the_promised_counts_and_every_query_has_a_match(name, preset):
    sample_set = SETS[name]
    shots = plan(sample_set.presets[preset], sample_set.source(0))
    train, gallery = ([s for s in shots if s.split == split] for split in ("bounding_box_train", "bounding_box_test"))
    query = [s for s in shots if s.query]
    counts = [
        (len({s.pid for s in part}), len(part), len({s.camera for s in part})) for part in (train, query, gallery)
    ]
    promised = {
        ("RGBNT100", "mini"): [(16, 256, 4), (12, 40, 4), (12, 120, 4)],
        ("MSVR310", "mini"): [(20, 120, 8), (10, 30, 8), (16, 80, 8)],
    }
    assert counts == promised.get((name, preset), list(LAYOUTS[name].published))
    assert not {s.pid for s in train} & {s.pid for s in gallery}
    assert all(s.split == "bounding_box_test" for s in query)
    places = defaultdict(set)
    for shot in gallery:
        places[shot.pid].add(shot.place)
    assert all(len(places[s.pid]) > 1 for s in query)
    files = [file for s in shots for file in sample_set.layout(s)]
    assert len(files) == len(set(files))


def test_msvr310_identities_are_as_uneven_as_the_published_ones():
    shots = plan(SETS["MSVR310"].presets["full"], SETS["MSVR310"].source(0))
    sizes = Counter(s.pid for s in shots if s.split == "bounding_box_train").values()
    assert min(sizes) == 2 and 20 < max(sizes) <= 31


@both
def test_files_parse_and_queries_are_gallery_files(root, name):
    splits = load_dataset(name, root)
    planned = plan_of(name, "train")
    assert (len(splits.train), len(splits.query)) == (len(planned), 3)
    first = LAYOUTS[name].first_camera
    assert Counter(s.camid for s in splits.train) == Counter(s.camera - first for s in planned)
    gallery = {Path(s.path).name: Path(s.path) for s in splits.gallery}
    assert len(gallery) == len(splits.gallery)
    for sample in splits.query:
        assert gallery[Path(sample.path).name].read_bytes() == Path(sample.path).read_bytes()
    masks = list((root / name).rglob("MASK/*.png"))
    assert len(masks) == len(splits.train) + len(splits.query) + len(splits.gallery)


def test_names_are_those_of_the_published_sets(root):
    assert (root / "RGBNT100/rgbir/bounding_box_train/0001_c0002_000.jpg").is_file()
    assert all(LAYOUTS["MSVR310"].pattern.match(p.name) for p in (root / "MSVR310").rglob("*.jpg"))
    query, gallery = ({p.name for p in (root / "MSVR310" / s).iterdir()} for s in ("query3", "bounding_box_test"))
    assert query and query < gallery


def test_strips_hold_rgb_ni_ti_side_by_side(root):
    sample_set, shot = SETS["RGBNT100"], plan_of("RGBNT100")[0]
    vehicle = sample_set.identities(1, TINY["RGBNT100"], shot.split)[shot.number]
    images, _ = sample_set.render(sample_set.source(1), shot, vehicle)
    with Image.open(root / "RGBNT100" / next(iter(sample_set.layout(shot)))) as strip:
        assert (strip.size, strip.format) == ((768, 128), "JPEG")
        for box, image in zip(STRIP_BOXES, images.values(), strict=True):
            part = np.asarray(strip.crop(box), float)
            assert np.abs(part - image).mean() < 6  # JPEG


def test_masks_cover_the_vehicle(root):
    shares = [(np.asarray(Image.open(mask)) > 0).mean() for mask in (root / "RGBNT100").rglob("MASK/*.png")]
    assert min(shares) > 0.1 and max(shares) < 0.7


def test_every_two_vehicles_differ_in_several_visible_traits():
    sample_set = SETS["RGBNT100"]
    vehicles = sample_set.identities(0, sample_set.presets["full"], "bounding_box_test")
    assert min(differences(a, b) for a, b in combinations(vehicles, 2)) >= 4
    assert SETS["MSVR310"].identities(0, SETS["MSVR310"].presets["mini"], "bounding_box_test") != vehicles[:16]


def test_a_face_covers_its_pixels_and_knows_where_they_lie():
    """A rectangle of 4 x 2 units, 10 pixels a unit, seen straight on, then from behind, then behind a nearer one."""
    rectangle = np.array([(-2.0, 0.0, 0.5), (-2.0, 2.0, 0.5), (2.0, 2.0, 0.5), (2.0, 0.0, 0.5)])
    canvas = Canvas(View(yaw=0, pitch=0, scale=10, x=50, ground=40), 0.0, 32, 64)
    seen = {}

    def paint(lateral, up, front):
        seen.update(lateral=lateral, up=up, front=front)
        return np.full(lateral.shape, 7, np.uint8)

    canvas.face(rectangle[::-1], paint)
    assert not seen and not canvas.labels.any()
    canvas.face(rectangle, paint)
    rows, columns = np.nonzero(canvas.labels == 7)
    assert (columns.min(), columns.max(), rows.min(), rows.max()) == (30, 70, 20, 40)
    np.testing.assert_allclose(seen["lateral"], (columns - 50) / 10, atol=1e-9)
    np.testing.assert_allclose(seen["up"], (40 - rows) / 10, atol=1e-9)
    np.testing.assert_allclose(seen["front"], 0.5, atol=1e-9)
    canvas.face(rectangle - [0, 0, 1], lambda lateral, up, front: np.full(up.shape, 9, np.uint8))
    assert 9 not in canvas.labels
    canvas.face(rectangle + [0, 0, 1], lambda lateral, up, front: np.full(up.shape, 9, np.uint8))
    assert 7 not in canvas.labels


def draw(vehicle, yaw, running=0.0, lamps=False):
    view = View(yaw=yaw, pitch=0.15, scale=60, x=WIDTH, ground=170)
    return draw_vehicle(vehicle, view, 0.5, running, lamps, np.zeros(len(SLOTS)), np.random.default_rng(0))


def vehicle_of(rng, **wanted):
    while any(getattr(vehicle := sample_vehicle(rng), key) != value for key, value in wanted.items()):
        pass
    return vehicle


@pytest.mark.parametrize("body", BODIES)
def test_silhouettes_have_the_measures_of_the_body(body):
    """Seen from the side a vehicle is as long, from the front as wide as it is built (30 pixels a metre)."""
    vehicle = vehicle_of(np.random.default_rng(3), body=body)
    for yaw, metres, spare in ((np.pi / 2, BODIES[body].length, 0.1), (0.0, BODIES[body].width, 0.35)):
        layer = draw(vehicle, yaw)
        columns = np.nonzero((layer.alpha > 0.5).any(0))[0]
        assert 0 <= np.ptp(columns) + 1 - 30 * metres < 30 * spare + 3  # mirrors stand out
        assert np.isfinite(layer.surface).all() and layer.surface[..., :4].min() >= 0


def test_a_running_engine_shows_in_thermal_alone_and_lamps_in_visible_light():
    vehicle = vehicle_of(np.random.default_rng(4), body="saloon", engine=0.47)
    cold, warm, lit = draw(vehicle, 0.5), draw(vehicle, 0.5, running=1.0), draw(vehicle, 0.5, lamps=True)
    others = [i for i in range(6) if i != TI]
    np.testing.assert_array_equal(cold.surface[..., others], warm.surface[..., others])
    bonnet = warm.surface[..., TI] - cold.surface[..., TI] > 0.25
    assert 0.05 < bonnet.sum() / (cold.alpha > 0).sum() < 0.4
    assert cold.surface[..., GLOW].max() == 0 and lit.surface[..., GLOW].max() > 0.9


def test_every_fitting_can_be_seen():
    """Of two vehicles that differ in one fitting alone, some view shows it."""
    vehicle = vehicle_of(np.random.default_rng(5), body="estate", extra="none", sticker=None, dent=None)
    grey, white = uniform((0.4, 0.4, 0.4, 0.4, 0.3, 0.0)), uniform((0.8, 0.8, 0.8, 0.8, 0.4, 0.0))
    plain = replace(vehicle, finishes=vehicle.finishes | {"paint": grey, "bumper": grey, "rim": white})
    for field, values in {
        "rim": RIMS, "headlights": HEADLIGHTS, "tail_lights": TAIL_LIGHTS, "grille": GRILLES, "extra": EXTRAS,
        "sticker": (None, ("left", 0.5, 0.6), ("rear", 0.2, 0.6)), "dent": (None, (0.5, 0.5)),
    }.items():  # fmt: skip
        pictures = [[draw(replace(plain, **{field: value}), yaw).surface for yaw in (-0.7, 2.4)] for value in values]
        for one, other in combinations(pictures, 2):
            assert max(np.abs(a - b).max() for a, b in zip(one, other, strict=True)) > 0.1, field


def test_every_livery_shows_a_part_of_the_body_and_only_a_part():
    s, h = np.meshgrid(np.linspace(0, 1, 200), np.linspace(0, 1.6, 80))
    for name, livery in LIVERIES.items():
        share = np.mean([livery(s, h, np.full(s.shape, x)).mean() for x in (0.9, 0.2)])
        assert share == 0 if name == "plain" else 0.01 < share < 0.8, name


def test_contact_sheet_of_vehicles_is_as_wide_as_that_of_people():
    wide = contact_sheet(TINY["RGBNT100"], seed=1, rows=1, dataset="RGBNT100")
    assert wide.size == (6 * 258 - 2, 16 + HEIGHT)


def test_command_line_writes_the_data_set_asked_for(tmp_path, monkeypatch):
    asked = {}
    monkeypatch.setattr(command, "generate", lambda *arguments: asked.update(arguments=arguments))
    monkeypatch.setattr("sys.argv", ["synthetic", "--out", str(tmp_path), "--dataset", "MSVR310"])
    command.main(command.parse_args())
    assert asked["arguments"] == (tmp_path, "mini", 0, None, False, False, "MSVR310")
