"""The parts of the page that the checkpoint's evaluation gives: CMC, rankings, patches, distances, map."""

from collections.abc import Sequence

import torch

from tools.report.charts import Series, density_chart, line_chart, scatter_chart
from tools.report.evaluation import Evaluation, RankedQuery
from tools.report.html import Html, code, join, note, section, table, tag
from tools.report.ranking import Separation
from tools.report.results import colour, legend
from tools.report.run import Run
from tools.report.tiles import VIEWS, Look, data_uri, tile, views
from utils.modalities import MODALITIES
from utils.pictures import draw_share

RANKS = 20
TITLES = {"best": "Best queries", "typical": "Typical queries", "worst": "Worst queries"}
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
        f"{'' if len(runs) == 1 else run.label + ': '}of a pair of the same identity and one of different ones, taken at "
        f"random, the same identity is nearer in {100 * evaluation.separation.ordered:.1f} %."
        for run, evaluation in zip(runs, evaluations, strict=True)
        if evaluation is not None
    ]
    keys = tag("p", _key("same identity", "c-same"), _key("other identity", "c-distinct"), class_="legend")
    parts = [legend(branches, runs), tag("div", *charts, class_="grid"), keys, note(" ".join(told).capitalize())]
    return section("Ranking and distances", *parts, id_="ranking")


def _key(text: str, shade: str) -> Html:
    return tag("span", text, class_=f"key {shade}")


def _distances(found: Separation, label: str) -> Html:
    step = (found.high - found.low) / len(found.same)
    middles = [found.low + (i + 0.5) * step for i in range(len(found.same))]
    series = [
        Series(name, list(zip(middles, values.tolist(), strict=True)), shade)
        for name, values, shade in (("other id", found.other, "c-distinct"), ("same id", found.same, "c-same"))
    ]
    title = f"Distances of pairs{', ' + label if label else ''}"
    return density_chart(title, (found.low, found.high), series, "distance")


def rankings(evaluation: Evaluation) -> Html:
    """Each chosen query with its first gallery entries; buttons change what the pictures show."""
    queries, gallery, identities = evaluation.counts
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
        f"{queries:,} queries of {identities:,} identities, {gallery:,} gallery images, ranked by ",
        code(evaluation.branch),
        f". Each picture shows {', '.join(MODALITIES)}; green is the query's identity, red another one, and below it "
        "stand distance and file. Entries that the protocol leaves out of a query's gallery are not shown.",
    )
    switch = tag("div", *labels, class_="switch") if labels else None
    return section("Rankings", told, *buttons, switch, tag("div", *lists, class_="lists"), id_="rankings")


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
    asked = tag("figure", *_views(pictures[query.image]), title, class_="tile query")
    entries = [
        tag(
            "figure",
            *_views(pictures[image]),
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


def _views(pictures: dict[str, Html]) -> list[Html]:
    return list(pictures.values())


def patches(evaluation: Evaluation) -> Html | None:
    """What SDTPS kept on some queries, how it scored their patches, and where it looks on the whole."""
    if evaluation.kept_share is None:
        return None
    shown = [queries[0].image for queries in evaluation.groups.values() if queries]
    blocks = []
    for image in shown:
        panels = views(evaluation.looks[image], evaluation.grid)
        drawn = [
            tag(
                "figure",
                tag("img", src=data_uri(picture := tile(panels[view])), alt="", width=picture.width, height=picture.height),
                tag("figcaption", TOGGLES[view]),
                class_="tile plain",
            )
            for view in VIEWS
        ]
        blocks.append(tag("div", *drawn, class_="triple", title=evaluation.names[image]))
    share = draw_share(evaluation.kept_share, evaluation.grid)
    cells = tile([part.contiguous() for part in _thirds(share)])
    picture = tag("img", src=data_uri(cells, 90), alt="share of test images that keep each patch", class_="share")
    told = note(
        "Outlined patches are kept, the dark ones are dropped and fused into one token; scores go from dark blue (lowest "
        f"of that picture) to light yellow (highest). {', '.join(MODALITIES)} from left to right or top to bottom.",
    )
    where = tag("figure", picture, tag("figcaption", "Share of all test images that keep each patch"), class_="tile plain")
    return section(
        "Patches", told, *blocks, tag("div", where, _statistics(evaluation), class_="grid"), id_="patches"
    )


def _thirds(picture: torch.Tensor) -> list[torch.Tensor]:
    """The modalities' parts of a picture in which they stand side by side."""
    width = (picture.shape[2] + 2) // len(MODALITIES)
    return [picture[:, :, i * width :][:, :, : width - 2] for i in range(len(MODALITIES))]


def _statistics(evaluation: Evaluation) -> Html:
    names: dict[str, dict[str, float]] = {}
    for name, value in evaluation.statistics.items():
        _, statistic, of = name.split("/")
        names.setdefault(statistic.replace("_", " "), {})[of] = value
    rows = [[name, ", ".join(f"{of} {value:.3g}" for of, value in values.items())] for name, values in names.items()]
    return table(["statistic", "value"], rows)


def distances_and_map(runs: Sequence[Run], evaluations: Sequence[Evaluation | None]) -> Html | None:
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
    told = note("A colour and a number for each identity, a symbol for each camera. Near means alike; far means nothing.")
    return section("Map of the features", told, tag("div", *charts, class_="grid map"), id_="map")
