"""Every config key: its default, its meaning with the unit, and the values that it may take.

This table is the only declaration. The CfgNode, the checks and the reference table of the documentation derive from it.
The names are DeMo's where DeMo has the knob.
"""

from yacs.config import CfgNode

from configs.key import Key

_NOT_EMPTY = r"\s*\S.*"
_RATIO = "(0, 1]"
_PROBABILITY = "[0, 1]"
_POSITIVE = "(0, inf)"
_NOT_NEGATIVE = "[0, inf)"
_COUNT = "[1, inf)"

KEYS: dict[str, dict[str, Key]] = {
    "MODEL": {
        "NAME": Key(
            "DeMo",
            "prefix of the checkpoint files: DeMo_10.pth, DeMobest.pth",
            pattern=r"[\w.+-]+",
            expects="a file name prefix of letters, digits and . _ + -",
        ),
        "DEVICE": Key(
            "auto",
            "where to compute; auto takes CUDA, else MPS, else the CPU",
            pattern=r"auto|cpu|mps|cuda(:\d+)?",
            expects="one of 'auto', 'cuda', 'cuda:N' (N the number of the card), 'mps', 'cpu'",
        ),
        # Backbone
        "TRANSFORMER_TYPE": Key(
            "ViT-B-16",
            "the ViT: ViT-B-16 is CLIP's (QuickGELU, 768 to 512), other names are timm's: vit_base_patch16_224",
            pattern=r"[\w.-]+",
            expects="'ViT-B-16' or the name of a ViT in timm",
        ),
        "PRETRAIN_PATH_T": Key(
            "",
            "file with the pretrained backbone (.pt, .pth, .safetensors; OpenAI, open_clip or timm names); "
            "empty fetches timm's weights from the hub",
        ),
        "PRETRAINED": Key(True, "False starts the backbone from random weights, on purpose"),
        "DEPTH": Key(0, "transformer blocks that are used, the first n; 0 uses all", within=_NOT_NEGATIVE),
        "STRIDE_SIZE": Key(
            [16, 16], "step between patches [down, across] in pixels; below the patch size they overlap", within=_COUNT
        ),
        "DROP_PATH": Key(0.1, "stochastic depth of the backbone, rate of the last block", within="[0, 1)"),
        "DROP_OUT": Key(0.0, "dropout of the backbone's MLPs and projections", within="[0, 1)"),
        "ATT_DROP_RATE": Key(0.0, "dropout of the backbone's attention weights", within="[0, 1)"),
        "FROZEN": Key(False, "the backbone receives no gradient"),
        "SIE_CAMERA": Key(True, "add a learned embedding of the camera to the class token"),
        "SIE_COE": Key(1.0, "factor on the camera embedding", within=_NOT_NEGATIVE),
        # DeMo: branches and losses
        "DIRECT": Key(1, "1: one head on the three globals concatenated; 0: a head per modality", choices=(0, 1)),
        "GLOBAL_LOCAL": Key(False, "join the mean patch token into each modality's global feature"),
        "HDM": Key(False, "hierarchical decoupling: a feature per subset of modalities; needs ATM"),
        "ATM": Key(False, "attention-triggered mixture of experts over HDM's features: branch moe; needs HDM"),
        "HEAD": Key(4, "heads of the mixture of experts; divides the feature width (512 for CLIP)", within=_COUNT),
        "ID_LOSS_WEIGHT": Key(1.0, "weight of the identity (cross-entropy) loss of every branch", within=_NOT_NEGATIVE),
        "TRIPLET_LOSS_WEIGHT": Key(1.0, "weight of the batch-hard triplet loss of every branch", within=_NOT_NEGATIVE),
        "IF_LABELSMOOTH": Key(
            "on",
            "label smoothing of 0.1 in the identity loss",
            choices=("on", "off"),
            also={True: "on", "yes": "on", False: "off", "no": "off"},
        ),
        "NO_MARGIN": Key(True, "triplet loss with the soft margin softplus(d_ap - d_an); False uses SOLVER.MARGIN"),
        # SDTPS: score, sparsify, aggregate
        "USE_SDTPS": Key(False, "select patches by SDTPS and add its branch: sdtps"),
        "SDTPS_SPARSE_RATIO": Key(0.5, "share of the patches that is kept: K = ceil(N * ratio)", within=_RATIO),
        "SDTPS_AGGR_RATIO": Key(0.4, "share of the kept that comes out: A = int(K * ratio), at least 1", within=_RATIO),
        "SDTPS_BETA": Key(
            0.25,
            "weight of the similarities in the score; the predictor has 1 - 2 * beta, nothing at 0.5",
            within="[0, 0.5]",
        ),
        "SDTPS_TEMPERATURE": Key(
            0.3,
            "temperature of the scores where they weight the kept patches; 0: scores only choose, and learn little",
            within=_NOT_NEGATIVE,
        ),
        "SDTPS_SCORE_GRAD": Key(
            "all",
            "which parts of the score pass a gradient; predictor detaches the similarities",
            choices=("all", "predictor", "none"),
        ),
        "SDTPS_SIMILARITY": Key(
            "cosine",
            "how a patch is compared with a global: cosine, or a learned query-key product",
            choices=("cosine", "attention"),
        ),
        "SDTPS_CHOICE": Key(
            "best",
            "which patches are kept: those of the highest scores, or any, as a control; Gumbel sampling needs best",
            choices=("best", "random"),
        ),
        "SDTPS_POOL": Key(
            "cross",
            "how the selected tokens become one feature: mean (the aggregation ratio then does next to nothing), gem, "
            "attention, transformer; reduce joins attention's with the class token; cross is reduce behind a layer in "
            "which the tokens of all modalities attend to each other",
            choices=("mean", "gem", "attention", "transformer", "reduce", "cross"),
        ),
        "SDTPS_GLOBAL": Key(
            "class",
            "the global that patches are compared with: the class token, or GLOBAL_LOCAL's reduced one",
            choices=("class", "reduced"),
        ),
        "SDTPS_AFTER_BLOCK": Key(
            0,
            "select behind this block of the backbone, counted from 1: the dropped patches leave it there, joined to "
            "one token, and the other blocks work on the kept ones alone; 0 selects behind the last block",
            within=_NOT_NEGATIVE,
        ),
        "SDTPS_AUX_HEAD": Key(
            False,
            "in training, a second head on the selected tokens pooled by attention: it gives the scores a task where "
            "SDTPS_POOL cross can look past them",
        ),
        "SDTPS_USE_GUMBEL": Key(False, "in training, choose the patches by Gumbel top-k sampling"),
        "SDTPS_GUMBEL_TAU": Key(1.0, "temperature of that sampling: above 1 more random", within=_POSITIVE),
        "SDTPS_LOSS_WEIGHT": Key(1.0, "weight of the losses of branch sdtps", within=_NOT_NEGATIVE),
        "SDTPS_ONLY": Key(False, "train and use the branch sdtps alone"),
        "SDTPS_WARMUP_EPOCHS": Key(
            0,
            "for n epochs ori trains alone, over the next n the weight of sdtps rises linearly",
            within=_NOT_NEGATIVE,
        ),
    },
    "INPUT": {
        "SIZE_TRAIN": Key([256, 128], "training image [height, width] in pixels", within=_COUNT),
        "SIZE_TEST": Key([256, 128], "evaluation image [height, width] in pixels, as in training", within=_COUNT),
        "PROB": Key(0.5, "probability of a horizontal flip", within=_PROBABILITY),
        "RE_PROB": Key(0.5, "probability of random erasing", within=_PROBABILITY),
        "PIXEL_MEAN": Key([0.5, 0.5, 0.5], "mean per channel, pixels scaled to 0..1", within="[0, 1]"),
        "PIXEL_STD": Key([0.5, 0.5, 0.5], "standard deviation per channel, pixels scaled to 0..1", within="(0, 1]"),
        "PADDING": Key(10, "border in pixels added before the random crop", within=_NOT_NEGATIVE),
        "SYNC_AUG": Key(False, "draw flip and crop once for the three modalities, so that their patches stay aligned"),
    },
    "DATASETS": {
        "NAMES": Key(
            "RGBNT201",
            "the data set; manifest: your own, listed in a CSV",
            choices=("RGBNT201", "RGBNT100", "MSVR310", "manifest"),
        ),
        "ROOT_DIR": Key(
            "./datasets", "folder that holds the data set's folder", pattern=_NOT_EMPTY, expects="a path, not empty"
        ),
        "MANIFEST": Key("", "the CSV that NAMES manifest reads; empty: manifest.csv in ROOT_DIR"),
        "CHECK": Key(True, "decode every image once before training and stop at one that does not"),
    },
    "DATALOADER": {
        "NUM_WORKERS": Key(
            8, "processes that load images; 0 loads in the main process, -1: cores - 1", within="[-1, inf)"
        ),
        "NUM_INSTANCE": Key(8, "image triples of each identity in a batch", within=_COUNT),
        "CACHE": Key(
            "auto",
            "where decoded images are kept, to be augmented on the device; auto: in memory when training on CUDA if "
            "they take at most 8 GiB and a quarter of what is free, else off; off reads the files in every epoch",
            choices=("auto", "memory", "disk", "off"),
            also={False: "off", "no": "off"},
        ),
        "CACHE_DIR": Key("", "folder of the files of CACHE disk; empty: the folder cache in DATASETS.ROOT_DIR"),
    },
    "SOLVER": {
        "OPTIMIZER_NAME": Key("Adam", "the optimizer", choices=("Adam", "AdamW", "SGD")),
        "MAX_EPOCHS": Key(50, "epochs to train", within=_COUNT),
        "BASE_LR": Key(3.5e-4, "learning rate outside the backbone", within=_POSITIVE),
        "BACKBONE_LR": Key(5e-6, "learning rate of the backbone; 5e-6 suits CLIP", within=_NOT_NEGATIVE),
        "BIAS_LR_FACTOR": Key(2.0, "factor on the rate of biases outside the backbone", within=_NOT_NEGATIVE),
        "SDTPS_LR_FACTOR": Key(1.0, "factor on the rate of SDTPS's parameters", within=_NOT_NEGATIVE),
        "MOMENTUM": Key(0.9, "momentum of SGD", within="[0, 1)"),
        "MARGIN": Key(0.3, "margin of the triplet loss where MODEL.NO_MARGIN is off", within=_NOT_NEGATIVE),
        "WEIGHT_DECAY": Key(1e-4, "weight decay", within=_NOT_NEGATIVE),
        "WEIGHT_DECAY_BIAS": Key(1e-4, "weight decay of biases", within=_NOT_NEGATIVE),
        "SCHEDULE": Key(
            "cosine",
            "cosine: warm-up and cosine relative to each group's own rate, no noise; "
            "demo: DeMo's published schedule, with its noise",
            choices=("cosine", "demo"),
        ),
        "WARMUP_ITERS": Key(10, "warm-up in EPOCHS (the name is DeMo's)", within=_NOT_NEGATIVE),
        "WARMUP_FACTOR": Key(0.1, "share of the rate at which the warm-up begins", within="[0, 1]"),
        "MIN_LR_FACTOR": Key(0.001, "share of the rate at which the cosine ends", within="[0, 1]"),
        "SEED": Key(1111, "seed of every random draw", within="[0, 4294967295]"),
        "CHECKPOINT_PERIOD": Key(
            10,
            "epochs between numbered checkpoints; last.pth is written after every one for which the disk is ready",
            within=_COUNT,
        ),
        "KEEP_CHECKPOINTS": Key(
            0,
            "numbered checkpoints that are kept, the newest n; 0 keeps all; best and last are kept anyway",
            within=_NOT_NEGATIVE,
        ),
        "LOG_PERIOD": Key(10, "steps between log lines", within=_COUNT),
        "EVAL_PERIOD": Key(1, "epochs between evaluations", within=_COUNT),
        "IMS_PER_BATCH": Key(64, "image triples in a training batch, over all micro-batches of a step", within=_COUNT),
        "AMP": Key(
            "auto",
            "arithmetic; auto: bf16 from Ampere on, fp16 on older CUDA cards, float32 elsewhere",
            choices=("auto", "bf16", "fp16", "float32"),
        ),
        "FUSED_BLOCKS": Key(
            True,
            "on CUDA in half precision, compute what lies between the matrix products of a plain ViT, and what SDTPS "
            "does with all patches, by this project's own kernels: faster, in less memory; not with DETERMINISTIC",
        ),
        "COMPILE": Key(
            "auto",
            "torch.compile, region by region; auto: on CUDA, unless DETERMINISTIC, or blocks are fused and steps "
            "replayed, so that it would take longer than it saves",
            choices=("auto", "on", "off"),
            also={True: "on", False: "off"},
        ),
        "CUDA_GRAPH": Key(
            True,
            "on CUDA, replay forward and backward pass as one recorded graph, so that a slow host costs no time; not "
            "with DETERMINISTIC, GRAD_CHECKPOINT of blocks that are not fused, or several ranks where parts do not "
            "learn from the first step on (SDTPS_WARMUP_EPOCHS)",
        ),
        "GRAD_CLIP": Key(0.0, "clip the norm of the gradient to this; 0 is off", within=_NOT_NEGATIVE),
        "ACCUMULATION": Key(1, "micro-batches in which a batch is computed, to save memory", within=_COUNT),
        "EMA_DECAY": Key(
            0.0, "decay of the moving average of the weights that is evaluated; 0 is off", within="[0, 1)"
        ),
        "GRAD_CHECKPOINT": Key(False, "recompute the backbone's activations in the backward pass: less memory, slower"),
        "DETERMINISTIC": Key(False, "deterministic algorithms only: the same numbers in every run, slower on a GPU"),
        "RANK_TIMEOUT": Key(
            25, "seconds in a step after which a rank that does not answer ends a run of several ranks", within=_COUNT
        ),
        "REINIT": Key(
            [], "parts that start anew although the checkpoint holds them in another shape, such as [sdtps, classifier]"
        ),
    },
    "TEST": {
        "IMS_PER_BATCH": Key(256, "image triples in an evaluation batch", within=_COUNT),
        "RE_RANKING": Key(False, "re-rank with k-reciprocal neighbours"),
        "WEIGHT": Key("", "checkpoint: train_net.py goes on from it, test_net.py evaluates it"),
        "NECK_FEAT": Key("before", "take the feature before or after the BNNeck", choices=("before", "after")),
        "FEAT_NORM": Key(True, "scale features to length 1 before they are compared"),
        "BRANCH_NORM": Key(False, "scale each branch to length 1 before `both` joins them"),
        "MISS": Key(
            "nothing",
            "modalities that are absent in evaluation: r RGB, n NI, t TI; all runs through every case",
            choices=("nothing", "r", "n", "t", "rn", "rt", "nt", "all"),
            also={"None": "nothing", "none": "nothing", "": "nothing", None: "nothing"},
        ),
    },
    "": {
        "OUTPUT_DIR": Key(
            "./runs/default",
            "folder of the run: log, metrics, checkpoints, resolved config",
            pattern=_NOT_EMPTY,
            expects="a path, not empty",
        ),
    },
}
"""Section -> name -> key; the empty section holds what stands at the top level of a YAML."""

FLAT_KEYS: dict[str, Key] = {
    f"{section}.{name}".lstrip("."): key for section, keys in KEYS.items() for name, key in keys.items()
}
"""Dotted name, as on the command line -> key."""


def get_cfg() -> CfgNode:
    """The defaults as a CfgNode of its own that may be changed."""
    cfg = CfgNode()
    for section, keys in KEYS.items():
        values = {name: key.default for name, key in keys.items()}
        if section:
            cfg[section] = CfgNode(values)  # copies the lists
        else:
            cfg.update(values)
    return cfg


def describe() -> str:
    """All keys as Markdown tables, one a section."""
    parts = []
    for section, keys in KEYS.items():
        rows = [
            f"| `{name}` | `{key.default!r}` | {key.expected().replace('|', chr(92) + '|')} | {key.help} |"
            for name, key in keys.items()
        ]
        header = ["| key | default | allowed | meaning |", "| --- | --- | --- | --- |"]
        parts.append("\n".join([f"### {section or 'Top level'}", "", *header, *rows]))
    return "\n\n".join(parts) + "\n"
