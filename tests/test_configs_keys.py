"""The declared keys against the code that reads them and the YAMLs that set them."""

import ast
from pathlib import Path

import pytest

from configs import load_cfg, warn
from configs.defaults import FLAT_KEYS, KEYS

ROOT = Path(__file__).parent.parent
SHIPPED = sorted({*(ROOT / "configs").glob("*/*.yml")} - {*(ROOT / "configs").glob("studies/*")})


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_shipped_configs_load_without_a_word(path, caplog):
    cfg = load_cfg(path)
    warn(cfg)
    assert not caplog.records
    if path.stem != "base":
        assert str(cfg.OUTPUT_DIR) == f"runs/{path.parent.name}/{path.stem}"


def test_shipped_variants_are_what_they_are_called():
    ratios = {}
    for path in SHIPPED:
        model = load_cfg(path).MODEL
        ratios[f"{path.parent.name}/{path.stem}"] = (
            (model.SDTPS_SPARSE_RATIO, model.SDTPS_AGGR_RATIO) if model.USE_SDTPS else None
        )
    assert ratios["RGBNT201/DeMo_SDTPS"] == (0.5, 0.4)
    assert ratios["RGBNT201/DeMo_SDTPS_relaxed"] == (0.7, 0.5)
    assert ratios["RGBNT201/baseline"] is ratios["sample/baseline"] is None
    assert ratios["sample/DeMo_SDTPS"] == (0.5, 0.4)


# Keys against the code that reads them

PRODUCT = [
    *(path for package in ("data", "modeling", "solver", "engine") for path in (ROOT / package).glob("*.py")),
    *(path for path in (ROOT / "train_net.py", ROOT / "test_net.py") if path.exists()),
]


def keys_read(source: str) -> set[str]:
    """Dotted keys that a module reads: ``cfg.SECTION.KEY``, also by way of ``section = cfg.SECTION``."""
    tree = ast.parse(source)
    section_of = {}  # local name -> section
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                pairs = [(target, node.value)]
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    pairs = list(zip(target.elts, node.value.elts, strict=False))
                for name, value in pairs:
                    if isinstance(name, ast.Name) and isinstance(value, ast.Attribute) and value.attr in KEYS:
                        section_of[name.id] = value.attr
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        owner = node.value
        if isinstance(owner, ast.Attribute) and owner.attr in KEYS:
            found.add(f"{owner.attr}.{node.attr}")
        elif isinstance(owner, ast.Name) and owner.id in section_of:
            found.add(f"{section_of[owner.id]}.{node.attr}")
        elif isinstance(owner, ast.Name) and owner.id == "cfg" and node.attr in KEYS[""]:
            found.add(node.attr)
    return found


def test_keys_read_sees_the_forms_in_use():
    source = "a = cfg.MODEL.HDM\ns, m = cfg.SOLVER, self.cfg.MODEL\nb = s.SEED + m.ATM + cfg.OUTPUT_DIR + other.MARGIN"
    assert keys_read(source) == {"MODEL.HDM", "SOLVER.SEED", "MODEL.ATM", "OUTPUT_DIR"}


def test_no_key_is_unread_and_none_undeclared():
    read = set().union(*(keys_read(path.read_text(encoding="utf-8")) for path in PRODUCT))
    unread = sorted(set(FLAT_KEYS) - read)
    undeclared = sorted(name for name in read - set(FLAT_KEYS) if name.rpartition(".")[2].isupper())
    assert not unread, f"declared in configs/defaults.py, but read nowhere: {unread}"
    assert not undeclared, f"read, but not declared in configs/defaults.py: {undeclared}"
