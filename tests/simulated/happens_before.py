"""Finds accesses to the same bytes that nothing orders, by vector clocks.

An agent is a thread of the host or a stream of the card. Its clock says how far it knows every agent to have
come. Work that is given to a stream comes after what its thread knows and after what the stream was given
before. An event carries a stream's clock to whoever waits for it, and queues and futures carry a thread's
clock to whoever takes from them. Two accesses to the same bytes, one of them a write, must be ordered: the
later agent's clock must have reached the earlier access. So a missing wait is found in every run, and not
only where it happens to do harm. (Lamport, "Time, clocks and the ordering of events in a distributed system",
1978; Fidge, "Timestamps in message-passing systems", 1988.)
"""

from __future__ import annotations

import concurrent.futures
import queue
import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

Clock = dict[str, int]
LOCK = threading.RLock()
RACES: list[str] = []


class Access(NamedTuple):
    start: int
    stop: int
    agent: str
    at: int
    writes: bool
    what: str


class Agent:
    """A thread or a stream."""

    def __init__(self, name: str) -> None:
        self.name, self.clock = name, {name: 0}

    def learn(self, clock: Clock) -> None:
        """It knows from now on what that clock says."""
        with LOCK:
            for name, at in clock.items():
                if at > self.clock.get(name, 0):
                    self.clock[name] = at

    def step(self) -> None:
        with LOCK:
            self.clock[self.name] += 1

    def now(self) -> Clock:
        with LOCK:
            return dict(self.clock)


MAIN = Agent(threading.main_thread().name)
_local = threading.local()
_count = iter(range(10**9))


def thread_name() -> str:
    """Of the calling thread. autograd's own threads work while the main thread waits, and count as that."""
    made_by_autograd = isinstance(threading.current_thread(), threading._DummyThread)
    return threading.main_thread().name if made_by_autograd else threading.current_thread().name


def me() -> Agent:
    """The calling thread."""
    name = thread_name()
    if name == MAIN.name:
        return MAIN
    if not hasattr(_local, "agent"):
        _local.agent = Agent(f"{name} {next(_count)}")
    return _local.agent  # type: ignore[no-any-return]


class Memory:
    """The accesses to one piece of memory that a later one must come after."""

    def __init__(self) -> None:
        self.accesses: list[Access] = []

    def access(self, agent: Agent, start: int, stop: int, writes: bool, what: str) -> None:
        if start >= stop:
            return
        with LOCK:
            kept = []
            for old in self.accesses:
                meets = old.start < stop and start < old.stop
                ordered = agent.clock.get(old.agent, 0) >= old.at
                if meets and not ordered and (writes or old.writes):
                    bytes_ = f"bytes {max(start, old.start)} to {min(stop, old.stop)}"
                    RACES.append(
                        f"{what} by {agent.name} does not wait for {old.what} by {old.agent}: {bytes_}"
                    )
                inside = start <= old.start and old.stop <= stop
                replaced = ordered and inside and (writes or not old.writes)
                if not replaced:
                    kept.append(old)
            kept.append(Access(start, stop, agent.name, agent.clock[agent.name], writes, what))
            self.accesses = kept


_memories: dict[int, Memory] = {}


def memory_of(storage: Any) -> Memory:
    """What is known of a torch storage. It is forgotten when the storage is gone."""
    key = storage._cdata
    with LOCK:
        if key not in _memories:
            _memories[key] = Memory()
            weakref.finalize(storage, _memories.pop, key, None)
        return _memories[key]


def known(storage: Any) -> bool:
    with LOCK:
        return storage._cdata in _memories


# ------------------------------------------------------------------------------------------------------------
# What carries a thread's clock to another

raw_result = concurrent.futures.Future.result  # without its clock


def carry_clocks() -> None:
    """Makes queues, executors and futures carry clocks. Once in a process."""
    put, get = queue.Queue.put, queue.Queue.get

    def put_with_clock(self: Any, item: Any, *given: Any, **more: Any) -> None:
        me().step()
        put(self, (item, me().now()), *given, **more)

    def get_with_clock(self: Any, *given: Any, **more: Any) -> Any:
        item, clock = get(self, *given, **more)
        me().learn(clock)
        return item

    executor = concurrent.futures.ThreadPoolExecutor
    submit, shutdown, result = executor.submit, executor.shutdown, concurrent.futures.Future.result
    add_done_callback = concurrent.futures.Future.add_done_callback

    def submit_with_clock(self: Any, call: Callable[..., Any], *given: Any, **more: Any) -> Any:
        me().step()
        clock = me().now()
        ended: list[Clock] = []

        def called() -> Any:
            me().learn(clock)
            try:
                return call(*given, **more)
            finally:
                me().step()
                ended.append(me().now())

        future = submit(self, called)
        future.ended = ended  # type: ignore[attr-defined]
        self.__dict__.setdefault("all_ended", []).append(ended)
        return future

    def shutdown_with_clocks(self: Any, wait: bool = True, **more: Any) -> None:
        shutdown(self, wait, **more)
        if wait:
            for ended in self.__dict__.get("all_ended", ()):
                for clock in ended:
                    me().learn(clock)

    def result_with_clock(self: Any, *given: Any) -> Any:
        try:
            return result(self, *given)
        finally:
            for clock in getattr(self, "ended", ()):
                me().learn(clock)

    def callback_with_clock(self: Any, call: Callable[[Any], object]) -> None:
        def called(future: Any) -> None:
            # Where the future has ended already, the thread that adds the call makes it.
            for clock in getattr(future, "ended", ()):
                me().learn(clock)
            call(future)

        add_done_callback(self, called)

    queue.Queue.put, queue.Queue.get = put_with_clock, get_with_clock  # type: ignore[method-assign]
    executor.submit, executor.shutdown = submit_with_clock, shutdown_with_clocks  # type: ignore[method-assign, assignment]
    concurrent.futures.Future.result = result_with_clock  # type: ignore[method-assign]
    concurrent.futures.Future.add_done_callback = callback_with_clock  # type: ignore[method-assign]
