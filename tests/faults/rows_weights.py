"""Bad inputs among checkpoints and pretrained weights, and in the environment."""

import torch
from entry import TEST, TRAIN, WEIGHT, Case
from spoil import SET, attack, attacking_program, backbone, checkpoint, cut, each, put, remove, rename, with_nan

WEIGHTS = (
    Case(
        "weights that are not there", ("none.pth", "no such file", "last.pth"), "TEST.WEIGHT run/none.pth", script=TEST
    ),
    Case("a folder for weights", ("is a folder", "last.pth"), "TEST.WEIGHT run", script=TEST),
    Case(
        "weights without a byte",
        ("x.pth: damaged", "0 bytes"),
        "TEST.WEIGHT x.pth",
        spoil=put("x.pth", ""),
        script=TEST,
    ),
    Case(
        "half the weights",
        ("last.pth: damaged", "run/DeMo_1.pth"),
        f"{WEIGHT} OUTPUT_DIR run",
        spoil=each(checkpoint("run/DeMo_1.pth"), cut("run/last.pth", 0.7)),
    ),
    Case(
        "a pointer to weights",
        ("x.pth: damaged",),
        "TEST.WEIGHT x.pth",
        spoil=put("x.pth", "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n"),
        script=TEST,
    ),
    Case(
        "half a .safetensors",
        ("x.safetensors: damaged",),
        "TEST.WEIGHT x.safetensors",
        spoil=each(checkpoint("x.safetensors", backbone), cut("x.safetensors", 0.5)),
        script=TEST,
    ),
    Case(
        "a list for weights",
        ("holds a list",),
        "TEST.WEIGHT x.pth",
        spoil=checkpoint("x.pth", lambda state: [1, 2]),
        script=TEST,
    ),
    Case(
        "a dict without tensors",
        ("holds no tensors",),
        "TEST.WEIGHT x.pth",
        spoil=checkpoint("x.pth", lambda state: {"a": 1}),
        script=TEST,
    ),
    Case(
        "weights that may not be read",
        ("last.pth", "may not be read"),
        WEIGHT,
        spoil=each(checkpoint("run/last.pth"), lambda here: (here / "run/last.pth").chmod(0)),
        script=TEST,
        as_nobody=True,
    ),
    Case(
        "weights of another architecture",
        ("does not fit", "vit.blocks.2", "MODEL.DEPTH: stored 2, now 3"),
        f"{WEIGHT} OUTPUT_DIR run MODEL.DEPTH 3",
    ),
    Case(
        "weights of another width",
        ("does not fit", "of another shape"),
        f"{WEIGHT} MODEL.TRANSFORMER_TYPE vit_small_patch16_224",
        script=TEST,
    ),
    Case(
        "weights of other cameras",
        ("knows 1 cameras", "Test it on"),
        "TEST.WEIGHT x.pth",
        spoil=checkpoint(
            "x.pth", lambda s: s["model"].update({"backbone.cam_embed": s["model"]["backbone.cam_embed"][:1]})
        ),
        script=TEST,
    ),
    Case(
        "weights of other cameras, to go on",
        ("cameras", "SOLVER.REINIT"),
        f"{WEIGHT} OUTPUT_DIR run",
        spoil=rename(f"{SET}/*/*/*cam2*", lambda path: path.name.replace("cam2", "cam7")),
    ),
    Case(
        "weights of other identities",
        ("other identities", "SOLVER.REINIT"),
        f"{WEIGHT} OUTPUT_DIR run",
        spoil=rename(f"{SET}/train_171/*/000001*", lambda path: path.name.replace("000001", "000099")),
    ),
    Case(
        "weights of fewer identities",
        ("identities", "SOLVER.REINIT"),
        f"{WEIGHT} OUTPUT_DIR run",
        spoil=remove(f"{SET}/train_171/*/000001*"),
    ),
    Case(
        "weights with a NaN",
        ("last.pth", "not finite", "backbone.vit.cls_token"),
        WEIGHT,
        spoil=checkpoint("run/last.pth", lambda s: s.update(model=with_nan(s["model"], "backbone.vit.cls_token"))),
        script=TEST,
    ),
    Case(
        "weights with a NaN, to go on",
        ("last.pth", "not finite", "backbone.vit.cls_token"),
        f"{WEIGHT} OUTPUT_DIR run",
        spoil=checkpoint("run/last.pth", lambda s: s.update(model=with_nan(s["model"], "backbone.vit.cls_token"))),
    ),
    Case(
        "moments with a NaN",
        ("last.pth", "not finite", "exp_avg"),
        f"{WEIGHT} OUTPUT_DIR run",
        spoil=checkpoint(
            "run/last.pth", lambda s: with_nan(next(iter(s["optimizer"]["moments"].values())), "exp_avg") and None
        ),
    ),
    Case(
        "moments of another shape",
        ("last.pth", "optimizer"),
        f"{WEIGHT} OUTPUT_DIR run",
        spoil=checkpoint(
            "run/last.pth", lambda s: next(iter(s["optimizer"]["moments"].values())).update(exp_avg=torch.ones(7))
        ),
    ),
    Case(
        "weights of no known epoch",
        ("x.pth", "Rename it", "epoch"),
        "TEST.WEIGHT x.pth",
        spoil=checkpoint("x.pth", lambda s: s["model"]),
    ),
    Case(
        "a checkpoint of the future",
        ("version 9",),
        f"{WEIGHT} OUTPUT_DIR run",
        spoil=checkpoint("run/last.pth", lambda s: s.update(version=9)),
    ),
    Case(
        "a checkpoint that lacks a part",
        ("incomplete", "identities"),
        f"{WEIGHT} OUTPUT_DIR run",
        spoil=checkpoint("run/last.pth", lambda s: s.pop("identities") and None),
    ),
    Case(
        "a checkpoint with a word for its epoch",
        ("last.pth", "epoch"),
        f"{WEIGHT} OUTPUT_DIR run",
        spoil=checkpoint("run/last.pth", lambda s: s.update(epoch="one")),
    ),
    Case(
        "a checkpoint with a broken config",
        ("last.pth", "config"),
        f"{WEIGHT} OUTPUT_DIR run",
        spoil=checkpoint("run/last.pth", lambda s: s.update(config="MODEL: [")),
    ),
    Case(
        "a checkpoint with a tag in its config",
        ("last.pth", "config"),
        WEIGHT,
        spoil=checkpoint(
            "run/last.pth", lambda s: s.update(config="MODEL: !!python/object/apply:os.system ['touch victim']")
        ),
        script=TEST,
    ),
    Case(
        "pretrained weights that are not there",
        ("none.pt", "no such file"),
        "MODEL.PRETRAINED True MODEL.PRETRAIN_PATH_T none.pt",
    ),
    Case(
        "pretrained weights of another architecture",
        ("does not fit the backbone", "width 192 with 3", "What to do"),
        "MODEL.PRETRAINED True MODEL.PRETRAIN_PATH_T x.pth MODEL.DEPTH 3",
        spoil=checkpoint("x.pth", backbone),
    ),
    Case(
        "half the pretrained weights",
        ("x.safetensors: damaged",),
        "MODEL.PRETRAINED True MODEL.PRETRAIN_PATH_T x.safetensors",
        spoil=each(checkpoint("x.safetensors", backbone), cut("x.safetensors", 0.9)),
    ),
    Case(
        "pretrained weights with a NaN",
        ("x.pth", "not finite", "vit.cls_token"),
        "MODEL.PRETRAINED True MODEL.PRETRAIN_PATH_T x.pth",
        spoil=checkpoint("x.pth", lambda s: with_nan(backbone(s), "vit.cls_token")),
    ),
    Case(
        "a list of pretrained weights",
        ("holds a list",),
        "MODEL.PRETRAINED True MODEL.PRETRAIN_PATH_T x.pth",
        spoil=checkpoint("x.pth", lambda s: [1]),
    ),
    Case(
        "pretrained weights without a network",
        ("could not be fetched", "PRETRAIN_PATH_T"),
        "MODEL.PRETRAINED True",
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": "hub"},
    ),
)
ATTACKS = (
    *(
        Case(
            f"{where} of code ({kind})",
            ("x.pth: refused", "would run code", "system"),
            opts,
            spoil=attack("x.pth", kind),
            script=script,
        )
        for kind in ("zip", "zip, protocol 4", "legacy", "pickle 0", "pickle 2", "pickle 4", "pickle 5")
        for where, opts, script in (
            ("weights", "TEST.WEIGHT x.pth", TEST),
            ("pretrained weights", "MODEL.PRETRAINED True MODEL.PRETRAIN_PATH_T x.pth", TRAIN),
        )
    ),
    Case(
        "a program of TorchScript as weights",
        ("x.pt", "TorchScript"),
        "TEST.WEIGHT x.pt",
        spoil=attacking_program("x.pt"),
        script=TEST,
    ),
    Case(
        "a program of TorchScript as pretrained weights",
        ("x.pt", "w"),
        "MODEL.PRETRAINED True MODEL.PRETRAIN_PATH_T x.pt",
        spoil=attacking_program("x.pt"),
    ),
)
ENVIRONMENT = (
    Case(
        "a file for OUTPUT_DIR",
        ("OUTPUT_DIR tiny.yml", "cannot be written"),
        "OUTPUT_DIR tiny.yml",
        writes=("tiny.yml",),
    ),
    Case(
        "OUTPUT_DIR below a file",
        ("OUTPUT_DIR tiny.yml/run", "cannot be written"),
        "OUTPUT_DIR tiny.yml/run",
        writes=("tiny.yml",),
    ),
    Case(
        "OUTPUT_DIR of another run",
        ("holds a run already", "OUTPUT_DIR run-2", "TEST.WEIGHT run/last.pth"),
        "OUTPUT_DIR run",
    ),
    Case("an empty OUTPUT_DIR", ("OUTPUT_DIR", "not empty"), yaml="OUTPUT_DIR: ''"),
    Case("OUTPUT_DIR without permission", ("OUTPUT_DIR out", "denied", "Name another folder"), as_nobody=True),
    Case("OUTPUT_DIR without permission, to test", ("out", "denied"), WEIGHT, script=TEST, as_nobody=True),
    Case(
        "a cache without permission",
        ("cache", "denied", "DATALOADER.CACHE_DIR"),
        "DATALOADER.CACHE disk",
        writes=("data/cache",),
        as_nobody=True,
    ),
    Case(
        "a cache beyond the memory",
        ("DATALOADER.CACHE memory", "are free", "disk"),
        "DATALOADER.CACHE memory INPUT.SIZE_TRAIN [65536,65536] INPUT.SIZE_TEST [65536,65536]",
    ),
    Case(
        "no GPU where cuda is asked",
        ("MODEL.DEVICE is 'cuda'", "cpu"),
        "MODEL.DEVICE cuda",
        env={"CUDA_VISIBLE_DEVICES": ""},
    ),
    Case(
        "a GPU that is not there",
        ("MODEL.DEVICE is 'cuda:9'",),
        "MODEL.DEVICE cuda:9",
        env={"CUDA_VISIBLE_DEVICES": ""},
    ),
    Case("no Apple GPU", ("MODEL.DEVICE is 'mps'", "cpu"), "MODEL.DEVICE mps"),
    Case("a device that does not exist", ("MODEL.DEVICE", "one of 'auto'"), "MODEL.DEVICE gpu"),
    Case("fp16 on a CPU", ("SOLVER.AMP is 'fp16'", "auto"), "SOLVER.AMP fp16"),
)
