"""The parts of the page that the checkpoint's evaluation gives: CMC, rankings, patches, distances, map."""

from collections.abc import Sequence

from PIL import Image

from tools.report.charts import Series, density_chart, line_chart, scatter_chart
from tools.report.evaluation import Evaluation, RankedQuery
from tools.report.html import Html, code, join, note, table, tag
from tools.report.ranking import Separation
from tools.report.results import colour, legend
from tools.report.run import Run
from tools.report.tiles import VIEWS, Look, data_uri, tile, views
from utils.modalities import MODALITIES
from utils.pictures import draw_share

RANKS = 20
TITLES = {"best": "Best queries", "typical": "Typical queries", "worst": "Worst queries"}
MEANINGS = {
    "predicted_spread": "how differently the predictor scores the patches of an image; near 0: all alike",
    "predicted_mean": "its mean score",
    "kept_range": "best minus worst score among the kept patches",
    "agreement": "patches that two modalities both keep, over those that either keeps",
    "cell_spread": "0 where every place is kept alike; high where the place decides, whatever the image shows",
    "person_recall": "share of the person's patches that were kept",
    "person_precision": "share of the kept patches that are the person's",
}
"""What the statistics of SDTPS mean."""
TOGGLES = {"images": "Images", "kept": "Kept patches", "scores": "Scores"}


def rank_curves(runs: Sequence[Run], evaluations: Sequence[Evaluation | None]) -> Html | None:
    """CMC of every branch."""
    series = [
        Series(
            branch if len(runs) == 1 else f"{run.label} {branch}",
            [(i + 1.0, float(value)) for i, value in enumerate(cmc[:RANKS])],
            colour(branch),
            dashed=i > 0,
        )
        for i, (run, evaluation) in enumerate(zip(runs, evaluations, strict=True))
        if evaluation is not None
        for branch, cmc in evaluation.cmc.items()
    ]
    if not series:
        return None
    branches = list(dict.fromkeys(b for e in evaluations if e is not None for b in e.cmc))
    chart = line_chart("CMC: queries with a match among the first k", series, unit=" %", x_label="rank", top=100)
    charts = [chart]
    for run, evaluation in zip(runs, evaluations, strict=True):
        if evaluation is not None:
            charts.append(_distances(evaluation.separation, run.label if len(runs) > 1 else ""))
    told = [
        f"{f'In {run.label}, ' if len(runs) > 1 else ''}{100 * evaluation.separation.ordered:.1f} % of the pairs of "
        "one identity are nearer than a pair of two identities taken at random."
        for run, evaluation in zip(runs, evaluations, strict=True)
        if evaluation is not None
    ]
    return join([legend(branches, runs), tag("div", *charts, class_="grid small"), note(" ".join(told))])


def _distances(found: Separation, label: str) -> Html:
    step = (found.high - found.low) / len(found.same)
    middles = [found.low + (i + 0.5) * step for i in range(len(found.same))]
    series = [
        Series(name, list(zip(middles, values.tolist(), strict=True)), shade)
        for name, values, shade in (
            ("two identities", found.other, "c-distinct"),
            ("same identity", found.same, "c-same"),
        )
    ]
    keys = (tag("span", "same identity", class_="key c-same"), tag("span", "two identities", class_="key c-distinct"))
    title = join([f"Distances of pairs{f', {label}' if label else ''}: ", *keys])
    return density_chart(title, (found.low, found.high), series, "distance")


def queries(evaluation: Evaluation) -> Html:
    """Each chosen query with its first gallery entries; buttons change what the pictures show."""
    asked, gallery, identities = evaluation.counts
    pictures = {image: _pictures(look, evaluation) for image, look in evaluation.looks.items()}
    offered = [view for view in VIEWS if view in next(iter(pictures.values()))]
    buttons: list[Html] = []
    for i, view in enumerate(offered if len(offered) > 1 else []):
        checked = "checked" if i == 0 else None
        buttons.append(tag("input", type="radio", name="view", id=f"view-{view}", class_="view", checked=checked))
    labels = [tag("label", TOGGLES[view], for_=f"view-{view}") for view in offered] if buttons else []
    lists = [
        join([tag("h3", TITLES[name]), *(_ranked(query, evaluation, pictures) for query in group)])
        for name, group in evaluation.groups.items()
        if group
    ]
    told = note(
        f"{asked:,} queries of {identities:,} identities, {gallery:,} gallery images, ranked by ",
        code(evaluation.branch),
        f". Each picture shows {', '.join(MODALITIES)}; green is the query's identity, red another one; rank, distance "
        "and file stand below. What the protocol leaves out of a query's gallery is not shown.",
    )
    switch = tag("div", *labels, class_="switch") if labels else None
    return join([told, *buttons, switch, tag("div", *lists, class_="lists")])


def _pictures(look: Look, evaluation: Evaluation) -> dict[str, Html]:
    """View -> the sample's picture."""
    found = {}
    for view, panels in views(look, evaluation.grid).items():
        image = tile(panels)
        found[view] = tag(
            "img", src=data_uri(image), class_=f"of-{view}", alt="", width=image.width, height=image.height
        )
    return found


def _ranked(query: RankedQuery, evaluation: Evaluation, pictures: dict[int, dict[str, Html]]) -> Html:
    first = "no match" if query.first == 0 else f"first match at rank {query.first}"
    title = tag(
        "figcaption",
        tag("strong", f"id {evaluation.pids[query.image]}"),
        tag("span", f"average precision {100 * query.precision:.1f} %, {first}"),
        tag("span", evaluation.names[query.image], class_="name"),
    )
    asked = tag("figure", *pictures[query.image].values(), title, class_="tile query")
    entries = [
        tag(
            "figure",
            *pictures[image].values(),
            tag(
                "figcaption",
                tag("span", tag("b", f"{rank} {'✓' if match else '✗'}"), f" {distance:.3f}", class_="rank"),
                tag("span", evaluation.names[image], class_="name"),
            ),
            class_=f"tile {'match' if match else 'other'}",
            title=f"rank {rank}: id {evaluation.pids[image]}, {evaluation.names[image]}, distance {distance:.4f}",
        )
        for rank, (image, distance, match) in enumerate(query.entries, 1)
    ]
    return tag("div", asked, tag("div", *entries, class_="entries"), class_="ranked")


def patches(evaluation: Evaluation) -> Html | None:
    """What SDTPS kept on some queries, how it scored their patches, and where it looks on the whole."""
    if evaluation.kept_share is None:
        return None
    blocks = []
    for name, group in evaluation.groups.items():
        for query in group[:1]:
            panels = views(evaluation.looks[query.image], evaluation.grid)
            told = {
                "images": f"{name.capitalize()} query, id {evaluation.pids[query.image]}",
                "kept": "Kept",
                "scores": "Scores",
            }
            drawn = [_plain(tile(panels[view]), told[view]) for view in VIEWS]
            blocks.append(tag("div", *drawn, class_="triple", title=evaluation.names[query.image]))
    share = tile([draw_share(of_one[None], evaluation.grid) for of_one in evaluation.kept_share])
    cells = _plain(share, "Share of all test images that keep each patch: none is dark blue, all is light yellow")
    text = note(
        "Outlined patches are kept; the dark ones are dropped and fused into one token. Scores go from dark blue "
        f"(lowest of that picture) to light yellow (highest). {', '.join(MODALITIES)} in this order.",
    )
    return join([text, *blocks, tag("div", cells, _statistics(evaluation), class_="grid last")])


def _plain(picture: Image.Image, caption: str) -> Html:
    image = tag("img", src=data_uri(picture, 85), alt=caption, width=picture.width, height=picture.height)
    return tag("figure", image, tag("figcaption", caption), class_="tile plain")


def _statistics(evaluation: Evaluation) -> Html:
    """What SDTPS chose over all test images, in figures."""
    found: dict[str, list[str]] = {}
    for name, value in evaluation.statistics.items():
        _, statistic, of = name.split("/")
        found.setdefault(statistic, []).append(f"{of} {value:.2f}")
    rows = [
        [
            name.replace("_", " "),
            tag("td", *(tag("div", value) for value in values), class_="n"),
            MEANINGS.get(name, ""),
        ]
        for name, values in found.items()
    ]
    return table(["over all test images", "", ""], rows, class_="statistics")


def feature_map(runs: Sequence[Run], evaluations: Sequence[Evaluation | None]) -> Html | None:
    """The features of test images in the plane."""
    charts = []
    for run, e in zip(runs, evaluations, strict=True):
        if e is None:
            continue
        pids, camids = ([values[i] for i in e.mapped] for values in (e.pids, e.camids))
        names = [f"id {e.pids[i]}, {e.names[i]}" for i in e.mapped]
        of = f" of {run.label}" if len(runs) > 1 else ""
        title = f"t-SNE of {e.branch}{of}: {len(e.mapped)} of {len(e.names)} test images"
        charts.append(scatter_chart(title, e.places.tolist(), pids, camids, names))
    if not charts:
        return None
    told = note(
        "A colour and a number for each identity, a symbol for each camera. What lies close together is alike; how far "
        "groups lie apart means little."
    )
    return join([told, tag("div", *charts, class_="grid map")])
