"""SIGTERM, Ctrl-C and a scheduler's warning: what is under way is finished, then the process ends.

A signal raises `Interrupted` in the main thread, wherever that is; within `finishing` it only sets
a flag, which the work reads where it can stop.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from pipeline.errors import INTERRUPTED, Interrupted

# The last is what Slurm is told to send before the time limit: sbatch --signal=USR1@60.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
PATIENCE = 20.0  # seconds that the work may go on after a signal: schedulers send SIGKILL after 30
DONE = b"\0"  # no signal has this number
SAID = "INSTEP_SAID"  # what names the file by which a launcher knows that a rank has said its end


class Interruption:
    """`asked` is the first signal that has asked this process to end, None before it."""

    asked: signal.Signals | None = None
    _immediate = False

    def noted(self) -> bool:
        """Whether a signal has come."""
        return self.asked is not None

    @contextmanager
    def immediate(self) -> Iterator[None]:
        """Within the block a signal, also one that has come before it, raises Interrupted."""
        self._immediate = True
        try:
            if self.asked is not None:
                raise Interrupted(said_of(self.asked))
            yield
        finally:
            self._immediate = False

    def receive(self, number: int, frame: FrameType | None) -> None:
        """The handler of all signals."""
        self.asked = self.asked or signal.Signals(number)
        if self._immediate:
            raise Interrupted(said_of(number))


def end_by_signals() -> None:
    """From now on a signal ends the process: there is nothing yet to be finished."""
    for number in SIGNALS:
        signal.signal(number, _end)


def raise_by_signals() -> None:
    """From now on a signal raises Interrupted in the main thread."""
    for number in SIGNALS:
        signal.signal(number, _raise)


def ignore_signals() -> None:
    """From now on a signal changes nothing: all is done and said, and the process is ending."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def unheard_by_children() -> Iterator[None]:
    """A process that this thread starts within the block never gets a signal (POSIX)."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def holding_signals() -> Iterator[None]:
    """Within the block signals wait; a process that it starts never gets them."""
    held: list[int] = []
    handlers = {
        number: signal.signal(number, lambda got, _: held.append(got)) for number in SIGNALS
    }
    try:
        with unheard_by_children():  # not enough: another thread may hear them
            yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if held:
            signal.raise_signal(held[0])


def _end(number: int, frame: FrameType | None) -> None:
    say(said_of(number))
    os._exit(INTERRUPTED)


def _raise(number: int, frame: FrameType | None) -> None:
    raise Interrupted(said_of(number))


def say(text: str) -> None:
    """Put a line on the screen; of several ranks the first does."""
    if _speaks():
        print(text, file=sys.stderr, flush=True)
        remember_said()


def remember_said() -> None:
    """How this rank ends is on the screen, if it is the first: its launcher need not say it."""
    if _speaks() and (path := os.environ.get(SAID)):
        Path(path).touch()


def _speaks() -> bool:
    return os.environ.get("RANK", "0") == "0"


def said_of(number: int) -> str:
    """The line for a signal that has ended a process."""
    return f"ended by {signal.Signals(number).name}; the same command does what is left"


@contextmanager
def finishing(late: Callable[[signal.Signals], None]) -> Iterator[Interruption]:
    """Within the block a signal is only noted, for the block to end where nothing is lost.

    Where it has not ended PATIENCE seconds later, a thread calls `late` with the signal and ends
    the process: the main thread may be waiting inside of torch for a process that is no more. A
    second Ctrl-C ends the process at once. A second SIGTERM does not, as the kernel sends one, too,
    when the parent ends, which the same signal may have ended.

    Raises:
        Interrupted: a signal has come, and the block has ended by itself.
    """
    interruption = Interruption()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def note() -> None:
        asked = _signal(reader)
        if asked is None:
            return
        interruption.asked = interruption.asked or asked
        alarm = threading.Timer(PATIENCE, end, [asked])
        alarm.daemon = True
        alarm.start()
        while (again := _signal(reader)) is not None:
            if again == signal.SIGINT:
                os._exit(128 + again)
        alarm.cancel()

    def end(asked: signal.Signals) -> None:
        try:
            late(asked)
        finally:
            os._exit(INTERRUPTED)

    thread = threading.Thread(target=note, name="signals", daemon=True)
    thread.start()
    descriptor = signal.set_wakeup_fd(writer)
    before = {number: signal.signal(number, interruption.receive) for number in SIGNALS}
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(descriptor)
        os.write(writer, DONE)
        thread.join()
        os.close(reader)
        os.close(writer)
    if interruption.asked is not None:  # all was done; whoever has sent it is to know that it came
        raise Interrupted(said_of(interruption.asked))


def _signal(reader: int) -> signal.Signals | None:
    """The next signal that arrives; None where the block has ended."""
    while (number := os.read(reader, 1)) != DONE:
        if number[0] in SIGNALS:  # not one that somebody else handles, as SIGCHLD
            return signal.Signals(number[0])
    return None
