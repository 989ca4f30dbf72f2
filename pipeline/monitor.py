"""Which process holds up the others, where several train together.

A process that hangs, or is stopped, would leave the others waiting in a sum over all of them, and
none could tell which it is. So each says, once a second, where it is, by a store that all can read,
and judges what the others say.
"""

import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple, Protocol

log = logging.getLogger("instep")

BEAT = 1.0  # seconds between two looks at each other
FIRST = 120.0  # seconds more for the start, and for the first step: files and kernels are cold
GRACE = 10.0  # seconds that the one who says it has before the others end


class Store(Protocol):
    """What torch.distributed's stores have of it."""

    def set(self, key: str, value: str) -> None: ...
    def multi_get(self, keys: list[str]) -> list[bytes]: ...


class Seen(NamedTuple):
    """What is known of a process.

    `phase` counts the places in the program that all come to, in one order. Seconds: `quiet` since
    it got on with something, as it has said; `silent` since it said anything.
    """

    phase: int
    quiet: float
    silent: float = 0.0
    what: str = ""
    pid: int = 0
    host: str = ""
    done: bool = False


def blocking(seen: Sequence[Seen], patience: float) -> list[int]:
    """The ranks that hold up the others, by what is seen of all; seldom more than one.

    It is who says nothing any more, or else who is where all the others have been already. A
    process that gets on with something may take as long as it needs.
    """
    there = [rank for rank, one in enumerate(seen) if not one.done]
    if len(there) < 2:
        return []
    if gone := [rank for rank in there if seen[rank].silent > patience]:
        return gone
    first = min(seen[rank].phase for rank in there)
    last = [rank for rank in there if seen[rank].phase == first]
    return last if all(seen[rank].quiet > patience for rank in last) else []


class Monitor:
    """Tells the other processes where this one is, and ends it where another holds all up."""

    def __init__(self, store: Store, rank: int, world_size: int, patience: float) -> None:
        self._store, self._rank, self._patience = store, rank, patience
        self._phase = 0
        self._keys = [f"instep/{one}" for one in range(world_size)]
        self.at("the start", FIRST)
        self._heard = [(b"", time.monotonic())] * world_size  # what, and since when
        self._ended, self._done = threading.Event(), False
        self.lost: Callable[[], object] = lambda: None  # called before the end, where it is said
        self._tell()
        self._thread = threading.Thread(target=self._watch, name="monitor", daemon=True)
        self._guard = threading.Thread(target=self._watch_the_watch, name="guard", daemon=True)

    def start(self) -> None:
        """Begin to watch: all have told something by now."""
        self._talked = time.monotonic()
        self._thread.start()
        self._guard.start()

    def at(self, what: str, allowance: float) -> None:
        """This process has come to a place that all come to, with so many seconds more for it."""
        self._phase, self._what = self._phase + 1, what
        self._moved = time.monotonic() + allowance

    def alive(self) -> None:
        """It gets on with what it does there."""
        self._moved = max(self._moved, time.monotonic())

    def close(self, done: bool) -> None:
        """It has done its part, and the others may go on without it; or it has failed."""
        self._done = done
        self._ended.set()
        self._thread.join(GRACE)  # longer where the store can't be reached

    def _tell(self) -> None:
        now = time.monotonic()
        seen = Seen(
            self._phase,
            quiet=now - self._moved,
            what=self._what,
            pid=os.getpid(),
            host=socket.gethostname(),
            done=self._done,
        )
        told = json.dumps({**seen._asdict(), "at": now})  # another each time: a sign of life
        self._store.set(self._keys[self._rank], told)

    def _watch(self) -> None:
        ended = False
        while not ended:
            ended = self._ended.wait(BEAT)
            try:
                self._tell()
                seen = self._look()
            except Exception as error:  # of the store: who keeps it has ended, or is stopped
                if ended or time.monotonic() - self._moved < self._patience:
                    continue
                self._say(f"the processes can't tell each other where they are: {error}")
                os._exit(1)
            else:
                if not ended and (found := blocking(seen, self._patience)):
                    self._end_all(seen, found)

    def _watch_the_watch(self) -> None:
        """End this process where the store has been silent for too long: it has no time-out.

        That is so where the way to the machine that keeps the store is cut.
        """
        while not self._ended.wait(BEAT):
            silent = time.monotonic() - self._talked
            if silent > self._patience + GRACE:
                told = [json.loads(heard).get("host", "") for heard, _ in self._heard if heard]
                others = sorted({*told} - {socket.gethostname()})
                self._say(
                    f"no other process has been heard of for {silent:.0f} s, and there are some on "
                    f"{', '.join(others)}; train.timeout allows {self._patience:g} s"
                )
                os._exit(1)

    def _look(self) -> list[Seen]:
        now, seen = time.monotonic(), []
        for rank, told in enumerate(self._store.multi_get(self._keys)):
            before, since = self._heard[rank]
            if told != before:
                self._heard[rank] = told, since = told, now
            content = json.loads(told)
            del content["at"]
            seen.append(Seen(**content)._replace(silent=now - since))
        self._talked = now
        return seen

    def _end_all(self, seen: Sequence[Seen], found: Sequence[int]) -> None:
        """End this process; the first that is not to blame says who is, and ends that one, too."""
        others = [rank for rank, one in enumerate(seen) if rank not in found and not one.done]
        if self._rank != (others or found)[0]:
            time.sleep(GRACE)
            os._exit(1)
        told = []
        for rank in found:
            one = seen[rank]
            told.append(
                f"rank {rank} (process {one.pid} on {one.host}) has not got on for "
                f"{max(one.silent, one.quiet):.0f} s, at: {one.what}"
            )
        self._say(f"{'; '.join(told)}; train.timeout allows {self._patience:g} s")
        for rank in found:
            if rank != self._rank and seen[rank].host == socket.gethostname():
                with suppress(OSError):  # it is gone
                    os.kill(seen[rank].pid, signal.SIGKILL)
        os._exit(1)

    def _say(self, text: str) -> None:
        log.setLevel(logging.INFO)  # ranks but the first say nothing else
        with suppress(Exception):  # whatever happens here, the process has to end
            log.error("%s; the same command goes on from the last checkpoint", text)
            self.lost()
