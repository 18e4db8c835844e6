"""Ranks that die, hang, fail or are asked to stop under torchrun: does the run end in time, say why, and go on?

python tests/faults/ranks.py            # every case, 3 to 5 minutes on two cores
python tests/faults/ranks.py kill stop  # some
"""

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))

from conftest import TINY, write_rgbnt201  # noqa: E402

LIMIT = 60.0
"""Seconds within which a run has to end."""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def start(config: Path, out: Path, *opts: str) -> subprocess.Popen:
    command = [*TORCHRUN, "--nproc_per_node", "2", "train_net.py", "--config_file", str(config)]
    command += ["OUTPUT_DIR", str(out), "SOLVER.EVAL_PERIOD", "1000", *opts]
    with open(f"{out}.log", "w") as log:
        return subprocess.Popen(
            command, cwd=ROOT, env=ENVIRONMENT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )


def wait_for(pattern: str, log: Path, seconds: float = 90) -> re.Match:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if log.exists() and (match := re.search(pattern, log.read_text())):
            return match
        time.sleep(0.1)
    raise TimeoutError(f"{pattern!r} did not come:\n{log.read_text()}")


def ranks_of(launcher: subprocess.Popen) -> list[int]:
    """Process numbers of the ranks, in their order."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    found = {}
    for child in children:
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        number = [entry for entry in environment if entry.startswith(b"RANK=")]
        if number:
            found[int(number[0][5:])] = int(child)
    return [found[rank] for rank in sorted(found)]


def fault(act: Callable[[subprocess.Popen, list[int], Path], None], told: str, *opts: str):
    """A run of many epochs in which `act` happens after the third; it must end in time, say `told`, and go on."""

    def case(folder: Path, config: Path) -> str:
        out = folder / "run"
        process = start(config, out, "SOLVER.MAX_EPOCHS", "2000", *opts)
        wait_for("Epoch 3 done", Path(f"{out}.log"))
        began = time.monotonic()
        act(process, ranks_of(process), folder)
        process.wait(timeout=LIMIT + 30)
        seconds = time.monotonic() - began
        log = Path(f"{out}.log").read_text()
        assert seconds < LIMIT, f"ended after {seconds:.0f} s\n{log}"
        assert re.search(told, log), f"did not say {told!r}\n{log}"
        out_again = folder / "again"
        opts_again = ("SOLVER.MAX_EPOCHS", "2001", "TEST.WEIGHT", str(out / "last.pth"), *opts)
        restore(folder)
        again = start(config, out_again, *opts_again)
        going_on = wait_for(r"going on from .*last.pth at epoch \d+", Path(f"{out_again}.log"))
        wait_for(r"Epoch \d+ done", Path(f"{out_again}.log"))
        os.killpg(again.pid, signal.SIGTERM)
        again.wait(timeout=LIMIT)
        return f"{seconds:.0f} s; {going_on[0].split(' at ')[1]}; {re.search(told, log)[0]}"

    return case


def kill(number: int, signum: int) -> Callable[[subprocess.Popen, list[int], Path], None]:
    return lambda launcher, ranks, folder: os.kill(ranks[number], signum)


def break_image(launcher: subprocess.Popen, ranks: list[int], folder: Path) -> None:
    """One image in the middle of the run; whichever rank draws it must tell."""
    victim = next((folder / "data" / "RGBNT201" / "train_171" / "NI").iterdir())
    victim.rename(folder / "kept.jpg")
    victim.write_bytes(b"broken")
    (folder / "victim").write_text(str(victim))


def restore(folder: Path) -> None:
    if (folder / "victim").exists():
        (folder / "kept.jpg").rename((folder / "victim").read_text())


def port_in_use(folder: Path, config: Path) -> str:
    """Ranks started by hand, with the port that they shall meet at taken."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        environment = {**ENVIRONMENT, **address, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
        command = [sys.executable, "train_net.py", "--config_file", str(config)]
        ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT)
    assert ended.returncode == 2 and "--rdzv_endpoint" in ended.stderr, ended.stderr
    assert "Traceback" not in ended.stderr, ended.stderr
    return ended.stderr.strip().splitlines()[-1]


CASES = {
    "kill": fault(kill(1, signal.SIGKILL), "rank 1 was lost"),
    "kill main": fault(kill(0, signal.SIGKILL), "rank 0 was lost"),
    "stop": fault(kill(1, signal.SIGSTOP), "rank 1 was lost"),
    "signal to one": fault(kill(1, signal.SIGTERM), r"Stopped after step \d of epoch \d+"),
    "signal to torchrun": fault(lambda p, r, f: os.kill(p.pid, signal.SIGTERM), r"Stopped after step \d of epoch \d+"),
    "signal to all": fault(lambda p, r, f: [os.kill(n, signal.SIGTERM) for n in (*r, p.pid)], "Stopped after step"),
    "broken image": fault(break_image, r"rank \d.*failed: .*\.jpg|error: .*\.jpg"),
    "port in use": port_in_use,
}


def main() -> int:
    chosen = sys.argv[1:] or list(CASES)
    survived = 0
    for name in chosen:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            write_rgbnt201(root / "data")
            config = root / "tiny.yml"
            config.write_text(f"{TINY}DATASETS: {{NAMES: RGBNT201, ROOT_DIR: {root / 'data'}}}\n")
            try:
                told = CASES[name](root, config)
                survived += 1
            except (AssertionError, TimeoutError, subprocess.TimeoutExpired) as error:
                told = f"FAILED: {error}"
        print(f"{name:<20} {told}", flush=True)
    print(f"{survived} of {len(chosen)} faults of ranks ended in time, were told, and went on")
    return survived < len(chosen)


if __name__ == "__main__":
    sys.exit(main())
