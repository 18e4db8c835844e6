"""Start and end of a script, alone or as one of the ranks that torchrun started."""

import hashlib
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from types import FrameType
from typing import NoReturn

import torch
import torch.distributed as dist

from utils import cli, distributed
from utils.errors import Interrupted, UserError

GRACE = 10.0
"""Seconds that a rank has, once torchrun ends it, to say why it could not go on by itself."""
SETTLE = 3.0
"""Seconds in which the ranks that are left say so, after one of them was lost."""

BEAT = 5.0
"""Seconds between the signs of life of a rank."""
SILENCE = 20.0
"""Seconds without one after which a rank is lost; work, however long, does not keep it from giving them."""
GO_ON = "Training goes on from its last.pth: give the same command with TEST.WEIGHT <OUTPUT_DIR>/last.pth."

_ended = threading.Event()
_store: dist.Store | None = None
"""Where ranks leave word; it outlives a rank that ends."""


class RankLost(UserError):
    """This rank cannot go on, because another one failed, is gone, or does not answer."""


def launch(main: Callable[[], object], debug: bool = False) -> int:
    """`utils.cli.run`, also for one of several ranks: what went wrong is told once, with the rank that it hit.

    Returns:
        Exit code, see `utils.cli.run`. A rank that fails ends its process here and now.
    """
    if not distributed.is_launched():
        return cli.run(main, debug)
    signal.signal(signal.SIGTERM, _end_soon)
    try:
        code = cli.run(lambda: _as_rank(main), debug, _tell)
    except Exception:  # under --debug
        traceback.print_exc()
        code = cli.EXIT_UNEXPECTED
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)  # torchrun ends the others as soon as one has ended
    _ended.set()
    if code not in (0, 128 + signal.SIGINT, 128 + signal.SIGTERM):
        _end_now(code)
    if distributed.is_joined():
        _leave_together()
    return code


def join_ranks(device: torch.device, patience: float) -> None:
    """Meets the other ranks; does nothing where there is only this process.

    Args:
        device: this rank's, from `engine.device.select_device`.
        patience: seconds without an answer after which a rank counts as lost; messages between cards may take longer,
            as kernels may be compiled before one, and the hosts watch over each other in the meantime.
    """
    if _store is None or distributed.is_joined():
        return
    where, size, wait = distributed.rank(), int(os.environ["WORLD_SIZE"]), distributed.LONGEST_WAIT
    cuda = device.type == "cuda"
    _leave_word("here", "")
    _store.wait([f"here/{r}" for r in range(size)], timedelta(minutes=5))
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=dist.PrefixStore("ranks", _store),
        rank=where,
        world_size=size,
        timeout=wait if cuda else timedelta(seconds=patience),
        device_id=device if cuda else None,
    )
    distributed.control = dist.new_group(backend="gloo", timeout=wait)
    threading.Thread(target=_watch, args=(min(SILENCE, patience),), daemon=True).start()


def _as_rank(main: Callable[[], object]) -> None:
    global _store
    _store = _meet()
    try:
        main()
    except (Interrupted, KeyboardInterrupt):
        raise
    except Exception as error:
        if _is_broken_message(error):
            raise RankLost(_who_is_lost()) from error
        _leave_word("failed", f"{'' if isinstance(error, UserError) else type(error).__name__ + ': '}{error}")
        raise


def _meet() -> dist.Store:
    address = f"{os.environ.get('MASTER_ADDR', '')}:{os.environ.get('MASTER_PORT', '')}"
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(minutes=5)))
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"rank {distributed.rank()} cannot meet the others at {address} (MASTER_ADDR, MASTER_PORT): {reason}. If "
            "the port is in use, give torchrun another one: --rdzv_endpoint <host>:<port>, or --standalone on one "
            "machine."
        ) from error
    return store


def _is_broken_message(error: Exception) -> bool:
    """Whether an error came from sending to or waiting for the other ranks."""
    told = str(error)
    signs = ("gloo", "NCCL", "Gloo", "Operation timed out", "Connection closed by peer", "Broken pipe")
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and any(s in told for s in signs))


def _who_is_lost() -> str:
    """What the other ranks left word of; those that left none within a moment are lost."""
    me, size = distributed.rank(), int(os.environ["WORLD_SIZE"])
    _leave_word("stranded", "")
    time.sleep(SETTLE)
    others = [r for r in range(size) if r != me]
    if failed := [(r, _read_word("failed", r)) for r in others if _has_word("failed", r)]:
        for _, text in failed:
            _first_to_tell(text)
        return "; ".join(f"rank {r} failed: {text}" for r, text in failed) + f"\n{GO_ON}"
    lost = [str(r) for r in others if not _has_word("stranded", r)]
    who = f"rank {', '.join(lost)}" if lost else "the connection to another rank"
    return f"{who} was lost: it ended without a word, as when killed, or did not answer in time. {GO_ON}"


def _tell(text: str) -> None:
    """Prints a message of this rank, unless another rank has said the same; the main rank comes first."""
    me = distributed.rank()
    if me:
        time.sleep(1)
    if _first_to_tell(text.removeprefix("error: ")):
        print(text if me == 0 else f"rank {me}: {text}", file=sys.stderr, flush=True)


def _watch(patience: float) -> None:
    """In a thread of its own: beats for this process, and ends it once another one has not beaten for `patience`
    seconds. So a process that is stopped, or a machine that is gone, is noticed whatever the others wait for."""
    others = [r for r in range(distributed.world_size()) if r != distributed.rank()]
    seen = {r: (0, time.monotonic()) for r in others}
    beat = 0
    while not _ended.wait(min(BEAT, patience / 3)):
        beat += 1
        _leave_word("beat", str(beat))
        now = time.monotonic()
        for r in others:
            count = int(_read_word("beat", r) or 0)
            if count != seen[r][0]:
                seen[r] = count, now
        silent = [str(r) for r, (_, when) in seen.items() if now - when > patience]
        if silent and not _ended.is_set():
            _tell(f"error: rank {', '.join(silent)} was lost: no sign of life for {patience:g} s. {GO_ON}")
            _end_now(cli.EXIT_BAD_INPUT)


def _end_now(code: int) -> NoReturn:
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a regular end would wait for messages that never come


# words left in the store: it may be gone, with the machine that kept it


def _leave_word(kind: str, text: str) -> None:
    try:
        if _store is not None:
            _store.set(f"{kind}/{distributed.rank()}", text)
    except RuntimeError:
        pass


def _has_word(kind: str, rank: int) -> bool:
    try:
        return _store is not None and _store.check([f"{kind}/{rank}"])
    except RuntimeError:
        return False


def _read_word(kind: str, rank: int) -> str:
    return _store.get(f"{kind}/{rank}").decode() if _store is not None and _has_word(kind, rank) else ""


def _first_to_tell(text: str) -> bool:
    try:
        return _store is None or _store.add(f"told/{hashlib.sha1(text.encode()).hexdigest()}", 1) == 1
    except RuntimeError:
        return True


def _end_soon(signum: int, frame: FrameType | None) -> None:
    """SIGTERM outside of training: torchrun ends the ranks that are left when one has failed, which they must tell."""
    timer = threading.Timer(GRACE, os._exit, [128 + signum])
    timer.daemon = True
    timer.start()


def _leave_together() -> None:
    try:
        distributed.barrier()
        dist.destroy_process_group()
    except RuntimeError:
        pass  # the work is done
