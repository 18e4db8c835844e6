"""From YAML files and KEY VALUE pairs to one checked config, and back to text."""

import difflib
import errno
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from yacs.config import CfgNode

from configs import obsolete
from configs.defaults import FLAT_KEYS, KEYS, get_cfg
from configs.validate import contradictions, count, flatten
from utils.errors import UserError

logger = logging.getLogger(__name__)

_BASE = "_BASE_"
_COMMAND_LINE = "command line"
_MAP_TAG = "tag:yaml.org,2002:map"
_UNREADABLE = object()
_STUDY_FIELDS = {"config", "out", "seeds", "variants"}
"""By some of these a study of tools.ablate is told from a config."""
_MAX_BYTES = 2**20
_MAX_VALUES = 10_000
"""Of one file, with its aliases written out: far more than a config needs, and little enough to be read at once."""


@dataclass(frozen=True)
class _Setting:
    name: str  # dotted
    value: Any
    source: str  # where it was written: "file.yml:12" or "command line"


@dataclass
class _Report:
    """What was read so far: settings in the order in which they take effect, and all that is wrong with them."""

    settings: list[_Setting] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    faulty: set[str] = field(default_factory=set)  # keys without a usable value


def load_cfg(config_file: str | os.PathLike[str] | None, opts: Sequence[Any] = ()) -> CfgNode:
    """Read a YAML with its bases, then the overrides, over the defaults.

    Args:
        config_file: YAML file; ``_BASE_`` in it names one or several YAMLs, relative to it, that are read before.
            None or an empty text takes the defaults.
        opts: KEY, VALUE, KEY, VALUE, … as on the command line; they win over the YAML, later ones over earlier ones.

    Returns:
        The validated, frozen config.

    Raises:
        UserError: listing every fault at once, one a line, with its file and line, its value, what was expected and
            what to do.
    """
    report = _Report()
    if config_file:
        _read_yaml(Path(config_file), report, chain=())
    _read_opts(opts, report)

    cfg = get_cfg()
    origins: dict[str, str] = {}
    unused: dict[str, str] = {}
    for setting in report.settings:
        if setting.name in FLAT_KEYS:
            origins[setting.name] = setting.source
            _apply(cfg, setting, report)
        elif entry := obsolete.find(setting.name):
            if obsolete.asks_for_more(entry, setting.value):
                report.faults.append(f"{_show(setting)}: not offered; {entry.instead}. Remove the key.")
            unused[setting.name] = f"{setting.name} ({entry.instead})" if entry.instead else setting.name
        else:
            report.faults.append(f"{setting.source} {setting.name}: {_unknown(setting.name)}")
    values = flatten(cfg)
    for names, text in contradictions(cfg, report.faulty):
        settings = [f"{name} = {values[name]!r} ({origins.get(name, 'default')})" for name in names]
        report.faults.append(f"{', '.join(settings)}: {text}")
    if report.faults:
        title = f"{config_file or 'the command line'} cannot be used, {count(report.faults)}:"
        raise UserError("\n  ".join([title, *report.faults]))

    if unused:
        logger.warning("These keys do nothing here and can be removed: %s", ", ".join(unused.values()))
    cfg.freeze()
    return cfg


def dump(cfg: CfgNode) -> str:
    """The config as YAML text that `load_cfg` reads back to an equal config."""
    sections = {name: dict(node) if isinstance(node, dict) else node for name, node in cfg.items()}
    return yaml.dump(
        sections, Dumper=_Dumper, sort_keys=False, default_flow_style=False, width=1000, allow_unicode=True
    )


def print_config(config_file: str | os.PathLike[str] | None, opts: Sequence[Any] = ()) -> None:
    """Writes what `load_cfg` gives to the standard output, a YAML that may be used in turn."""
    sys.stdout.write(dump(load_cfg(config_file, opts)))


def diff(old: dict, new: dict) -> list[tuple[str, Any, Any]]:
    """What differs between two configs (CfgNodes or nested dicts): (key, old, new), None where a side lacks the key."""
    before, after = flatten(old), flatten(new)
    names = [*after, *(name for name in before if name not in after)]
    return [(name, before.get(name), after.get(name)) for name in names if before.get(name) != after.get(name)]


class _Dumper(yaml.SafeDumper):
    """Block style, but lists on one line."""


_Dumper.add_representer(
    list, lambda dumper, items: dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)
)


def _apply(cfg: CfgNode, setting: _Setting, report: _Report) -> None:
    """Write one setting into the config."""
    key = FLAT_KEYS[setting.name]
    section, _, name = setting.name.rpartition(".")
    try:
        (cfg[section] if section else cfg)[name] = key.parse(setting.value)
    except ValueError:
        given = _brief(setting.value).strip("'").lower()
        choices = {str(choice).lower(): choice for choice in key.choices}
        close = difflib.get_close_matches(given, choices, n=1)
        guess = f"; did you mean {choices[close[0]]!r}?" if close else ""
        report.faulty.add(setting.name)
        report.faults.append(
            f"{_show(setting)}: expected {key.expected()}{guess} (default {key.default!r}; {key.help})"
        )


def _show(setting: _Setting) -> str:
    return f"{setting.source} {setting.name} = {_brief(setting.value)}"


def _brief(value: Any, limit: int = 500) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of more than 4300 digits
        text = f"an integer of {value.bit_length()} bits" if isinstance(value, int) else f"a {type(value).__name__}"
    return text if len(text) <= limit else f"{text[:limit]}…"


def _unknown(name: str) -> str:
    """What to say about a key that is not declared: the nearest ones that are."""
    if name in KEYS:
        return f"a section, not a key; set one of its keys, such as {name}.{next(iter(KEYS[name]))}"
    known = [*FLAT_KEYS, *filter(None, KEYS)]
    if name.upper() in known:
        return f"unknown key; keys are written in capitals: {name.upper()}"
    section, _, last = name.upper().rpartition(".")
    close = (
        [key for key in known if key.rpartition(".")[2] == last]
        or [key for key in known if key.rpartition(".")[2] in _similar(last, KEYS.get(section, {}))][:1]
        or [key for key in known if key.rpartition(".")[2] in _similar(last, [k.rpartition(".")[2] for k in known])]
    )
    return f"unknown key; did you mean {' or '.join(close)}?" if close else "unknown key; see configs/defaults.py"


def _similar(name: str, names: Iterable[str]) -> list[str]:
    return difflib.get_close_matches(name, list(names), n=1, cutoff=0.65)


def _read_opts(opts: Sequence[Any], report: _Report) -> None:
    names, values = list(opts[0::2]), list(opts[1::2])
    joined = next((str(name) for name in names if "=" in str(name)), None)
    if joined is not None:
        name, _, value = joined.partition("=")
        report.faults.append(f"{_COMMAND_LINE}: {joined}: write key and value as two words: {name} {value}")
        return
    if len(names) != len(values):
        report.faults.append(
            f"{_COMMAND_LINE}: {' '.join(map(str, opts))}: overrides are KEY VALUE pairs, but the words "
            "are odd in number; a value is missing, or one with blanks is not quoted"
        )
        return
    report.settings += [_Setting(str(name), value, _COMMAND_LINE) for name, value in zip(names, values, strict=True)]


def _read_yaml(path: Path, report: _Report, chain: tuple[Path, ...]) -> None:
    """Add a file's settings to the report, after those of its bases."""
    path = Path(os.path.normpath(path.expanduser()))
    if path.resolve() in [seen.resolve() for seen in chain]:
        circle = " -> ".join(map(str, (*chain, path)))
        report.faults.append(f"{chain[-1]} {_BASE}: goes in a circle, {circle}. Remove one of these lines.")
        return
    by = f"{chain[-1]} {_BASE}: " if chain else ""
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(_MAX_BYTES + 1)
        if len(text) > _MAX_BYTES:
            report.faults.append(f"{by}{path}: too large for a config, over {_MAX_BYTES >> 20} MiB")
            return
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        _count_values(root, {})
    except RecursionError:
        report.faults.append(f"{path}: values are nested too deeply. Write lists plainly, as [256, 128].")
        return
    except _TooMuch as error:
        report.faults.append(f"{path}:{error}")
        return
    except (OSError, ValueError) as error:
        report.faults.append(f"{by}{path}: {_unreadable(path, error)}")
        return
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        report.faults.append(
            f"{where} is not valid YAML: {problem}. Write 'KEY: value', indented with spaces below its section."
        )
        return
    if root is None:  # nothing but comments
        return
    if not isinstance(root, yaml.MappingNode):
        report.faults.append(f"{path}: expected sections such as 'MODEL:' at the top level")
        return
    names = {key.value for key, _ in root.value if isinstance(key, yaml.ScalarNode)}
    if names & _STUDY_FIELDS and not names & KEYS.keys():
        report.faults.append(f"{by}{path}: a study, not a config. Run it with: python -m tools.ablate {path}")
        return
    settings = list(_walk(loader, root, str(path), "", report))
    for setting in settings:
        if setting.name == _BASE:
            for base in _bases(setting, report):
                _read_yaml(path.parent / Path(base).expanduser(), report, (*chain, path))
    report.settings += [setting for setting in settings if setting.name != _BASE]


def _bases(setting: _Setting, report: _Report) -> list[str]:
    bases = setting.value if isinstance(setting.value, list) else [setting.value]
    if all(isinstance(base, str) and base for base in bases):
        return bases
    report.faults.append(f"{_show(setting)}: expected the path of a YAML relative to this one, or a list of paths")
    return []


class _TooMuch(Exception):
    """A YAML that aliases blow up."""


def _count_values(node: yaml.Node | None, counts: dict[int, int]) -> int:
    """How many values a node holds, those of aliases counted wherever they are used.

    Raises:
        _TooMuch: more than _MAX_VALUES, or a mapping that holds itself.
    """
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if (known := counts.get(id(node))) is not None:
        if not known and isinstance(node, yaml.MappingNode):
            raise _TooMuch(f"{node.start_mark.line + 1}: an anchor holds itself. Write the values out.")
        return known or 1  # a list that holds itself is told with its key
    counts[id(node)] = 0  # under way
    children = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
    total = 1 + sum(_count_values(child, counts) for child in children)
    if total > _MAX_VALUES:
        raise _TooMuch(
            f"{node.start_mark.line + 1}: more than {_MAX_VALUES} values, aliases (*name) written out. Remove them."
        )
    counts[id(node)] = total
    return total


def _unreadable(path: Path, error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "not a text file in UTF-8; save it as UTF-8"
    if isinstance(error, ValueError) or getattr(error, "errno", None) == errno.ENAMETOOLONG:
        return f"cannot be read, no file has such a name: {error}"
    if path.is_dir():
        return "a folder; give one of the YAML files in it"
    if isinstance(error, FileNotFoundError):
        here = sorted(p.name for p in path.parent.glob("*.y*ml"))
        close = difflib.get_close_matches(path.name, here, n=1)
        if close:
            return f"no such file; did you mean {path.parent / close[0]}?"
        return f"no such file; {path.parent} has {', '.join(here)}" if here else "no such file"
    return f"cannot be read: {error}"


def _walk(
    loader: yaml.SafeLoader, node: yaml.MappingNode, file: str, section: str, report: _Report
) -> Iterator[_Setting]:
    """The settings of one mapping and of the sections in it."""
    lines: dict[str, int] = {}
    for key_node, _ in node.value:
        line = key_node.start_mark.line + 1
        name = f"{section}.{key_node.value}".lstrip(".")
        if name in lines and key_node.value != "<<":
            report.faults.append(f"{file}:{line} {name}: set twice (before in line {lines[name]}); keep one")
        lines[name] = line
    try:
        loader.flatten_mapping(node)
    except yaml.constructor.ConstructorError as error:
        line = node.start_mark.line + 1
        report.faults.append(f"{file}:{line} {section}: {error.problem}. Write '<<: *name', the anchor of a mapping.")
        return
    for key_node, value_node in node.value:
        source = f"{file}:{key_node.start_mark.line + 1}"
        name = f"{section}.{key_node.value}".lstrip(".")
        if not isinstance(key_node, yaml.ScalarNode) or not key_node.value:
            report.faults.append(f"{source} {section}: a key must be a plain word")
        elif not section and "." in name:
            first, _, rest = name.partition(".")
            report.faults.append(
                f"{source} {name}: dotted keys are for the command line; write '{rest}:' below '{first}:'"
            )
        elif isinstance(value_node, yaml.MappingNode) and value_node.tag == _MAP_TAG:
            if name in KEYS or obsolete.is_section(name):
                yield from _walk(loader, value_node, file, name, report)
            elif name in FLAT_KEYS:
                report.faults.append(f"{source} {name}: expected {FLAT_KEYS[name].expected()}, not keys of its own")
            else:
                report.faults.append(f"{source} {name}: {_unknown(name)}")
        else:
            value = _construct(loader, value_node, f"{source} {name}", report)
            if value is _UNREADABLE:
                report.faulty.add(name)
                continue
            if name in KEYS:
                if value is not None:
                    report.faults.append(f"{source} {name} = {value!r}: a section; write its keys indented below it")
            else:
                yield _Setting(name, value, source)


def _construct(loader: yaml.SafeLoader, node: yaml.Node, where: str, report: _Report) -> Any:
    """The plain value of a node; tags that would build Python objects are refused."""
    try:
        return loader.construct_object(node, deep=True)
    except yaml.constructor.ConstructorError as error:
        problem = str(error.problem).replace("tag:yaml.org,2002:", "!!")
        if "could not determine a constructor for the tag" in problem:
            problem = f"the YAML tag {problem.split()[-1]} is refused, a config holds plain values only"
        report.faults.append(f"{where}: {problem}. Write the value plainly, a list as [256, 128].")
    except Exception as error:  # on values that do not suit their tag, such as !!bool 3, PyYAML fails in any way
        told = error if isinstance(error, ValueError) else f"no value of the YAML tag {node.tag.rpartition(':')[2]!r}"
        report.faults.append(f"{where}: {told}. Write a plain value.")
    return _UNREADABLE
