"""What two ranks do in the tests of several processes: one start of both serves many checks.

`python ranks.py rank world_size port folder config` leaves rank_<n>.pt with what it found, and its runs, in the folder.
"""

import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from configs import load_cfg
from data import make_dataloader
from engine import do_train, evaluate, interrupt
from engine.background import CheckpointWriter
from engine.checkpoint import read_start
from engine.guard import FiniteGuard, NonFiniteError
from engine.meters import Meters
from engine.parallel import parallel
from modeling import make_model
from modeling.batch_norm import SyncedBatchNorm1d
from solver import ReIDLoss, create_scheduler, make_loss, make_optimizer, triplet_loss
from utils import distributed
from utils.distributed import average, gather_alike
from utils.errors import Interrupted, UserError
from utils.seed import seed_everything

EQUAL = ["MODEL.HDM", "True", "MODEL.ATM", "True", "MODEL.HEAD", "2", "MODEL.DROP_PATH", "0", "SOLVER.LOG_PERIOD", "1"]
EQUAL += ["SOLVER.EVAL_PERIOD", "100", "SOLVER.MAX_EPOCHS", "9", "SOLVER.GRAD_CLIP", "5.0", "SOLVER.EMA_DECAY", "0.9"]
"""20 steps or more without anything random."""
PARTS = ["SOLVER.ACCUMULATION", "2", "MODEL.SDTPS_WARMUP_EPOCHS", "1", "SOLVER.MAX_EPOCHS", "2", "MODEL.DROP_PATH", "0"]
PARTS += ["SOLVER.IMS_PER_BATCH", "12", "SOLVER.LOG_PERIOD", "1", "SOLVER.EVAL_PERIOD", "2"]
PARTS += ["SOLVER.OPTIMIZER_NAME", "SGD", "SOLVER.BASE_LR", "0.01", "SOLVER.BACKBONE_LR", "0.01"]
"""Micro-batches, and a warm-up in which SDTPS has no gradient. Adam's first steps are as long where a gradient is
nothing but rounding, and the waiting branch sees these directions; so SGD."""
RANDOM = ["MODEL.DROP_PATH", "0.5", "SOLVER.CHECKPOINT_PERIOD", "2", "SOLVER.LOG_PERIOD", "1"]
RANDOM += ["SOLVER.MAX_EPOCHS", "4", "SOLVER.EVAL_PERIOD", "4"]


def train(config: str, out: Path, opts: list[str], weight: str = "") -> nn.Module:
    """`train_net.main` without attention dropout where nothing shall be random."""
    cfg = load_cfg(config, [*opts, "OUTPUT_DIR", str(out), "TEST.WEIGHT", weight])
    seed_everything(cfg.SOLVER.SEED)
    data = make_dataloader(cfg)
    model = make_model(cfg, num_classes=data.num_classes, num_cameras=data.num_cameras, pretrained=False)
    if cfg.MODEL.DROP_PATH == 0:
        for module in model.modules():
            if isinstance(module, nn.MultiheadAttention):
                module.dropout = 0.0
    optimizer = make_optimizer(cfg, model)
    start = read_start(weight)
    do_train(cfg, model, data, make_loss(cfg, data.num_classes), optimizer, create_scheduler(cfg, optimizer), start)
    return model


def normalise(x: torch.Tensor, weights: torch.Tensor, make: type) -> dict[str, torch.Tensor]:
    """Two training steps and an evaluation through a batch normalisation of 5 channels."""
    torch.manual_seed(0)
    norm = make(5)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = x.clone().requires_grad_()
    for _ in range(2):
        y = norm(x)
    (y.sin() * weights).sum().backward()
    norm.eval()
    found = {"y": y, "x": x.grad, "weight": norm.weight.grad, "bias": norm.bias.grad, "eval": norm(x)}
    return {k: v.detach() for k, v in (found | dict(norm.named_buffers())).items()}


def batch_of_eight() -> tuple[torch.Tensor, torch.Tensor]:
    """Values far from zero, where a variance is easily lost; and what the loss makes of each."""
    generator = torch.Generator().manual_seed(1)
    return 100 + torch.randn(8, 5, generator=generator), torch.randn(8, 5, generator=generator)


def triplets(joined: bool) -> tuple[int, list[str], list[torch.Tensor]]:
    """Of two heads' features of 12 samples: of how many the loss computed distances here, the operations that the
    compiler took, and what it found: triplet losses and their gradient."""
    features = torch.randn(2, 12, 7, generator=torch.Generator().manual_seed(2), requires_grad=True)
    pid = torch.arange(12) // 3
    output = SimpleNamespace(
        features=dict(zip("ab", features, strict=True)), logits=dict.fromkeys("ab", torch.zeros(12, 4))
    )
    with mock.patch.object(torch, "cdist", side_effect=torch.cdist) as cdist:
        ReIDLoss(4)(output, pid, 1, (output.features, pid) if joined else None)
    (call,) = cdist.call_args_list
    operations = []

    def note(graph, inputs):
        parts = [part for part in graph.modules() if isinstance(part, torch.fx.GraphModule)]
        operations.extend(str(node.target) for part in parts for node in part.graph.nodes)
        return graph.forward

    losses = torch.compile(triplet_loss, backend=note)(features, pid, joined=joined)
    return call.args[0].shape[-2], operations, [losses.detach(), *torch.autograd.grad(losses.sum(), features)]


def guard_of_a_bad_rank(bad_rank: int) -> str:
    """A loss that is not finite on one rank: what every rank says of it, and whether its weights moved."""
    model = nn.Linear(3, 1)
    before = model.weight.clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    guard = FiniteGuard(model, optimizer, torch.amp.GradScaler("cpu", enabled=False))
    model(torch.ones(1, 3)).sum().backward()
    bad = torch.tensor(float("nan") if distributed.rank() == bad_rank else 1.0)
    guard.step(7, {"loss": torch.tensor(1.0), "id/ori": bad}, guard.gradient_norms())
    assert torch.equal(model.weight, before)
    try:
        guard.raise_if_bad()
    except NonFiniteError as error:
        return str(error)
    return ""


def refusal(config: str, *opts: str) -> str:
    try:
        make_dataloader(load_cfg(config, opts))
    except UserError as error:
        return str(error)
    return ""


def stopped(config: str, out: Path, weight: str) -> str:
    """Goes on, and asks rank 1 alone to stop in the second step."""
    asked = interrupt.StopRequest.agreed
    calls = []

    def agreed(self):
        calls.append(1)
        if len(calls) == 2 and distributed.rank() == 1:
            self.requested = 15
        return asked(self)

    interrupt.StopRequest.agreed = agreed
    try:
        train(config, out, RANDOM, weight)
    except Interrupted as interrupted:
        return str(interrupted)
    finally:
        interrupt.StopRequest.agreed = asked
    return ""


def main(rank: int, world_size: int, port: int, folder: Path, config: str) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, world_size, rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=60))
    found: dict = {}
    x, weights = (t.chunk(world_size)[rank] for t in batch_of_eight())
    found["norm"] = normalise(x, weights, SyncedBatchNorm1d)

    torch.manual_seed(rank)
    network = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2), nn.Linear(2, 4))
    nn.init.normal_(network[1].weight)
    found["start"] = [p.detach() for p in parallel(network).parameters()]

    meters = Meters()
    meters.update({"a": torch.tensor(1.0 + 2 * rank), "b": torch.tensor(float("nan") if rank else 5.0)})
    found["meters"] = meters.read()
    found["alike"] = gather_alike(torch.arange(3) + 10 * rank)
    found["average"] = {name: value.item() for name, value in average({"a": torch.tensor(1.0 + 2 * rank)}).items()}
    found["triplets"] = triplets(joined=True)
    found["guard"] = guard_of_a_bad_rank(1)
    found["refusal"] = refusal(
        config, "SOLVER.IMS_PER_BATCH", "15", "SOLVER.ACCUMULATION", "5", "DATALOADER.NUM_INSTANCE", "1"
    )

    model = train(config, folder / "equal", EQUAL)
    found["equal"] = model.state_dict()
    cfg = load_cfg(config, [*EQUAL, "TEST.IMS_PER_BATCH", "4"])
    result = evaluate(cfg, model, make_dataloader(cfg, train=False).val, pictures=3)
    found["evaluation"] = [result.metrics, result.statistics, result.pictures]
    found["parts"] = train(config, folder / "parts", PARTS).state_dict()

    with mock.patch.object(CheckpointWriter, "busy", rank == 0):  # all ranks do as the one that writes
        train(config, folder / "whole", RANDOM)
    found["drawn"] = torch.rand(3)
    found["stopped"] = stopped(config, folder / "halves", f"{folder}/whole/DeMo_2.pth")
    train(config, folder / "halves", RANDOM, f"{folder}/halves/last.pth")
    train(config, folder / "from_one", RANDOM, f"{folder}/one/DeMo_2.pth")
    torch.save(found, folder / f"rank_{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    number, size, port, folder, config = sys.argv[1:]
    main(int(number), int(size), int(port), Path(folder), config)
