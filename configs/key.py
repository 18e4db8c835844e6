"""The declaration of one config key, and how a value written by hand is read and checked against it."""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_SWITCH = {"yes": True, "on": True, "true": True, "no": False, "off": False, "false": False}
_PLURAL = {int: "integers", float: "numbers", str: "texts"}
_QUOTED = re.compile(r"\(?\s*(['\"])([^'\"]*)\1\s*,?\s*\)?")


@dataclass(frozen=True)
class Key:
    """One knob: its default (which fixes its type), its meaning, and the values that it may take.

    Args:
        default: the value where no YAML sets one. A list is copied; unless it is empty, its length is fixed too.
        help: the meaning, with the unit.
        choices: the only values allowed.
        within: the interval of a number, or of each number of a list: ``"(0, 1]"``, ``"[1, inf)"``.
        pattern: a regular expression that a text must match in full; ``expects`` says in words what that is.
        also: further spellings that are read as one of the values.
    """

    default: Any
    help: str
    choices: tuple[Any, ...] = ()
    within: str = "(-inf, inf)"
    pattern: str = ""
    expects: str = ""
    also: Mapping[Any, Any] = field(default_factory=dict)

    @property
    def is_list(self) -> bool:
        return isinstance(self.default, list)

    @property
    def kind(self) -> type:
        """The type of the value, or of a list's items."""
        if self.is_list:
            return type(self.default[0]) if self.default else str
        return type(self.default)

    def expected(self) -> str:
        """What a value must be, in words."""
        if self.choices:
            return f"one of {', '.join(map(repr, self.choices))}"
        if self.pattern:
            return self.expects
        if self.is_list:
            count = f"{len(self.default)} " if self.default else ""
            span = f", each {self._span()}" if self._span() else ""
            return f"a list of {count}{_PLURAL[self.kind]}{span}"
        if self.kind is bool:
            return "True or False (yes/no and on/off will do)"
        if self.kind is str:
            return "a text"
        return f"{'an integer' if self.kind is int else 'a number'} {self._span()}".rstrip()

    def parse(self, value: Any) -> Any:
        """The value in the key's own type.

        Raises:
            ValueError: ``value`` does not have the type or lies outside of what is allowed.
        """
        if isinstance(value, str | bool | None) and value in self.also:
            return self.also[value]
        if self.is_list:
            items = [self._item(item) for item in _items(value)]
            if self.default and len(items) != len(self.default):
                raise ValueError(f"{len(items)} items")
            return items
        return self._item(value)

    def _item(self, value: Any) -> Any:
        value = _READ[self.kind](value)
        if self.choices and value not in self.choices:
            raise ValueError(value)
        if self.pattern and not re.fullmatch(self.pattern, value):
            raise ValueError(value)
        if self.kind in (int, float) and not self._contains(value):
            raise ValueError(value)
        return value

    def _contains(self, value: float) -> bool:
        low, high = map(float, self.within[1:-1].split(","))
        above = value > low if self.within[0] == "(" else value >= low
        below = value < high if self.within[-1] == ")" else value <= high
        return above and below

    def _span(self) -> str:
        low, high = (end.strip() for end in self.within[1:-1].split(","))
        if high != "inf":
            return f"in {self.within}"
        return "" if low == "-inf" else f"{'>' if self.within[0] == '(' else '>='} {low}"


def _switch(value: Any) -> bool:
    if isinstance(value, str) and value.strip().lower() in _SWITCH:
        return _SWITCH[value.strip().lower()]
    if not isinstance(value, bool):
        raise ValueError(value)
    return value


def _number(value: Any, kind: type) -> Any:
    """An int or a float from a number or its text: YAML 1.1 reads 3.5e-4 as a number, but 1e-4 as a text."""
    if isinstance(value, str):
        value = kind(value)
    if isinstance(value, bool) or not isinstance(value, int | kind):
        raise ValueError(value)
    try:
        value = kind(value)
        finite = math.isfinite(value)
    except OverflowError:
        finite = False
    if not finite:
        raise ValueError(value)
    return value


def _text(value: Any) -> str:
    """A text, also out of the ``('RGBNT201')`` of DeMo's YAMLs, a list of one, or a key with nothing behind it."""
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(value)
    quoted = _QUOTED.fullmatch(value.strip())
    text = quoted.group(2) if quoted else value
    return os.path.expanduser(text) if text.startswith("~/") else text


def _items(value: Any) -> list[Any]:
    """The items of a list, a tuple, or a text such as ``[256, 128]``, ``(256, 128)`` or ``256,128``."""
    if value is None:
        return []
    if isinstance(value, str):
        return [item for item in re.split(r"[,\s]+", value.strip().strip("[]()")) if item]
    if not isinstance(value, list | tuple):
        raise ValueError(value)
    return list(value)


_READ = {
    bool: _switch,
    int: lambda value: _number(value, int),
    float: lambda value: _number(value, float),
    str: _text,
}
