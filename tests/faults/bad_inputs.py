"""Bad inputs, one row each: what is spoilt, and the words that have to tell it.

Each row goes through train_net.py or test_net.py from the command line on. It has to end within seconds with exit code
2 and one message that names what is wrong, where, and what to do, without a traceback; nothing may be written outside
OUTPUT_DIR, and no program started. The rows of `LOADS` look strange, but have to run. Prints what was told of what was
tried, and ends with exit code 1 if any row fails.

python tests/faults/bad_inputs.py [--only WORDS] [--show]
"""

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent)]

from entry import BASE, TESTS, TRAIN, Case, Ended, run_script  # noqa: E402
from rows_config import COMMAND_LINE, CONFIG, HOSTILE_YAML  # noqa: E402
from rows_data import DATA, LOADS  # noqa: E402
from rows_weights import ATTACKS, ENVIRONMENT, WEIGHTS  # noqa: E402

sys.path[:0] = [str(TESTS)]
from conftest import TINY, write_rgbnt201  # noqa: E402

SECONDS = 20
"""Within which a run has to end."""
TABLE = CONFIG + HOSTILE_YAML + COMMAND_LINE + DATA + WEIGHTS + ATTACKS + ENVIRONMENT


def prepare(folder: Path) -> Path:
    """What the rows share: data, a config, and a run of one epoch. Returns the folder that they are linked from."""
    shared = folder / "shared"
    shared.mkdir(parents=True)
    write_rgbnt201(shared / "data")
    settings = "DATASETS: {NAMES: RGBNT201, ROOT_DIR: data}\nOUTPUT_DIR: out\n"
    (shared / "tiny.yml").write_text(
        TINY.replace("MAX_EPOCHS: 2", "MAX_EPOCHS: 1").replace("WARMUP_ITERS: 1", "WARMUP_ITERS: 0") + settings
    )
    ended = run_script(TRAIN, ["--config_file", "tiny.yml", "OUTPUT_DIR", "run"], shared)
    if ended.code:
        raise RuntimeError(f"the run that all rows start from ended with {ended.code}:\n{ended.out}{ended.err}")
    for path in (shared / "run").iterdir():
        if path.name not in ("last.pth", "config.yml"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return shared


def run_case(case: Case, shared: Path, here: Path) -> Ended:
    """Spoils a folder of its own for one row, and runs it there."""
    shutil.copytree(shared, here, copy_function=os.link)
    yaml = case.yaml if isinstance(case.yaml, bytes) else f"{BASE}{case.yaml}\n".encode()
    (here / "bad.yml").write_bytes(yaml)
    case.spoil(here)
    words = case.argv if case.argv is not None else ("--config_file", "bad.yml", *case.opts.split())
    return run_script(case.script, words, here, case.env, case.as_nobody)


def refusal_fault(case: Case, ended: Ended, here: Path) -> str:
    """What is wrong with how a row ended, in words."""
    if ended.code != 2:
        return f"exit code {ended.code}"
    if "Traceback" in ended.out + ended.err:
        return "a traceback"
    if ended.err.count("error: ") != 1:
        return f"{ended.err.count('error: ')} messages"
    if missing := [word for word in case.words if word not in ended.err]:
        return f"nothing said of {missing}"
    if len(ended.err) > 5000:
        return f"a message of {len(ended.err)} characters"
    return touched(case, ended, here)


def running_fault(case: Case, ended: Ended, here: Path) -> str:
    """What is wrong with how a row ended that had to run."""
    return f"exit code {ended.code}: {ended.err}" if ended.code else touched(case, ended, here)


def touched(case: Case, ended: Ended, here: Path) -> str:
    """What a run wrote or started that it should not have."""
    if (here / "victim").exists() or ended.started:
        return f"a program ran: {ended.started}"
    allowed = [here / name for name in case.writes]
    elsewhere = [path for path in ended.written if not any(path.is_relative_to(place) for place in allowed)]
    elsewhere = [path for path in elsewhere if not path.name.startswith("pymp-")]  # sockets of data workers
    if elsewhere:
        return f"written: {elsewhere}"
    return f"{ended.seconds:.0f} s" if ended.seconds > SECONDS else ""


def try_all(bad: Sequence[Case], good: Sequence[Case], folder: Path) -> Iterator[tuple[Case, Ended, str]]:
    """Each row with how it ended, and what is wrong with that."""
    shared = prepare(folder)
    for number, case in enumerate((*bad, *good)):
        here = folder / f"case-{number}"
        ended = run_case(case, shared, here)
        yield case, ended, (refusal_fault if case in bad else running_fault)(case, ended, here)
        for path in (here, *here.rglob("*")):
            if path.is_dir() and not path.is_symlink():
                path.chmod(0o755)
        shutil.rmtree(here)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="WORDS", help="rows whose name holds this")
    parser.add_argument("--show", action="store_true", help="show every message")
    args = parser.parse_args()
    bad, good = ([case for case in cases if args.only in case.name] for cases in (TABLE, LOADS))
    told = ran = 0
    slowest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        for case, ended, wrong in try_all(bad, good, Path(folder)):
            told += case in bad and not wrong
            ran += case in good and not wrong
            slowest = max(slowest, ended.seconds)
            if wrong:
                print(f"FAILED  {case.name}: {wrong}\n{ended.err or ended.out}", flush=True)
            elif args.show:
                print(f"{case.name} ({ended.seconds:.1f} s)\n{ended.err}", flush=True)
    print(f"told clearly {told} / tried {len(bad)}; odd, but loaded {ran} / tried {len(good)}; at most {slowest:.1f} s")
    return int(told + ran < len(bad) + len(good))


if __name__ == "__main__":
    sys.exit(main())
