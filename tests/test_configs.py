"""The config system: what it reads, what it refuses, and how it says so."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from configs import describe, diff, dump, get_cfg, load_cfg, print_config, validate, warn
from configs.defaults import FLAT_KEYS
from configs.key import Key
from configs.validate import flatten
from utils.errors import UserError


@pytest.fixture
def write(tmp_path):
    """Writes a YAML below a temporary folder and returns its path."""

    def _write(text: str, name: str = "config.yml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return _write


def faults(config_file, opts=()) -> list[str]:
    """The lines of the report, without its title."""
    with pytest.raises(UserError) as caught:
        load_cfg(config_file, opts)
    title, *lines = str(caught.value).splitlines()
    assert f"{len(lines)} fault" in title
    return [line.strip() for line in lines]


def only_fault(*opts) -> str:
    (line,) = faults(None, opts)
    return line


# Values


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("TEST.RE_RANKING", "yes", True),
        ("TEST.RE_RANKING", "no", False),
        ("TEST.FEAT_NORM", "off", False),
        ("MODEL.HDM", "False", False),
        ("MODEL.IF_LABELSMOOTH", "off", "off"),
        ("MODEL.IF_LABELSMOOTH", False, "off"),
        ("MODEL.IF_LABELSMOOTH", True, "on"),
        ("SOLVER.BASE_LR", "3.5e-4", 3.5e-4),
        ("SOLVER.BASE_LR", 1, 1.0),
        ("SOLVER.SEED", "7", 7),
        ("INPUT.SIZE_TRAIN", "[256, 128]", [256, 128]),
        ("INPUT.SIZE_TRAIN", "256,128", [256, 128]),
        ("INPUT.SIZE_TRAIN", (256, 128), [256, 128]),
        ("INPUT.PIXEL_MEAN", "(0.4, 0.5, 0)", [0.4, 0.5, 0.0]),
        ("SOLVER.REINIT", "[sdtps, classifier]", ["sdtps", "classifier"]),
        ("SOLVER.REINIT", "['sdtps']", ["sdtps"]),
        ("SOLVER.REINIT", "[]", []),
        ("DATASETS.NAMES", "('MSVR310')", "MSVR310"),
        ("DATASETS.NAMES", ("MSVR310",), "MSVR310"),
        ("TEST.MISS", "None", "nothing"),
        ("TEST.MISS", "nt", "nt"),
        ("TEST.WEIGHT", "", ""),
        ("MODEL.DEVICE", "cuda:1", "cuda:1"),
        ("DATALOADER.NUM_WORKERS", "-1", -1),
        ("DATALOADER.CACHE", "off", "off"),
        ("OUTPUT_DIR", "runs/my run", "runs/my run"),
    ],
)
def test_value_is_read_in_the_type_of_its_key(name, given, expected):
    value = flatten(load_cfg(None, [name, given]))[name]
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("MODEL.SDTPS_SPARSE_RATIO", 0),
        ("MODEL.SDTPS_SPARSE_RATIO", 1.01),
        ("MODEL.SDTPS_AGGR_RATIO", -0.1),
        ("MODEL.SDTPS_BETA", 0.51),
        ("MODEL.SDTPS_GUMBEL_TAU", 0),
        ("SOLVER.BASE_LR", float("nan")),
        ("SOLVER.BASE_LR", "inf"),
        ("SOLVER.BACKBONE_LR", -1e-6),
        ("SOLVER.MAX_EPOCHS", 0),
        ("SOLVER.MAX_EPOCHS", 2.5),
        ("SOLVER.MAX_EPOCHS", True),
        ("SOLVER.SEED", 10**400),
        ("MODEL.USE_SDTPS", "maybe"),
        ("MODEL.USE_SDTPS", 1),
        ("MODEL.STRIDE_SIZE", [16]),
        ("MODEL.STRIDE_SIZE", 16),
        ("MODEL.STRIDE_SIZE", [0, 16]),
        ("MODEL.STRIDE_SIZE", "[16, wide]"),
        ("MODEL.DIRECT", 2),
        ("MODEL.DEVICE", "gpu"),
        ("MODEL.NAME", "../x"),
        ("OUTPUT_DIR", ""),
        ("OUTPUT_DIR", 2026),
        ("DATASETS.NAMES", ["RGBNT201", "MSVR310"]),
    ],
)
def test_bad_value_is_told_with_key_value_and_expectation(name, given):
    line = only_fault(name, given)
    assert f"{name} = {given!r}" in line
    assert "expected" in line
    assert repr(FLAT_KEYS[name].default) in line


def test_near_miss_of_a_choice_is_suggested():
    assert "did you mean 'AdamW'?" in only_fault("SOLVER.OPTIMIZER_NAME", "adamw")


@pytest.mark.parametrize(
    ("within", "inside", "outside"),
    [
        ("(0, 1]", [1e-9, 1], [0, 1.1]),
        ("[0, 1)", [0, 0.9], [1, -1]),
        ("(0, inf)", [9e9], [0]),
        ("[-1, inf)", [-1], [-2]),
    ],
)
def test_intervals_hold_their_closed_ends(within, inside, outside):
    key = Key(0.5, "", within=within)
    assert [key.parse(value) for value in inside] == inside
    for value in outside:
        with pytest.raises(ValueError):
            key.parse(value)


# Names


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("MODEL.SDTPS_SPARSE_RATO", "MODEL.SDTPS_SPARSE_RATIO?"),
        ("SOLVER.SDTPS_BETA", "MODEL.SDTPS_BETA?"),
        ("BASE_LR", "SOLVER.BASE_LR?"),
        ("IMS_PER_BATCH", "SOLVER.IMS_PER_BATCH or TEST.IMS_PER_BATCH?"),
        ("model.hdm", "MODEL.HDM"),
        ("MODEL.QUUX", "see configs/defaults.py"),
        ("MODEL", "MODEL.NAME"),
    ],
)
def test_unknown_key_is_told_with_the_nearest(name, nearest):
    line = only_fault(name, "1")
    assert line.startswith(f"command line {name}: ")
    assert line.endswith(nearest)


def test_pairs_that_are_not_pairs_are_told():
    assert "a value is missing" in only_fault("MODEL.HDM", "True", "MODEL.ATM")
    assert only_fault("SOLVER.SEED=3").endswith("two words: SOLVER.SEED 3")


def test_later_pairs_win_over_earlier_ones_and_over_the_yaml(write):
    path = write("SOLVER: {SEED: 1}")
    assert load_cfg(path).SOLVER.SEED == 1
    assert load_cfg(path, ["SOLVER.SEED", "2", "SOLVER.SEED", "3"]).SOLVER.SEED == 3


# One report


def test_all_faults_come_at_once_with_file_and_line(write):
    base = write("DATALOADER:\n  NUM_INSTANCE: eight\n", "base.yml")
    path = write(
        "_BASE_: base.yml\n"
        "MODEL:\n"
        "  SDTPS_SPARSE_RATO: 0.5\n"
        "  SDTPS_AGGR_RATIO: 1.5\n"
        "  SDTPS_ONLY: yes\n"
        "  NECK: 'no'\n"
        "SOLVER:\n"
        "  IMS_PER_BATCH: 60\n"
        "  SEED: 1\n"
        "  SEED: 2\n"
    )
    lines = faults(path, ["MODEL.FOO", "1"])
    assert len(lines) == 7
    for start in (
        f"{base}:2 DATALOADER.NUM_INSTANCE = 'eight'",
        f"{path}:3 MODEL.SDTPS_SPARSE_RATO",
        f"{path}:4 MODEL.SDTPS_AGGR_RATIO = 1.5",
        f"{path}:6 MODEL.NECK = 'no': not offered",
        f"{path}:10 SOLVER.SEED: set twice (before in line 9)",
        "command line MODEL.FOO",
        f"MODEL.SDTPS_ONLY = True ({path}:5), MODEL.USE_SDTPS = False (default): ",
    ):
        assert any(line.startswith(start) for line in lines), start
    # whether 60 can be divided by 'eight' is not asked


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ("INPUT:\n  SIZE_TRAIN: !!python/tuple [256, 128]", ":2 INPUT.SIZE_TRAIN", "!!python/tuple' is refused"),
        ("MODEL: !!python/object/apply:os.system [ls]", ":1 MODEL", "is refused"),
        ("MODEL:\n\tHDM: True", ":2 ", "not valid YAML"),
        ("MODEL:\n  HDM: True\nMODEL:\n  ATM: True", ":3 MODEL", "set twice"),
        ("MODEL: 5", ":1 MODEL = 5", "a section"),
        ("TEST:\n  MISS: {a: b}", ":2 TEST.MISS", "expected one of"),
        ("SOVLER:\n  SEED: 1", ":1 SOVLER", "did you mean SOLVER?"),
        ("MODEL.HDM: True", ":1 MODEL.HDM", "write 'HDM:' below 'MODEL:'"),
        ("SOLVER:\n  SEED: &a [*a]", ":2 SOLVER.SEED", "recursive"),
        ("SOLVER:\n  MARGIN: 2026-13-01", ":2 SOLVER.MARGIN", "month"),
        ("- MODEL", "", "expected sections"),
        ("_BASE_: [3]", ":1 _BASE_", "expected the path of a YAML"),
    ],
)
def test_broken_yaml_is_told(write, text, where, what):
    path = write(text)
    assert any(line.startswith(f"{path}{where}") and what in line for line in faults(path))


def test_a_file_that_cannot_be_read_is_told(write, tmp_path):
    write("", "DeMo_SDTPS.yml")
    assert "did you mean" in faults(tmp_path / "DeMo_SDPTS.yml")[0]
    assert "DeMo_SDTPS.yml" in faults(tmp_path / "zzz.yml")[0]
    assert "a folder" in faults(tmp_path)[0]
    (tmp_path / "latin.yml").write_bytes(b"# \xe4\n")
    assert "UTF-8" in faults(tmp_path / "latin.yml")[0]


def test_nothing_and_comments_give_the_defaults(write):
    assert load_cfg(None) == load_cfg("") == load_cfg(write("# nothing\n")) == get_cfg()
    assert load_cfg(write("MODEL:\nTEST:\n  WEIGHT:\n  MISS:\n")) == get_cfg()


# _BASE_


def test_bases_are_read_first_relative_to_their_file(write):
    write("SOLVER: {SEED: 1, MARGIN: 0.1, MOMENTUM: 0.1, LOG_PERIOD: 1}", "a/root.yml")
    write("_BASE_: root.yml\nSOLVER: {MARGIN: 0.2, MOMENTUM: 0.2, LOG_PERIOD: 2}", "a/mid.yml")
    write("SOLVER: {MOMENTUM: 0.3, LOG_PERIOD: 3}", "other.yml")
    path = write("_BASE_: [../a/mid.yml, ../other.yml]\nSOLVER: {LOG_PERIOD: 4}", "b/leaf.yml")
    solver = load_cfg(path).SOLVER
    assert (solver.SEED, solver.MARGIN, solver.MOMENTUM, solver.LOG_PERIOD) == (1, 0.2, 0.3, 4)


def test_circles_and_missing_bases_are_told(write):
    a, b = write("_BASE_: b.yml", "a.yml"), write("_BASE_: ./a.yml", "b.yml")
    assert f"{a} -> {b} -> {a}" in faults(a)[0]
    (line,) = faults(write("_BASE_: sub/nope.yml"))
    assert "sub/nope.yml: no such file" in line


def test_two_bases_may_share_a_base(write):
    write("SOLVER: {SEED: 5}", "root.yml")
    write("_BASE_: root.yml", "a.yml")
    write("_BASE_: root.yml", "b.yml")
    assert load_cfg(write("_BASE_: [a.yml, b.yml]")).SOLVER.SEED == 5


@pytest.mark.parametrize("name", ["sample_tiny.yml", "sdtps_scratch.yml"])  # alone, and over the fields of others
def test_a_study_is_told_how_to_run(name, write):
    path = Path(__file__).parent.parent / "configs" / "studies" / name
    told = f"{path}: a study, not a config. Run it with: python -m tools.ablate {path}"
    assert faults(path) == [told]
    config = write(f"_BASE_: {path}")
    assert faults(config) == [f"{config} _BASE_: {told}"]


# Keys of older code


OLD = """
MODEL:
  DEVICE_ID: ('5')
  IF_WITH_CENTER: no
  ID_LOSS_TYPE: softmax
  METRIC_LOSS_TYPE: ('triplet')
  DIST_TRAIN: False
  PROMPT: False
  ADAPTER: 'off'
  NECK: bnneck
  SIE_VIEW: False
  DMCG: {ENABLED: False, LAYERS: 2}
  C_MIEI: {ENABLED: False}
DATALOADER: {SAMPLER: softmax_triplet}
SOLVER:
  STEPS: (40, 70)
  LARGE_FC_LR: False
  GAMMA: 0.1
  RANGE_K: 2
  WARMUP_METHOD: linear
  COSINE_SCALE: 30
TEST: {DIST_MAT: dist.npy, EVAL: True}
"""


def test_old_keys_are_accepted_with_one_line(write, caplog):
    cfg = load_cfg(write(OLD), ["SOLVER.CENTER_LR", "0.5"])
    warn(cfg)
    assert cfg == get_cfg()
    (record,) = caplog.records
    text = record.getMessage()
    assert "\n" not in text
    assert all(name in text for name in ("MODEL.DEVICE_ID", "MODEL.DMCG.LAYERS", "SOLVER.CENTER_LR", "TEST.EVAL"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MODEL.PROMPT", "True"),
        ("MODEL.ADAPTER", True),
        ("MODEL.SIE_VIEW", "yes"),
        ("MODEL.NECK", "no"),
        ("MODEL.IF_WITH_CENTER", "yes"),
        ("MODEL.METRIC_LOSS_TYPE", "center"),
        ("MODEL.ID_LOSS_TYPE", "arcface"),
        ("MODEL.IADD.ENABLED", True),
        ("DATALOADER.SAMPLER", "softmax"),
    ],
)
def test_old_keys_that_ask_for_something_are_refused(name, value):
    assert f"{name} = {value!r}: not offered" in only_fault(name, value)


# The config as a whole


def test_config_is_frozen():
    with pytest.raises(AttributeError):
        load_cfg(None).MODEL.HDM = True


def test_defaults_satisfy_their_own_declarations():
    validate(get_cfg())
    for name, key in FLAT_KEYS.items():
        assert key.parse(key.default) == key.default, name
        assert key.help, name


def test_defaults_are_not_shared():
    get_cfg().INPUT.SIZE_TRAIN.append(3)
    assert get_cfg().INPUT.SIZE_TRAIN == [256, 128]


def test_dump_reads_back_to_an_equal_config(write):
    opts = [
        "MODEL.IF_LABELSMOOTH",
        "off",
        "SOLVER.BASE_LR",
        "1e-7",
        "SOLVER.REINIT",
        "sdtps",
        "OUTPUT_DIR",
        "läufe/: no",
    ]
    cfg = load_cfg(None, opts)
    again = load_cfg(write(dump(cfg)))
    assert again == cfg
    assert again.OUTPUT_DIR == "läufe/: no"
    assert yaml.safe_load(dump(cfg))["INPUT"]["SIZE_TRAIN"] == [256, 128]


def test_print_config_writes_what_reads_back(write, capsys):
    print_config(write("MODEL: {DEPTH: 3}"), ["OUTPUT_DIR", "x"])
    text = capsys.readouterr().out
    assert load_cfg(write(text)) == load_cfg(None, ["MODEL.DEPTH", "3", "OUTPUT_DIR", "x"])


def test_diff_lists_what_changed():
    old = load_cfg(None)
    new = load_cfg(None, ["SOLVER.MAX_EPOCHS", "60", "INPUT.SIZE_TEST", "[256, 128]"])
    assert diff(old, new) == [("SOLVER.MAX_EPOCHS", 50, 60)]
    stored = yaml.safe_load(dump(old))
    stored["GONE"] = 1
    del stored["SOLVER"]["SEED"]
    stored["INPUT"]["SIZE_TRAIN"] = (256, 128)
    assert diff(stored, new) == [("SOLVER.MAX_EPOCHS", 50, 60), ("SOLVER.SEED", None, 1111), ("GONE", 1, None)]


def test_describe_lists_every_key():
    rows = [line for line in describe().splitlines() if line.startswith("| `")]
    assert len(rows) == len(FLAT_KEYS)
    assert all(row.replace("\\|", "").count("|") == 5 for row in rows)


def test_the_configuration_page_is_up_to_date():
    """docs/configuration.md is what `python -m configs` prints."""
    root = Path(__file__).parent.parent
    printed = subprocess.run([sys.executable, "-m", "configs"], cwd=root, capture_output=True, text=True, check=True)
    assert (root / "docs" / "configuration.md").read_text() == printed.stdout


def test_a_home_folder_is_resolved(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert load_cfg(None, ["OUTPUT_DIR", "~/runs/a"]).OUTPUT_DIR == "/home/somebody/runs/a"


@pytest.mark.parametrize(
    ("key", "harmless", "asking"),
    [
        ("MODEL.USE_SACR", False, True),
        ("MODEL.USE_DGAF", "no", "yes"),
        ("MODEL.SDTPS_CROSS_ATTN_TYPE", "cosine", "attention"),
        ("SOLVER.LR_SCHEDULER", "cosine", "multistep"),
    ],
)
def test_keys_of_the_fork_are_accepted_unless_they_ask_for_more(key, harmless, asking):
    load_cfg(None, [key, harmless, "MODEL.SACR_DILATION_RATES", "[2, 3]", "MODEL.DGAF_TAU", "1.0"])
    with pytest.raises(UserError, match=key.replace(".", r"\.")):
        load_cfg(None, [key, asking])
