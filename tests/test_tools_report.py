import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from browser.chromium import Chromium, find_chromium
from conftest import TINY
from PIL import Image

from configs import dump, load_cfg
from data import make_dataloader
from engine import do_train
from engine.output import CONFIG_FILE
from modeling import make_model
from solver import create_scheduler, make_loss, make_optimizer
from tools.report.__main__ import main, parse_args
from tools.report.charts import Series, line_chart, ticks
from tools.report.evaluation import evaluate_run, look_at
from tools.report.html import VOID, Html, join, key, tag
from tools.report.ranking import Ranking, choose_queries, rank_queries, separate
from tools.report.run import read_run
from tools.report.tiles import Look, tile, views
from tools.report.tsne import affinities, principal_components, tsne
from utils.errors import UserError
from utils.metrics import rank_metrics


class Page(HTMLParser):
    """Reads a page and holds what the tests ask for; an element that is not closed in its turn is a fault."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, name, attributes):
        self.tags.append(name)
        given = dict(attributes)
        self.addresses += [given[a] for a in ("src", "href", "srcset", "data", "action", "poster") if a in given]
        self.ids += [given["id"]] if "id" in given else []
        if name not in VOID:
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, text):
        if self.open and self.open[-1] != "style":
            self.text += text


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_dataset):
    """The folder of a finished run of two epochs."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "tiny.yml").write_text(f"{TINY}DATASETS: {{NAMES: RGBNT201, ROOT_DIR: {tiny_dataset}}}\n")
    cfg = load_cfg(folder / "tiny.yml", ["OUTPUT_DIR", str(folder / "run")])
    data = make_dataloader(cfg)
    model = make_model(cfg, num_classes=data.num_classes, num_cameras=data.num_cameras)
    optimizer = make_optimizer(cfg, model)
    do_train(cfg, model, data, make_loss(cfg, data.num_classes), optimizer, create_scheduler(cfg, optimizer))
    return folder / "run"


@pytest.fixture
def run_dir(trained, tmp_path):
    """A copy of that folder which a test may change."""
    return shutil.copytree(trained, tmp_path / "run")


def write(*words) -> str:
    """The page that a command line writes."""
    args = parse_args([str(word) for word in words])
    main(args)
    return (args.out or args.runs[0] / "report.html").read_text(encoding="utf-8")


def pictures(page: Page) -> list[Image.Image]:
    found = [a for a in page.addresses if a.startswith("data:image/webp;base64,")]
    return [Image.open(io.BytesIO(base64.b64decode(a.partition(",")[2]))) for a in found]


@pytest.fixture(scope="module")
def whole(trained, tmp_path_factory):
    """The page about the finished run."""
    return write(trained, "--out", tmp_path_factory.mktemp("page") / "new" / "page.html")


def test_page_is_whole_and_needs_nothing_else(whole):
    page = Page(whole)
    assert all(a.startswith(("data:image/", "#")) for a in page.addresses)
    assert {a[1:] for a in page.addresses if a.startswith("#")} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert "http" not in whole and "url(" not in whole and "@import" not in whole
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    shown = pictures(page)
    assert len(shown) == page.tags.count("img") > 20
    for picture in shown:
        picture.load()
        assert min(picture.size) > 8
    assert len(whole) < 2_000_000


def test_page_tells_the_run(whole, trained):
    page, results = Page(whole), json.loads((trained / "metrics.json").read_text())
    for title in ("Verdict", "Curves", "Ranking and distances", "Queries", "Patches", "Map", "Config", "Made with"):
        assert title in page.text
    for when in ("before", "last", "best"):
        for branch in ("ori", "sdtps", "both"):
            assert f"{results[when][branch]['mAP']:.1f}" in page.text
    assert f"mAP {results['last']['both']['mAP']:.1f}" in page.text
    assert "000500_cam" in page.text
    assert "MODEL.USE_SDTPS" in page.text and "SOLVER.MARGIN" in page.text
    assert "Not on this page" not in page.text
    assert "Missing modalities were not tested" in page.text


def test_evaluation_agrees_with_the_run(trained):
    """What is computed for the page is what training noted for the same checkpoint."""
    run = read_run(trained)
    found = evaluate_run(run.cfg, run.checkpoint())
    epoch, best = run.evaluations()["best"]
    assert found.epoch == epoch
    for branch, row in best.items():
        assert found.metrics[branch] == pytest.approx(row, abs=1e-3)
        assert found.cmc[branch][4] == pytest.approx(row["R5"], abs=1e-3)
    for queries in found.groups.values():
        for query in queries:
            distances = [distance for _, distance, _ in query.entries]
            assert distances == sorted(distances)
            for image, _, match in query.entries:
                assert match == (found.pids[image] == found.pids[query.image])
                assert not match or found.camids[image] != found.camids[query.image]
                assert image in found.looks


def test_looks_are_those_of_their_images(tiny_cfg):
    cfg = tiny_cfg()
    data = make_dataloader(cfg, train=False)
    model = make_model(cfg, num_classes=6, num_cameras=2).eval()
    looks = look_at(cfg, model, data.val, [1, 7, 10])
    assert list(looks) == [1, 7, 10]
    for image, look in looks.items():
        for pixels, modality in zip(look.pixels, ("RGB", "NI", "TI"), strict=True):
            stored = np.asarray(Image.open(data.val.paths[image].replace("/RGB/", f"/{modality}/")))
            assert np.array_equal(pixels.permute(1, 2, 0).numpy(), stored)
        assert look.mask.shape == look.scores.shape == (3, 8)
        assert look.mask.sum(dim=1).tolist() == [4, 4, 4]
        for kept, scores in zip(look.mask, look.scores, strict=True):
            assert scores[kept].min() >= scores[~kept].max()
    assert sum(len(batch.pid) for batch in data.val) == 12  # the loader is as it was


def test_without_data_or_checkpoint_the_logs_are_told(run_dir):
    page = Page(write(run_dir, "--options", "DATASETS.ROOT_DIR", "/nowhere"))
    assert "RGBNT201 was not found" in page.text and "Curves" in page.text and "Queries" not in page.text
    for path in run_dir.glob("*.pth"):
        path.unlink()
    page = Page(write(run_dir))
    assert "holds no checkpoint" in page.text and "Curves" in page.text
    (run_dir / CONFIG_FILE).unlink()
    (run_dir / "metrics.jsonl").unlink()
    page = Page(write(run_dir))
    assert "without its config" in page.text and "metrics.jsonl: cannot be read" in page.text
    (run_dir / "metrics.json").unlink()
    with pytest.raises(UserError, match="Give the OUTPUT_DIR of a run"):
        write(run_dir)


def test_nothing_from_a_file_becomes_markup(run_dir):
    hostile = "<script>alert(1)</script>&\"'"
    cfg = load_cfg(run_dir / CONFIG_FILE, ["DATALOADER.CACHE_DIR", hostile])
    (run_dir / CONFIG_FILE).write_text(dump(cfg))
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"kind": "diagnosis", "step": 1, "epoch": 1, hostile: 1.0}) + "\n")
        file.write(json.dumps({"kind": "diagnosis", "step": 2, "epoch": 2, "some_rule": 0.5}) + "\n")
    with open(run_dir / "train.log", "a") as file:
        file.write(f"2026-01-01 00:00:00,000 engine.diagnosis WARNING: diagnosis some_rule: {hostile}\n")
        file.write(f"2026-01-01 00:00:00,000 engine.processor INFO: training on {hostile}\n")
    results = json.loads((run_dir / "metrics.json").read_text())
    results["last"][hostile] = results["last"]["ori"]
    (run_dir / "metrics.json").write_text(json.dumps(results))
    text = write(run_dir, "--logs-only")
    page = Page(text)
    assert "script" not in page.tags and "<script" not in text
    assert page.text.count(hostile) >= 4


def test_diagnosis_is_told_once_a_rule(run_dir):
    with open(run_dir / "metrics.jsonl", "a") as file:
        for epoch in (3, 5):
            file.write(json.dumps({"kind": "diagnosis", "step": epoch, "epoch": epoch, "importance_flat": 0.05}) + "\n")
    with open(run_dir / "train.log", "a") as file:
        for value in ("old", "new"):
            file.write(f"2026-01-01 00:00:00,000 engine.diagnosis WARNING: diagnosis importance_flat: {value} words\n")
    flat = next(warned for warned in read_run(run_dir).warnings() if warned.rule == "importance_flat")
    assert (flat.epochs, flat.message, flat.on_purpose) == ([3, 5], "new words", False)
    assert "importance flat (2 times, epochs 3 to 5). new words" in Page(write(run_dir, "--logs-only")).text


def test_missing_modalities(run_dir):
    rows = {p: {"both": {"mAP": 10.0 * i, "R1": 20.0, "R5": 0, "R10": 0}} for i, p in enumerate(("nothing", "r", "nt"))}
    results = json.loads((run_dir / "metrics.json").read_text()) | {"test": {"config": {}, "results": rows}}
    (run_dir / "metrics.json").write_text(json.dumps(results))
    text = Page(write(run_dir, "--logs-only")).text
    assert "NI and TI20.0 / 20.0" in text and "mean of 215.0 / 20.0" in text and "not tested" not in text


def test_two_runs(run_dir, trained, tmp_path):
    cfg = load_cfg(run_dir / CONFIG_FILE, ["SOLVER.MARGIN", 0.7])
    (run_dir / CONFIG_FILE).write_text(dump(cfg))
    other = run_dir.rename(tmp_path / "other")
    results = json.loads((other / "metrics.json").read_text())
    results["last"]["both"]["mAP"] += 5
    (other / "metrics.json").write_text(json.dumps(results))
    text = write(trained, other, "--out", tmp_path / "two.html")
    page = Page(text)
    assert "other ends 5.0 points above run" in page.text and "+5.0" in page.text
    assert "Differences between the runs" in page.text and "SOLVER.MARGIN0.30.7" in page.text
    assert 'class="line c-both dashed"' in text


def test_times_of_a_resumed_run(tmp_path):
    (tmp_path / "metrics.json").write_text("{}")
    start = "engine.processor INFO: training on cpu (2 threads), float32, torch 2.6"
    lines = [f"2026-01-01 10:00:00,000 {start}", "2026-01-01 10:01:00,000 engine.processor INFO: Epoch 1 done."]
    lines += [f"2026-01-02 10:00:00,000 {start}", "2026-01-02 10:00:30,500 engine.processor INFO: the end"]
    lines += ["2026-01-03 10:00:00,000 engine.evaluator INFO: missing modalities: r"]
    (tmp_path / "train.log").write_text("\n".join(lines))
    run = read_run(tmp_path)
    assert run.seconds() == 90
    assert run.device() == "cpu (2 threads), float32, torch 2.6"


def test_markup_is_escaped_unless_made_here():
    assert tag("p", "<b>", Html("<i></i>"), None, False, 0, class_='"', data_x=None) == (
        '<p class="&quot;">&lt;b&gt;<i></i>0</p>'
    )
    assert tag("img", src="a&b") == '<img src="a&amp;b">'
    assert join(["&", tag("br")]) == "&amp;<br>"
    assert key("A.<B") == '<code class="name-of-key">A.<wbr>&lt;B</code>'


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 10, [0, 2, 4, 6, 8, 10]), (0.93, 3.1, [1, 1.5, 2, 2.5, 3]), (68, 99, [70, 80, 90]), (5, 5, [5])],
)
def test_ticks(low, high, expected):
    assert ticks(low, high) == expected


def test_line_chart_places_points():
    chart = line_chart("t", [Series("a", [(0, 0.0), (10, 100.0)], "c-ori")], top=100)
    points = re.search(r'points="([^"]+)"', chart)[1].split()
    (x0, y0), (x1, y1) = (map(float, point.split(",")) for point in points)
    assert x0 == 50 and x1 == 466 and y1 == 14 and y0 > 200
    assert "no figures" in line_chart("t", [])


def test_rank_queries_agrees_with_the_metrics():
    g = torch.Generator().manual_seed(0)
    distance = torch.rand(30, 40, generator=g)
    q_pid, g_pid = torch.randint(5, (30,), generator=g), torch.randint(5, (40,), generator=g)
    q_cam, g_cam = torch.randint(3, (30,), generator=g), torch.randint(3, (40,), generator=g)
    ranking = rank_queries(distance, q_pid, g_pid, q_cam, g_cam)
    cmc, mean_ap = rank_metrics(distance, q_pid, g_pid, q_cam, g_cam)
    assert float(ranking.precision.nanmean()) == pytest.approx(mean_ap)
    for k in (1, 3, 10):
        assert float(((ranking.first > 0) & (ranking.first <= k)).float().mean()) == pytest.approx(cmc[k - 1])
    near = ranking.nearest(4, 6)
    allowed = [i for i in range(40) if not (g_pid[i] == q_pid[4] and g_cam[i] == q_cam[4])]
    assert near == sorted(allowed, key=lambda i: distance[4, i])[:6]


def test_choose_queries():
    """Six queries of three identities, whose one match is at these ranks."""
    ranks = [1, 9, 4, 2, 8, 5]
    distance = torch.arange(10.0).repeat(6, 1)
    same = torch.zeros(6, 10, dtype=torch.bool)
    for query, rank in enumerate(ranks):
        same[query, rank - 1] = True
    precision = torch.tensor([1 / rank for rank in ranks])
    ranking = Ranking(distance, same, torch.zeros_like(same), precision, torch.tensor(ranks), precision)
    pids = torch.tensor([1, 1, 2, 2, 3, 3])
    assert choose_queries(ranking, pids, 1) == {"best": [0], "typical": [2], "worst": [1]}
    assert choose_queries(ranking, pids, 2) == {"best": [0, 3], "typical": [2, 5], "worst": [1, 4]}
    many = choose_queries(ranking, pids, 3)
    assert sorted(many["best"] + many["worst"]) == list(range(6)) and many["typical"] == []


def test_separation():
    distance = torch.tensor([[0.0, 1.0, 2.0, 9.0]])
    same, left_out = torch.tensor([[True, False, True, False]]), torch.zeros(1, 4, dtype=torch.bool)
    found = separate(distance, same, left_out)
    assert (found.low, found.high) == (0, 9)
    assert found.ordered == pytest.approx(3 / 4)
    assert float(found.same.sum()) == pytest.approx(1) and int((found.other > 0).sum()) == 2
    alike = separate(torch.zeros(1, 4), same, left_out)
    assert alike.ordered == pytest.approx(1 / 2)
    with pytest.raises(UserError, match="one identity only"):
        separate(distance, torch.ones_like(same), left_out)


def test_views_and_tiles():
    pixels = torch.arange(3).view(3, 1, 1, 1).expand(3, 3, 32, 16).to(torch.uint8) * 100
    mask, scores = torch.zeros(3, 8, dtype=torch.bool), torch.arange(24.0).view(3, 8)
    mask[:, 4:] = True
    found = views(Look(pixels, mask, scores), (4, 2))
    assert [int(p.float().mean()) for p in found["images"]] == [0, 100, 200]
    assert [p.shape for p in found["kept"]] == [(3, 32, 16)] * 3
    assert int(found["kept"][2][:, 2, 8].sum()) < int(found["kept"][2][:, 24, 8].sum())
    assert list(views(Look(pixels), (4, 2))) == ["images"]
    assert tile(found["images"]).size == (3 * 16 + 4, 32)
    assert tile([p.transpose(1, 2) for p in found["images"]]).size == (32, 3 * 16 + 4)
    assert tile([p.repeat(1, 12, 12) for p in found["images"]]).size == (3 * 96 + 4, 192)
    assert np.asarray(tile(found["images"]))[:, -1].mean() == 200


def test_affinities_have_the_perplexity():
    points = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    p = affinities(points, 10.0)
    assert float(p.sum()) == pytest.approx(1, abs=1e-4)
    torch.testing.assert_close(p, p.T)
    assert float(p.diagonal().max()) < 1e-9


def test_tsne_keeps_groups_together():
    g = torch.Generator().manual_seed(0)
    centres = torch.randn(4, 16, generator=g) * 5
    group = torch.arange(4).repeat_interleave(15)
    points = centres[group] + torch.randn(60, 16, generator=g)
    places = tsne(points)
    assert places.shape == (60, 2) and torch.equal(places, tsne(points))
    distance = torch.cdist(places, places).fill_diagonal_(torch.inf)
    assert torch.equal(group[distance.argmin(dim=1)], group)
    assert tsne(points[:3]).shape == (3, 2)
    assert principal_components(torch.randn(5, 1)).shape == (5, 2)
    assert tsne(torch.ones(20, 4)).isfinite().all()


def test_command_line():
    with pytest.raises(SystemExit):
        parse_args(["a", "b", "c"])
    with pytest.raises(SystemExit):
        parse_args(["a", "b", "--weight", "w"])


@pytest.mark.skipif(find_chromium() is None, reason="no Chromium")
def test_in_a_browser(whole, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(whole, encoding="utf-8")
    with Chromium(find_chromium()) as browser:
        for width, dark in ((1280, False), (390, True), (320, False)):
            seen = browser.open(path, width, dark)
            assert seen["width"] == seen["scrollWidth"] == width, seen["wide"]
            browser.run("document.querySelectorAll('details').forEach(d => { d.open = true })")
            assert browser.run("document.documentElement.scrollWidth") == width
            assert seen["pictures"] > 20 and seen["broken"] == 0 and seen["svgs"] >= 6
        shown = "getComputedStyle(document.querySelector('.lists .of-{}')).display"
        assert [browser.run(shown.format(view)) for view in ("images", "kept")] == ["block", "none"]
        browser.run("document.querySelector('[for=view-kept]').click()")
        assert [browser.run(shown.format(view)) for view in ("images", "kept")] == ["none", "block"]
        assert browser.messages == []
        assert {url.partition(":")[0] for url in browser.requests} == {"file"}
