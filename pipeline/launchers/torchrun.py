"""Starts the processes of a stage by torchrun, and ends as they end."""

import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil

from pipeline.distributed import PATIENCE, free_cores
from pipeline.errors import INTERRUPTED, InputError, one_line
from pipeline.interruption import SAID, said_of, say


class Meeting(NamedTuple):
    """Where machines meet that train together, as many as `nodes`.

    `here` says whether that is this machine; None: if it has the address of `host`.
    """

    nodes: int = 1
    host: str = "127.0.0.1"
    port: int = 0  # any free one
    here: bool | None = None


ALONE = Meeting()
GRACE = 10.0  # seconds that torchrun has for its own end


def hand_over(
    module: str,
    processes: int,
    arguments: Sequence[str] = (),
    *,
    meeting: Meeting = ALONE,
    patience: float = PATIENCE,
) -> bool:
    """Start `python -m module arguments` in that many processes on each machine, and wait for them.

    False where this process is to do the work: it is the only one, or a launcher started it and
    says so in WORLD_SIZE, as torchrun does and whoever starts ranks by hand. A machine from which
    nothing is heard for `patience` seconds, or that does not come for so long, is given up.

    Raises:
        InputError: the place where they meet can't be reached, or not all have come there.
    """
    if "WORLD_SIZE" in os.environ or (processes == 1 and meeting.nodes == 1):
        return False
    address, own, interface = _way_to(meeting)
    here = own == address if meeting.here is None else meeting.here
    logging.disable()  # what torchrun says in pages, we say in a line
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError

    options = [
        f"--nnodes={meeting.nodes}",
        f"--nproc-per-node={processes}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={meeting.host}:{meeting.port}",
        "--rdzv-id=instep",
        # torchrun looks for the host's name among this machine's, where it may not be. It would
        # give up a machine 15 seconds after it was last heard of; those that train wait longer.
        f"--rdzv-conf=is_host={here},join_timeout={patience:.0f},"
        f"read_timeout={patience:.0f},keep_alive_interval={patience:.0f}",
        f"--local-addr={own}",
    ]
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, free_cores() // processes)))
    # Else each process prints frames of C++ where the launcher is killed, and they end in order.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    # torchrun hands signals on to its processes, but not this one.
    signal.signal(signal.SIGUSR1, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    said = Path(tempfile.mkdtemp(prefix="instep-")) / "said"
    os.environ[SAID] = str(said)
    done = threading.Event()
    threading.Thread(target=_end_without_ranks, args=(done,), name="ranks", daemon=True).start()
    try:
        run.main([*options, "-m", module, *arguments])
    except SignalException as ended:
        for child in psutil.Process().children():  # left over by a second signal alone
            child.kill()
        if not said.exists():  # the first process was done, or had not begun
            say(said_of(ended.sigval))
        sys.exit(INTERRUPTED)
    except RendezvousError as error:
        raise InputError(
            f"launcher.nodes: {meeting.nodes}, but they have not all met at {meeting.host}:"
            f"{meeting.port} in {patience:g} s ({one_line(error)}); start the same command on each"
        ) from None
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        killed = [
            f"rank {one} (process {it.pid}) was ended by {it.signal_name()}"
            for one, it in error.failures.items()  # those too that torchrun has ended after it
            if it.exitcode < 0
            and it.exitcode != -signal.SIGTERM
            and it.timestamp <= first.timestamp + 1
        ]
        if killed:
            sys.exit(f"{'; '.join(killed)}; the same command does what is left")
        sys.exit(first.exitcode)
    finally:
        done.set()
        shutil.rmtree(said.parent, ignore_errors=True)
    return True


def _end_without_ranks(done: threading.Event) -> None:
    """End this process where its ranks have ended and torchrun does not.

    It tells the other machines first, and waits for ever where the way there is cut.
    """
    own, seen = psutil.Process(), None
    while seen is None or time.monotonic() - seen < GRACE:
        if done.wait(1):
            return
        with suppress(psutil.NoSuchProcess):
            if any(rank.status() != psutil.STATUS_ZOMBIE for rank in own.children()):
                seen = time.monotonic()
    os._exit(1)


def _way_to(meeting: Meeting) -> tuple[str, str, str]:
    """The address where all meet, this machine's on the way there, and the interface that has it.

    Raises:
        InputError: there is no such machine, no way to it, or this machine alone can go there.
    """
    try:
        address = socket.gethostbyname(meeting.host)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
            way.connect((address, meeting.port or 9))  # nothing is sent
            own = str(way.getsockname()[0])
    except OSError as error:
        raise InputError(
            f"launcher.endpoint: there is no way to {meeting.host} ({one_line(error)}); name a "
            "machine that all of them reach"
        ) from None
    if address.startswith("127.") and meeting.host not in (address, "localhost"):
        raise InputError(
            f"launcher.endpoint: {meeting.host} is {address} here, where no other machine gets to; "
            "give the address that the others know"
        )
    found = [
        name
        for name, addresses in psutil.net_if_addrs().items()
        if any(one.address == own for one in addresses)
    ]
    return address, own, found[0]
