"""Two machines on one: network namespaces with addresses of their own, and a slow link between.

The link is a thread that hands packets from one TUN device to the other, each after a
delay, or drops them while it is cut. (The kernel's own delays, netem, are not everywhere.)
"""

import heapq
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from threading import Event, Thread

import pytest

from tests.packages import install

LARGEST = 65536  # bytes of a packet

# What hands the device of a namespace to the process that connects the two.
OPENS = """
import fcntl, os, socket, struct, sys
device = os.open("/dev/net/tun", os.O_RDWR)
fcntl.ioctl(device, 0x400454CA, struct.pack("16sH", b"link", 0x1001))
socket.send_fds(socket.socket(fileno=int(sys.argv[1])), [b"x"], [device])
"""


@dataclass
class Machine:
    """A network namespace, by its name, with the address that the other knows."""

    name: str
    address: str

    def command(self, given: Sequence[str]) -> list[str]:
        """What runs a command there, under the machine's own host name."""
        enter = ["ip", "netns", "exec", self.name, "unshare", "--uts"]
        return [*enter, "sh", "-c", 'hostname "$0" && exec "$@"', self.name, *given]


@dataclass
class Link:
    """What connects two machines, by their devices."""

    machines: tuple[Machine, Machine]
    devices: tuple[int, int]
    delay: float
    cut: Event = field(default_factory=Event)
    ended: Event = field(default_factory=Event)

    def carry(self) -> None:
        """Hand packets on, until the end."""
        waiting: list[tuple[float, int, int, bytes]] = []
        number = count()
        first, second = self.devices
        other = {first: second, second: first}
        while not self.ended.is_set():
            patience = max(0.0, waiting[0][0] - time.monotonic()) if waiting else 0.1
            for device in select.select(self.devices, [], [], patience)[0]:
                packet = os.read(device, LARGEST)
                if not self.cut.is_set():
                    due = time.monotonic() + self.delay
                    heapq.heappush(waiting, (due, next(number), other[device], packet))
            while waiting and waiting[0][0] <= time.monotonic():
                os.write(waiting[0][2], heapq.heappop(waiting)[3])


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, stdin=subprocess.DEVNULL)


@contextmanager
def two_machines(delay: float) -> Iterator[Link]:
    """Two machines with a link between them, of so many seconds of delay in each direction."""
    if os.geteuid() != 0 or not Path("/dev/net/tun").exists():
        pytest.skip("network namespaces and TUN devices need root and /dev/net/tun")
    install({"ip": "iproute2"})
    name, network = f"instep-{os.getpid()}", f"10.93.{os.getpid() % 200}"
    machines = Machine(f"{name}-a", f"{network}.1"), Machine(f"{name}-b", f"{network}.2")
    devices: list[int] = []
    link = None
    try:
        for machine, other in zip(machines, reversed(machines), strict=True):
            ip("netns", "add", machine.name)
            devices.append(device_in(machine))
            inside = ("-n", machine.name)
            ip(*inside, "addr", "add", machine.address, "peer", other.address, "dev", "link")
            ip(*inside, "link", "set", "dev", "link", "up")
            ip(*inside, "link", "set", "lo", "up")
        link = Link(machines, (devices[0], devices[1]), delay)
        carrier = Thread(target=link.carry, daemon=True)
        carrier.start()
        yield link
    finally:
        if link is not None:
            link.ended.set()
            carrier.join()
        for device in devices:
            os.close(device)
        for machine in machines:
            subprocess.run(["ip", "netns", "del", machine.name], check=False)


def device_in(machine: Machine) -> int:
    """A TUN device called `link` in a namespace."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = [sys.executable, "-c", OPENS, str(theirs.fileno())]
        enter = ["ip", "netns", "exec", machine.name]
        subprocess.run([*enter, *command], check=True, pass_fds=[theirs.fileno()])
        _, (device,), *_ = socket.recv_fds(ours, 1, 1)
    return device
