"""README.md and README.zh-CN.md tell the same, and what they name is there."""

import re
import shlex
from collections import Counter
from pathlib import Path

import pytest

from configs import load_cfg, obsolete
from configs.defaults import KEYS

ROOT = Path(__file__).resolve().parents[1]
READMES = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md")}
ENGLISH, CHINESE = READMES.values()
LANGUAGES = {"README.md", "README.zh-CN.md"}
FOLDERS = "configs|data|docs|engine|modeling|solver|tests|tools|utils|weights"
OF_DEMO = {"modeling/moe/"}
WRITTEN = {"weights/vit_b_sample.safetensors"}  # by a command of the README
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

both = pytest.mark.parametrize("text", READMES.values(), ids=list(READMES))


def blocks(text: str) -> list[tuple[str, str]]:
    """Language and content of each fenced block; comments, which are translated, are left out."""
    return [(language, re.sub(r"\s+#.*", "", content)) for language, content in FENCE.findall(text)]


def prose(text: str) -> str:
    return FENCE.sub("", text)


def spans(text: str) -> list[str]:
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(text))]


def code(text: str) -> str:
    """All that stands as code, in blocks and in the prose, one command or name a line."""
    return "\n".join([content.replace("\\\n", " ") for _, content in blocks(text)] + spans(text))


def links(text: str) -> list[tuple[str, str]]:
    """``!`` for a picture or an empty string, and the target."""
    return re.findall(r"(!?)\[[^]]*\]\(([^)\s]+)\)", prose(text))


def sections(text: str) -> list[str]:
    return re.split(r"^#+ .*$", prose(text), flags=re.MULTILINE)


def headings(text: str) -> list[str]:
    return re.findall(r"^(#+) ", prose(text), re.MULTILINE)


def tables(text: str) -> list[int]:
    """The number of cells in each row of each table, in order."""
    return [len(re.findall(r"(?<!\\)\|", row)) - 1 for row in re.findall(r"^\|.*\|$", prose(text), re.MULTILINE)]


def figures(text: str) -> Counter[str]:
    """How often each number stands in a text."""
    return Counter(re.findall(r"\d+(?:\.\d+)?", text))


def expand(name: str) -> list[str]:
    """``a/{b,c}.yml`` as ``a/b.yml`` and ``a/c.yml``."""
    found = re.search(r"\{([^{}]*)\}", name)
    if not found:
        return [name]
    return [full for part in found[1].split(",") for full in expand(name[: found.start()] + part + name[found.end() :])]


def commands(text: str) -> list[list[str]]:
    """The arguments from each ``python``'s or ``torchrun``'s script or ``-m module`` on, in blocks and in the prose."""
    starts = [(line, re.search(r"(?:-m [a-z_.]+|\w+\.py)(?= )", line)) for line in code(text).splitlines()]
    return [
        shlex.split(line[found.start() :])
        for line, found in starts
        if found and re.search(r"python|torchrun|^(train|test)_net\.py ", line)
    ]


def source(command: list[str]) -> Path:
    """The file that a command runs."""
    if command[0] != "-m":
        return ROOT / command[0]
    path = ROOT / command[1].replace(".", "/")
    return path / "__main__.py" if path.is_dir() else path.with_suffix(".py")


def test_same_blocks():
    english, chinese = blocks(ENGLISH), blocks(CHINESE)
    assert len(english) == len(chinese) > 8
    for ours, theirs in zip(english, chinese, strict=True):
        if "modeling/ " in ours[1]:  # the tree of folders is told in words
            ours, theirs = (
                re.findall(r"^\w+/|\w+\.py|-m \S+ --\w+", block[1], re.MULTILINE) for block in (ours, theirs)
            )
        assert ours == theirs


def test_same_outline():
    assert headings(ENGLISH) == headings(CHINESE)
    assert tables(ENGLISH) == tables(CHINESE)
    assert ENGLISH.count("**") == CHINESE.count("**")


def test_same_links_and_pictures():
    ours, theirs = ([link for link in links(text) if link[1] not in LANGUAGES] for text in (ENGLISH, CHINESE))
    assert ours == theirs
    assert [mark for mark, _ in ours].count("!") > 4


def test_each_links_to_the_other_at_the_top():
    assert ENGLISH.splitlines()[2] == "English | [简体中文](README.zh-CN.md)"
    assert CHINESE.splitlines()[2] == "[English](README.md) | 简体中文"


def test_same_figures_and_names_in_each_section():
    for ours, theirs in zip(sections(ENGLISH), sections(CHINESE), strict=True):
        assert figures(ours) == figures(theirs)
        assert Counter(spans(ours)) == Counter(spans(theirs))


def test_chinese_bold_is_closed_where_markdown_sees_it():
    """A closing ``**`` after punctuation ends the bold text only in front of a blank or of more punctuation."""
    for bold, after in re.findall(r"\*\*([^*]+)\*\*(.)", prose(CHINESE)):
        assert bold[-1] not in "。？！：；，" or after == " ", bold


@both
def test_links_lead_somewhere(text):
    for _, target in links(text):
        assert re.match("https?://", target) or (ROOT / target).exists(), target


@both
def test_named_files_are_there(text):
    words = re.split(r"[\s=\"()]+", code(text))
    named = {name for word in words for name in expand(word) if re.match(rf"({FOLDERS})/.", name)} - OF_DEMO - WRITTEN
    assert len(named) > 20
    for name in sorted(named):
        assert list(ROOT.glob(name)), name
    for name in {word for word in words if re.fullmatch(r"\w+\.yml", word)} - {"config.yml"}:  # a run's own
        assert list(ROOT.glob(f"configs/**/{name}")), name


@both
def test_named_configs_load(text):
    names = set(re.findall(r"configs/\S+\.yml", code(text)))
    for name in sorted(path for pattern in names for path in expand(pattern) if "studies" not in path):
        for path in ROOT.glob(name):
            load_cfg(path)


@both
def test_commands_are_spelt_as_the_scripts_want_them(text):
    found = commands(text)
    assert len(found) > 20
    for command in found:
        if "<name>" in command[1]:
            continue
        script = source(command)
        assert script.is_file(), command
        declared = script.read_text(encoding="utf-8") + (ROOT / "utils/cli.py").read_text(encoding="utf-8")
        for option in (word for word in command if re.match("--[a-z]", word)):
            assert f'"{option}"' in declared, (command, option)


@both
def test_named_targets_and_keys_are_declared(text):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE)) <= set(targets)
    keys = set(re.findall(rf"\b(?:{'|'.join(filter(None, KEYS))})\.[A-Z][A-Z0-9_]+", text))
    assert len(keys) > 20
    assert [key for key in keys if key.split(".")[1] not in KEYS[key.split(".")[0]] and not obsolete.find(key)] == []


@both
def test_every_tool_is_listed(text):
    tree = next(content for _, content in blocks(text) if "tools/ " in content)
    told = set(re.findall(r"[a-z_]+", tree[tree.index("tools/ ") :].split("python -m")[0])) - {"tools"}
    assert told == {path.stem for path in (ROOT / "tools").iterdir() if not path.stem.startswith(("_", "."))}


@both
def test_python_compiles(text):
    for language, content in blocks(text):
        if language == "python":
            compile(content, "README", "exec")
