"""Markup in which nothing from a file can become markup: text is escaped unless it was made here."""

import re
from collections.abc import Iterable
from html import escape
from typing import Any

VOID = frozenset(("br", "hr", "img", "input", "meta", "wbr"))
"""Elements without an end tag."""


class Html(str):
    """Text that is markup already; every other text is escaped where it is put into an element."""


def tag(name: str, /, *children: Any, **attributes: Any) -> Html:
    """An element. Children are Html, or anything else as escaped text; None and False are left out.

    Attributes: `class_` is class, `stroke_width` is stroke-width; one of value None is left out.
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in VOID:
        return Html(f"<{name}{given}>")
    return Html(f"<{name}{given}>{join(children)}</{name}>")


def join(children: Iterable[Any]) -> Html:
    """Children one after the other, escaped unless they are Html."""
    shown = (child for child in children if child is not None and child is not False)
    return Html("".join(child if isinstance(child, Html) else escape(str(child)) for child in shown))


def table(header: Iterable[Any], rows: Iterable[Iterable[Any]], class_: str = "") -> Html:
    """A table that scrolls inside itself where it is wider than the page; the first cell of a row is its title.

    A cell is content, or a finished `td` or `th`.
    """
    body = [tag("tr", *(_cell("td" if i else "th", cell) for i, cell in enumerate(row))) for row in rows]
    head = tag("thead", tag("tr", *(_cell("th", cell) for cell in header)))
    return tag("div", tag("table", head, tag("tbody", *body), class_=class_ or None), class_="scroll")


def _cell(kind: str, content: Any) -> Html:
    finished = isinstance(content, Html) and content.startswith(("<td", "<th"))
    return content if finished else tag(kind, content)


def section(title: str, content: Html) -> Html:
    return tag("section", tag("h2", title), content, id=anchor(title))


def anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def note(*children: Any, kind: str = "note") -> Html:
    return tag("p", *children, class_=kind)


def code(text: Any) -> Html:
    return tag("code", text)


def key(name: str) -> Html:
    """A config key, which may break behind its dots and underscores."""
    return tag("code", Html(re.sub(r"([._])", r"\1<wbr>", escape(name))), class_="name-of-key")


def details(title: Any, *children: Any) -> Html:
    return tag("details", tag("summary", title), *children)
