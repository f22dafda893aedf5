"""Joins the ranks that a launcher has started, and exchanges with them, by torch.distributed.

The group is gloo on CPUs and NCCL on CUDA. What ranks say to each other is JSON, in the launcher's store.
Ranks trust each other as far as the network between them is trusted.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore

from lowmem.distributed.exchange import slice_numel
from lowmem.distributed.launch import Launched
from lowmem.distributed.watch import LEAVING_S, SILENT_S, Watch
from lowmem.errors import ConfigError, LowmemError, TrainingError
from lowmem.training.ranks import Ranks

JOIN_S = 300  # within which all ranks must have started
LONG = datetime.timedelta(days=30)  # an exchange waits for the slowest; the watch ends what is in vain


class JoinedRanks(Ranks):
    """This process as one of several. Open it with `joined`."""

    def __init__(self, found: Launched, say: Callable[[str], None]) -> None:
        self.launched, self.rank, self.size = found, found.rank, found.size
        self._calls, self.exchanged_bytes = 0, 0
        again, whole = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), _store_of(found)
        self._store = PrefixStore(f"lowmem/{again}", whole)
        self.watch = Watch(PrefixStore(f"lowmem/{again}", whole.clone()), self.rank, self.size, say)
        self._store.set_timeout(LONG)

    def meet(self) -> None:
        """Waits until all ranks have joined. Raises ConfigError where one does not."""
        until = time.monotonic() + JOIN_S
        while missing := self.watch.missing():
            if time.monotonic() > until:
                raise ConfigError(
                    f"rank {missing[0]} of {self.size}: did not join within {JOIN_S} s; start all ranks with "
                    "torchrun or deepspeed"
                )
            time.sleep(0.05)

    # --------------------------------------------------------------------------------------------------------
    # Words

    def told(self, content: Any = None) -> Any:
        key = f"told/{self._next_call()}"
        if self.leads:
            self._store.set(key, json.dumps(content))
            return content
        return json.loads(self._meet(lambda: self._store.get(key)))

    def gathered(self, content: Any) -> list[Any]:
        key = f"gathered/{self._next_call()}"
        if not self.leads:
            self._store.set(f"{key}/{self.rank}", json.dumps(content))
            return []
        found = [content]
        for rank in range(1, self.size):
            found.append(json.loads(self._meet(lambda rank=rank: self._store.get(f"{key}/{rank}"))))  # type: ignore[misc]
            self._store.delete_key(f"{key}/{rank}")
        return found

    def _next_call(self) -> int:
        """All ranks make the same calls in the same order."""
        self._calls += 1
        return self._calls

    # --------------------------------------------------------------------------------------------------------
    # Tensors

    def open_group(self, device: torch.device) -> None:
        """Makes the group of this device, once."""
        if not dist.is_initialized():
            backend = "nccl" if device.type == "cuda" else "gloo"
            store = PrefixStore("group", self._store)
            self._meet(
                lambda: dist.init_process_group(
                    backend, store=store, rank=self.rank, world_size=self.size, timeout=LONG
                )
            )

    def slices(self, vector: Tensor, senders: int) -> list[Tensor]:
        self.open_group(vector.device)
        each, sends = slice_numel(vector.numel(), self.size), self.rank < senders
        outgoing = vector.new_zeros(each * self.size if sends else 0)
        if sends:
            outgoing[: vector.numel()] = vector
            self.exchanged_bytes += each * (self.size - 1) * vector.itemsize
        incoming = vector.new_empty(each * senders)
        given = [each if sends else 0] * self.size
        taken = [each if rank < senders else 0 for rank in range(self.size)]
        self._meet(lambda: dist.all_to_all_single(incoming, outgoing, taken, given))
        return [incoming[each * sender : each * (sender + 1)] for sender in range(senders)]

    def joined(self, part: Tensor, vector: Tensor) -> None:
        each = part.numel()
        whole = part.new_empty(each * self.size)
        views = [whole[each * rank : each * (rank + 1)] for rank in range(self.size)]
        self._meet(lambda: dist.all_gather(views, part))
        self.exchanged_bytes += each * (self.size - 1) * part.itemsize
        vector.copy_(whole[: vector.numel()])

    def _meet(self, call: Callable[[], Any]) -> Any:
        """Makes a call that others take part in. If one of them has died, the watch ends this process."""
        try:
            return call()
        except RuntimeError as problem:
            self.watch.wait_until_others_left(SILENT_S + LEAVING_S)
            raise TrainingError(f"rank {self.rank}: an exchange failed: {problem}") from None

    def close(self) -> None:
        self.watch.end()
        if dist.is_initialized():
            dist.destroy_process_group()


def _store_of(found: Launched) -> Any:
    """The launcher's store, or rank 0's. It waits in short turns, so that an interrupt is heard."""
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    holds = found.leads and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    until, turn = time.monotonic() + JOIN_S, datetime.timedelta(seconds=2)
    while True:
        try:
            options: dict[str, Any] = {"timeout": turn, "wait_for_workers": False, "multi_tenant": True}
            return dist.TCPStore(host, int(port), found.size, holds, **options)  # type: ignore[attr-defined]
        except (RuntimeError, ValueError) as problem:
            if holds or time.monotonic() > until or not port.isdecimal():
                raise ConfigError(
                    f"rank {found.rank} of {found.size}: cannot join the others at {host}:{port} "
                    f"({problem}); start all ranks with torchrun or deepspeed"
                ) from None
        time.sleep(0.2)


@contextlib.contextmanager
def joined(found: Launched, say: Callable[[str], None]) -> Iterator[JoinedRanks]:
    """Joins the other ranks until the end of the block, and tells them how it ended.

    `say` prints why a rank ends all others.
    """
    ranks = JoinedRanks(found, say)
    watch = ranks.watch
    try:
        ranks.meet()
        yield ranks
        watch.leave("done")
        if ranks.leads:
            watch.wait_until_others_left()
        ranks.close()
    except KeyboardInterrupt:  # by the user, or by the launcher because a rank has died: the watch finds out
        watch.leave("interrupted", code=130)
        missing = watch.missing()
        if missing:
            raise TrainingError(f"rank {missing[0]} did not join; start all ranks again") from None
        watch.wait_until_others_left(SILENT_S + LEAVING_S)
        raise
    except BaseException as problem:
        code = problem.exit_code if isinstance(problem, LowmemError) else 1
        watch.leave("failed", str(problem), code)
        watch.wait_until_others_left(LEAVING_S + 1)
        raise
