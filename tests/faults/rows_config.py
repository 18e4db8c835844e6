"""Bad inputs in configs and on the command line."""

from entry import TEST, WEIGHT, Case

BILLION = "a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{b}: &{b} [*{a},*{a},*{a},*{a},*{a},*{a},*{a},*{a},*{a},*{a}]\n"
    for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {x: 1, y: 2}\n" + "".join(
    f"{b}: &{b} {{<<: [*{a},*{a},*{a},*{a},*{a},*{a},*{a},*{a},*{a},*{a}]}}\n"
    for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


CONFIG = (
    Case(
        "an unknown key", ("command line", "MODEL.SDTPS_BETTA", "did you mean MODEL.SDTPS_BETA?"), "MODEL.SDTPS_BETTA 1"
    ),
    Case("a key in small letters", ("bad.yml:3", "capitals", "SOLVER.MAX_EPOCHS"), yaml="SOLVER:\n  max_epochs: 3"),
    Case("a key below the wrong section", ("MODEL.MAX_EPOCHS", "did you mean SOLVER"), yaml="MODEL: {MAX_EPOCHS: 3}"),
    Case("a dotted key in a YAML", ("bad.yml:2", "for the command line"), yaml="SOLVER.SEED: 3"),
    Case("a key twice", ("bad.yml:4 SOLVER.SEED", "set twice", "line 3"), yaml="SOLVER:\n  SEED: 1\n  SEED: 2"),
    Case("a section twice", ("SOLVER: set twice",), yaml="SOLVER: {SEED: 1}\nSOLVER: {SEED: 2}"),
    Case("a section with a value", ("SOLVER = 3", "indented"), yaml="SOLVER: 3"),
    Case("a key with keys of its own", ("SOLVER.SEED", "not keys of its own"), yaml="SOLVER: {SEED: {A: 1}}"),
    Case("a word for a number", ("SOLVER.MAX_EPOCHS = 'ten'", "an integer >= 1"), yaml="SOLVER: {MAX_EPOCHS: ten}"),
    Case("a per cent", ("'50%'", "a number in (0, 1]"), "MODEL.SDTPS_SPARSE_RATIO 50%"),
    Case("a fraction for a whole number", ("SOLVER.MAX_EPOCHS = 2.5", "integer"), yaml="SOLVER: {MAX_EPOCHS: 2.5}"),
    Case("a rate that is NaN", ("SOLVER.BASE_LR = nan", "a number > 0"), yaml="SOLVER: {BASE_LR: .nan}"),
    Case("a rate that is NaN, as an option", ("SOLVER.BACKBONE_LR = 'nan'", ">= 0"), "SOLVER.BACKBONE_LR nan"),
    Case("an infinite rate", ("SOLVER.BASE_LR = 'inf'",), "SOLVER.BASE_LR inf"),
    Case("a number of 5000 digits", ("SOLVER.SEED",), yaml=f"SOLVER: {{SEED: {'9' * 5000}}}"),
    Case("a huge number in base 16", ("SOLVER.SEED", "[0, 4294967295]"), yaml=f"SOLVER: {{SEED: 0x{'f' * 9000}}}"),
    Case("negative epochs", ("SOLVER.MAX_EPOCHS = '-3'", ">= 1"), "SOLVER.MAX_EPOCHS -3"),
    Case("a batch of none", ("SOLVER.IMS_PER_BATCH = '0'",), "SOLVER.IMS_PER_BATCH 0"),
    Case("a batch that does not divide", ("divisible by 2", "Set SOLVER.IMS_PER_BATCH"), "SOLVER.IMS_PER_BATCH 7"),
    Case("a ratio of nothing", ("MODEL.SDTPS_AGGR_RATIO = '0'", "(0, 1]"), "MODEL.SDTPS_AGGR_RATIO 0"),
    Case("a stride of nothing", ("MODEL.STRIDE_SIZE", ">= 1"), "MODEL.STRIDE_SIZE [0,16]"),
    Case("one side of an image size", ("INPUT.SIZE_TRAIN", "a list of 2"), "INPUT.SIZE_TRAIN [256]"),
    Case(
        "an image below one patch",
        ("smaller than one patch", "at least 16"),
        "INPUT.SIZE_TRAIN [8,8] INPUT.SIZE_TEST [8,8]",
    ),
    Case("two sizes of images", ("Set both to the same",), "INPUT.SIZE_TEST [64,64]"),
    Case("HDM without ATM", ("MODEL.HDM", "Set both True"), "MODEL.HDM True"),
    Case("heads that do not divide", ("MODEL.HEAD", "5", "192"), "MODEL.HDM True MODEL.ATM True MODEL.HEAD 5"),
    Case("a warm-up without end", ("SOLVER.WARMUP_ITERS", "Set"), "SOLVER.WARMUP_ITERS 99"),
    Case("a key that asks for more", ("MODEL.PROMPT", "not offered"), "MODEL.PROMPT True"),
    Case("an unknown data set", ("DATASETS.NAMES", "RGBNT100"), "DATASETS.NAMES Market1501"),
    Case(
        "an unknown backbone", ("vit_huge_patch99", "MODEL.TRANSFORMER_TYPE"), "MODEL.TRANSFORMER_TYPE vit_huge_patch99"
    ),
    Case("a backbone without patches", ("resnet50", "ViT"), "MODEL.TRANSFORMER_TYPE resnet50"),
    Case("more blocks than there are", ("MODEL.DEPTH", "12"), "MODEL.DEPTH 99"),
    Case("a name with folders", ("MODEL.NAME = '../../evil'", "file name prefix"), "MODEL.NAME ../../evil"),
    Case("a part that is none", ("SOLVER.REINIT", "'neck'"), f"{WEIGHT} SOLVER.REINIT ['neck'] OUTPUT_DIR run"),
    Case("an unknown case of missing modalities", ("TEST.MISS", "'rnt'"), "TEST.MISS rnt"),
    Case("tabs in a YAML", ("bad.yml:3", "not valid YAML", "spaces"), yaml="SOLVER:\n\tSEED: 3"),
    Case("a list at the top", ("sections such as 'MODEL:'",), yaml=b"- 1\n- 2\n"),
    Case("bytes for a YAML", ("bad.yml", "UTF-8"), yaml=bytes(range(128, 256))),
    Case("zeros for a YAML", ("bad.yml", "not valid YAML"), yaml=bytes(100)),
    Case("a YAML in UTF-16", ("bad.yml", "UTF-8"), yaml="SOLVER: {SEED: 3}".encode("utf-16")),
    Case("two documents in a YAML", ("not valid YAML",), yaml="SOLVER: {SEED: 1}\n---\nSOLVER: {SEED: 2}"),
    Case("a base that goes in a circle", ("goes in a circle", "Remove"), yaml=b"_BASE_: bad.yml\n"),
    Case("a base that is not there", ("_BASE_", "base.yml", "no such file"), yaml=b"_BASE_: ../base.yml\n"),
    Case("a base that is no path", ("_BASE_", "path of a YAML"), yaml=b"_BASE_: 3\n"),
    Case("a base outside that is no YAML", ("/etc/passwd",), yaml=b"_BASE_: /etc/passwd\n"),
)
HOSTILE_YAML = (
    Case(
        "a tag that would run a program",
        ("!!python/object/apply:os.system", "refused"),
        yaml="OUTPUT_DIR: !!python/object/apply:os.system ['touch victim']",
    ),
    Case(
        "a tag on a section",
        ("!!python/object/new:os.system", "refused"),
        yaml="MODEL: !!python/object/new:os.system {args: ['touch victim']}",
    ),
    Case("a tag on a key", ("bad.yml:2",), yaml="!!python/name:os.system '': 1"),
    Case("a YAML that grows to a billion", ("bad.yml", "aliases"), yaml=f"{BILLION}SOLVER: {{SEED: *i}}"),
    Case("a YAML that grows by merging", ("bad.yml", "aliases"), yaml=f"{MERGES}SOLVER: {{<<: *i}}"),
    Case("a list that holds itself", ("bad.yml:2 SOLVER.SEED", "recursive"), yaml="SOLVER: {SEED: &a [*a]}"),
    Case("a section that holds itself", ("bad.yml:2", "holds itself"), yaml="SOLVER: &a {<<: *a}"),
    Case("a YAML of 5000 brackets", ("bad.yml", "nested"), yaml="SOLVER: {SEED: " + "[" * 5000 + "]" * 5000 + "}"),
    Case("a YAML without end", ("/dev/zero", "too large"), argv=("--config_file", "/dev/zero")),
)
COMMAND_LINE = (
    Case("no config file", ("--config_file", "usage"), argv=()),
    Case("a misspelt flag", ("--config", "usage"), argv=("--confg_file", "tiny.yml")),
    Case(
        "a config file that is not there", ("tinny.yml", "did you mean tiny.yml"), argv=("--config_file", "tinny.yml")
    ),
    Case("a folder for a config file", ("data", "a folder"), argv=("--config_file", "data")),
    Case("a name of 300 letters", ("cannot be read",), argv=("--config_file", "x" * 300)),
    Case("a key without a value", ("KEY VALUE pairs",), "SOLVER.SEED"),
    Case("a key and a value in one word", ("two words", "SOLVER.SEED 3"), "SOLVER.SEED=3"),
    Case("a section for a key", ("a section, not a key",), "SOLVER 3"),
    Case("no weights to test", ("TEST.WEIGHT is empty", "TEST.WEIGHT <checkpoint>"), script=TEST),
)
