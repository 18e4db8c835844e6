"""A study: a base config, named variants of it, and the seeds by which each is trained."""

import difflib
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import yaml
from yacs.config import CfgNode

from configs import diff, load_cfg
from utils.errors import UserError

OWN_KEYS = ("OUTPUT_DIR", "SOLVER.SEED", "TEST.WEIGHT")
"""Config keys that the study sets for each run."""
NOT_COMPARED = ("OUTPUT_DIR", "TEST.WEIGHT")
"""Keys in which the stored config of a run may differ from its variant's."""
RESERVED = ("report", "prepare")
"""Folders beside the variants' own."""
FIELDS = {
    "config": str,
    "out": str,
    "options": dict,
    "variants": dict,
    "only": list,
    "seeds": list,
    "base": str,
    "compare": list,
    "prepare": list,
    "command": list,
    "checkpoints": bool,
}
"""Fields of a study file and their types."""
_NAME = re.compile(r"\w[\w.+-]*")


@dataclass(frozen=True)
class Step:
    """What has to be there before the runs."""

    makes: Path
    """Where this exists, nothing is done."""
    run: tuple[tuple[str, ...], ...]
    """Commands, one after the other, each a list of words; no shell reads them."""
    resume: Path | None = None
    """A checkpoint from which the first command goes on (TEST.WEIGHT) where it exists."""


@dataclass(frozen=True)
class Run:
    """One training: a variant by a seed."""

    variant: str
    seed: int
    cfg: CfgNode
    opts: tuple[str, ...]
    """KEY, VALUE, … that make the study's config this run's."""

    @property
    def folder(self) -> Path:
        return Path(self.cfg.OUTPUT_DIR)

    @property
    def name(self) -> str:
        return f"{self.variant}/seed_{self.seed}"


@dataclass(frozen=True)
class Study:
    """See docs/ablation.md for the fields of the file."""

    config: str
    out: Path
    variants: dict[str, dict[str, Any]]
    seeds: tuple[int, ...]
    base: str
    options: dict[str, Any] = field(default_factory=dict)
    compare: tuple[tuple[str, str], ...] = ()
    """Pairs `variant` or `variant/branch`: the first minus the second, beside every variant minus the base."""
    prepare: tuple[Step, ...] = ()
    command: tuple[str, ...] = ("python", "train_net.py")
    checkpoints: bool = True
    """False deletes the checkpoints of a finished run."""

    def __post_init__(self) -> None:
        """Raises UserError where a field cannot be used, or two variants are one and the same."""
        faults = [f"no {name}" for name in ("config", "variants", "seeds") if not getattr(self, name)]
        faults += [
            f"variant {name!r}: a folder is called so; use letters, digits and . _ + -, and not {' or '.join(RESERVED)}"
            for name in self.variants
            if not _NAME.fullmatch(name) or name in RESERVED
        ]
        if self.base not in self.variants:
            faults.append(f"base {self.base!r} is none of the variants: {', '.join(self.variants)}")
        if len(set(self.seeds)) < len(self.seeds):
            faults.append(f"seeds {list(self.seeds)}: one is named twice")
        for name, options in {"options": self.options, **self.variants}.items():
            faults += [f"{name}: {key} is set by the study itself; remove it" for key in OWN_KEYS if key in options]
        for side in (side for pair in self.compare for side in pair):
            if side.partition("/")[0] not in self.variants:
                faults.append(f"compare {side!r}: no such variant")
        if faults:
            raise UserError("\n  ".join(["The study cannot be run:", *faults]))

    def configs(self) -> dict[str, CfgNode]:
        """Variant -> its resolved config, by whatever seed.

        Raises:
            UserError: a config is faulty, or two variants resolve to the same one.
        """
        resolved = {name: resolve(self.config, self._opts(name)) for name in self.variants}
        same = [f"{a} and {b}" for a, b in combinations(resolved, 2) if not diff(resolved[a], resolved[b])]
        if same:
            raise UserError(
                f"These variants resolve to one and the same config: {'; '.join(same)}. Their results would differ by "
                "nothing but the seed's name: remove one, or correct its options."
            )
        return resolved

    def runs(self, seeds: Sequence[int] = (), only: Sequence[str] = ()) -> list[Run]:
        """All runs seed by seed, so that a study that is stopped has every variant by the same seeds.

        Args:
            seeds: in place of the study's.
            only: the variants; all where it is empty.
        """
        if unknown := set(only) - self.variants.keys():
            raise UserError(f"--only {' '.join(sorted(unknown))}: the study's variants are {', '.join(self.variants)}.")
        resolved = self.configs()
        return [
            self._run(name, seed, resolved[name])
            for seed in seeds or self.seeds
            for name in self.variants
            if not only or name in only
        ]

    def folders(self) -> list[tuple[str, int, Path]]:
        """(variant, seed, folder) of the runs that are there, by whatever seeds."""
        return [
            (name, seed, self.out / name / f"seed_{seed}")
            for name in self.variants
            for seed in sorted(int(p.name[5:]) for p in (self.out / name).glob("seed_*") if p.name[5:].isdigit())
        ]

    def stored_runs(self) -> list[Run]:
        """The runs whose folders are there."""
        resolved = self.configs()
        return [self._run(name, seed, resolved[name]) for name, seed, _ in self.folders()]

    def _opts(self, variant: str) -> tuple[str, ...]:
        settings = self.options | self.variants[variant]
        return tuple(str(word) for pair in settings.items() for word in pair)

    def _run(self, variant: str, seed: int, resolved: CfgNode) -> Run:
        folder = str(self.out / variant / f"seed_{seed}")
        cfg = resolved.clone()
        cfg.defrost()
        cfg.SOLVER.SEED, cfg.OUTPUT_DIR = seed, folder
        cfg.freeze()
        return Run(variant, seed, cfg, (*self._opts(variant), "SOLVER.SEED", str(seed), "OUTPUT_DIR", folder))


def resolve(config: str | Path, opts: Sequence[str] = ()) -> CfgNode:
    """`load_cfg` without its notice of keys that do nothing, which each run gives by itself."""
    logger = logging.getLogger("configs.loading")
    logger.disabled = True
    try:
        return load_cfg(config, opts)
    finally:
        logger.disabled = False


def compared(cfg: CfgNode, other: CfgNode) -> list[str]:
    """What differs between two runs' configs and may change a result, one text a key."""
    return [f"{key}: {a!r} and {b!r}" for key, a, b in diff(cfg, other) if key not in NOT_COMPARED]


def read_study(path: Path) -> Study:
    """Reads a study file and those that its `_BASE_` names.

    Raises:
        UserError: it cannot be read or used.
    """
    fields = _read_fields(path, ())
    try:
        return make_study(fields)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def make_study(fields: dict[str, Any]) -> Study:
    """A study from the fields of its file.

    Raises:
        UserError: a field is missing, unknown or of another type.
    """
    for name, value in fields.items():
        if name not in FIELDS:
            raise UserError(f"unknown field {name!r}; a study has {', '.join(FIELDS)}")
        if not isinstance(value, FIELDS[name]):
            raise UserError(f"{name}: expected a {FIELDS[name].__name__}, not {value!r}")
    if missing := [name for name in ("config", "out", "variants", "seeds") if not fields.get(name)]:
        raise UserError(f"the study lacks {', '.join(missing)}")
    variants = {str(name): options or {} for name, options in fields["variants"].items()}
    for name, options in {"options": fields.get("options", {}), **variants}.items():
        if not isinstance(options, dict) or any(isinstance(value, dict) for value in options.values()):
            raise UserError(f"{name}: write the keys with dots, such as {{MODEL.USE_SDTPS: False}}")
    if not all(isinstance(seed, int) and not isinstance(seed, bool) for seed in fields["seeds"]):
        raise UserError(f"seeds: expected whole numbers, not {fields['seeds']}")
    pairs = fields.get("compare", [])
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise UserError("compare: expected pairs such as [full, detached] or [full/both, none/ori]")
    if only := fields.get("only"):
        if unknown := [name for name in only if name not in variants]:
            raise UserError(f"only: no such variants: {', '.join(map(str, unknown))}")
        variants = {name: variants[name] for name in only}
        pairs = [pair for pair in pairs if all(str(side).partition("/")[0] in variants for side in pair)]
    return Study(
        config=fields["config"],
        out=Path(fields["out"]),
        variants=variants,
        seeds=tuple(fields["seeds"]),
        base=fields.get("base", next(iter(variants))),
        options=fields.get("options", {}),
        compare=tuple((str(a), str(b)) for a, b in pairs),
        prepare=tuple(_step(step) for step in fields.get("prepare", [])),
        command=tuple(map(str, fields.get("command", Study.command))),
        checkpoints=fields.get("checkpoints", True),
    )


def with_options(study: Study, opts: Sequence[str]) -> Study:
    """The study with KEY VALUE pairs of the command line added to its shared options."""
    return replace(study, options=study.options | pairs_of(opts)) if opts else study


def pairs_of(words: Sequence[str]) -> dict[str, str]:
    """KEY VALUE … as a dict.

    Raises:
        UserError: the words are odd in number.
    """
    if len(words) % 2:
        raise UserError(f"{' '.join(words)}: options are KEY VALUE pairs, but the words are odd in number.")
    return dict(zip(words[0::2], words[1::2], strict=True))


def _step(step: Any) -> Step:
    usable = isinstance(step, dict) and {"makes", "run"} <= step.keys() <= {"makes", "run", "resume"}
    commands = step["run"] if usable and isinstance(step["run"], list) else []
    commands = [commands] if commands and not isinstance(commands[0], list) else commands
    if not commands or not all(isinstance(command, list) and command for command in commands):
        raise UserError(
            f"prepare: expected 'makes: PATH' and 'run: [word, …]' or a list of such, not {step!r}; "
            "no shell reads the words"
        )
    words = tuple(tuple(map(str, command)) for command in commands)
    return Step(Path(step["makes"]), words, Path(step["resume"]) if "resume" in step else None)


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, where YAML would silently take the last: a variant would get lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key_node.value} stands twice", problem_mark=key_node.start_mark)
            seen.add(str(key_node.value))
        return super().construct_mapping(node, deep)


def _read_fields(path: Path, chain: tuple[Path, ...]) -> dict[str, Any]:
    """The fields of a file over those of its `_BASE_`; options, and variants by name, are added to the base's."""
    if path in chain:
        raise UserError(f"{path}: _BASE_ goes in a circle")
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yml")], n=1)
        raise UserError(f"{path}: there is no such file.{f' Did you mean {path.parent / near[0]}?' if near else ''}")
    try:
        fields = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    if not isinstance(fields, dict):
        raise UserError(f"{path}: expected fields such as 'config:' and 'variants:'")
    if (base := fields.pop("_BASE_", None)) is None:
        return fields
    inherited = _read_fields(path.parent / base, (*chain, path))
    for name in ("options", "variants"):
        own, theirs = fields.get(name), inherited.get(name)
        if isinstance(own, dict) and isinstance(theirs, dict):
            fields[name] = theirs | own
    return inherited | fields
