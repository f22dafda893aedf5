"""Finds out whether a launcher has started this process as one of several, and starts a launcher itself.

Launchers (torchrun, DeepSpeed's, and those of clusters) say in the environment which rank a process is. This
module loads without torch.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import socket
import sys
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

from lowmem.errors import ConfigError

MOST_DEVICES = 1024  # on one machine


class Launched(NamedTuple):
    """What the launcher says of this process."""

    rank: int
    size: int
    local_rank: int  # among those of this machine
    local_size: int

    @property
    def leads(self) -> bool:
        return self.rank == 0


def launched() -> Launched | None:
    """None where this process trains alone."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if not all(os.environ.get(name) for name in names) or _number("WORLD_SIZE", 1) == 1:
        return None
    size, rank = _number("WORLD_SIZE", 1), _number("RANK", 0)
    local_size = _number("LOCAL_WORLD_SIZE", _number("LOCAL_SIZE", 1))
    return Launched(rank, size, _number("LOCAL_RANK", 0), local_size)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal() or int(text) > 10**6:
        raise ConfigError(
            f"environment: {name}: found {text!r}; allowed: a whole number; start the ranks with torchrun or "
            "deepspeed, which set it"
        )
    return int(text)


def take_place(found: Launched) -> None:
    """Lets this process see one card, its own, and lets its children see no rank to take. To be called before
    torch looks for cards.
    """
    for name in ("RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    # The store's client would print a trace of its own where the rank that held the store has died.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    visible = [card for card in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if card]
    local = found.local_rank
    os.environ["CUDA_VISIBLE_DEVICES"] = visible[local] if local < len(visible) else str(local)
    os.environ["LOCAL_RANK"] = "0"  # among the cards that it sees


def launch(devices: int, arguments: Sequence[str]) -> NoReturn:
    """Becomes the launcher of so many ranks of this machine. Each runs `lowmem` with these arguments.

    It is DeepSpeed's where that is installed, else torch's. Raises ConfigError.
    """
    if not 2 <= devices <= MOST_DEVICES:
        raise ConfigError(f"--devices: found {devices}; allowed: 1 to {MOST_DEVICES}; change it")
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // devices, 1)))
    command = [sys.executable, "-m", *_launcher(devices), *arguments]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, command, environment)


def _launcher(devices: int) -> list[str]:
    if importlib.util.find_spec("deepspeed") is None:
        return ["torch.distributed.run", "--standalone", f"--nproc_per_node={devices}", "-m", "lowmem"]
    # What `deepspeed` itself starts on one machine, once it has counted the cards. It counts sockets where
    # there are none, and would refuse more ranks than that.
    world = base64.urlsafe_b64encode(json.dumps({"localhost": list(range(devices))}).encode()).decode()
    address = ["--master_addr=127.0.0.1", f"--master_port={_free_port()}"]
    options = [f"--world_info={world}", *address, "--quiet", "--no_local_rank", "--module"]
    return ["deepspeed.launcher.launch", *options, "lowmem"]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port
