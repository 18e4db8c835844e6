"""Stands in for train_net.py where a test is about what starts it: writes what a run leaves, in no time.

mAP is 50 + 10 · SDTPS_LOSS_WEIGHT + seed (+ 5 for `both`). MODEL.NAME says what else happens: `fails` ends with an
error, `slow` waits after its first epoch for a signal, unless it goes on from a checkpoint.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from configs import dump, load_cfg

cfg = load_cfg(sys.argv[2], sys.argv[3:])
out = Path(cfg.OUTPUT_DIR)
out.mkdir(parents=True, exist_ok=True)
(out / "config.yml").write_text(dump(cfg))
with open(out / "calls.jsonl", "a") as file:
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES")
    file.write(json.dumps({"weight": cfg.TEST.WEIGHT, "gpu": gpu, "begin": time.time()}) + "\n")
(out / "train.log").write_text("engine.processor INFO: training on a stub (float32)\n")
print("the stub begins")
if cfg.MODEL.NAME == "fails":
    sys.exit("the stub fails, as it was told")


def save_and_leave(signum, frame):
    (out / "last.pth").write_text("state")
    sys.exit(128 + signum)


value = 50 + 10 * cfg.MODEL.SDTPS_LOSS_WEIGHT + cfg.SOLVER.SEED
metrics = {"ori": {"mAP": value, "R1": value + 1}}
if cfg.MODEL.USE_SDTPS:
    metrics |= {"sdtps": {"mAP": value - 3, "R1": value}, "both": {"mAP": value + 5, "R1": value + 7}}
lines = []
for epoch in range(1, cfg.SOLVER.MAX_EPOCHS + 1):
    rates = {"samples_per_second": 100.0 * epoch, "peak_memory_gib": 2.0 + epoch}
    lines.append({"kind": "train", "step": 3 * epoch, "epoch": epoch, **rates})
    lines.append({"kind": "epoch", "step": 3 * epoch, "epoch": epoch, "loss": 4.0 - epoch + value / 100, "acc": 0.1})
    scores = {f"{branch}/{name}": v for branch, row in metrics.items() for name, v in row.items()}
    lines.append({"kind": "eval", "step": 3 * epoch, "epoch": epoch, **scores})
    if cfg.MODEL.NAME == "slow" and not cfg.TEST.WEIGHT:
        signal.signal(signal.SIGTERM, save_and_leave)
        (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        time.sleep(60)
(out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
best = {b: {name: v + 1 for name, v in row.items()} for b, row in metrics.items()} | {"epoch": 1}
last = metrics | {"epoch": cfg.SOLVER.MAX_EPOCHS}
(out / "metrics.json").write_text(json.dumps({"last": last, "best": best}))
(out / "last.pth").write_text("state")
