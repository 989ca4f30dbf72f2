"""A real Slurm cluster of two nodes on loopback: https://slurm.schedmd.com/slurm.conf.html."""

import getpass
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self, TypeVar

import psutil
import pytest

from tests.packages import install
from tests.project import environment, run
from tests.server import free_port

# Programs by Debian package. Where no init system runs, to install them starts no service.
NEEDED = {"sbatch": "slurm-client", "munged": "munge", "slurmctld": "slurmctld", "slurmd": "slurmd"}
NODES = ("n1", "n2")
UNENDED = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING"}
PATIENCE = 180  # seconds: a time limit is looked at every 30

CONFIGURATION = """
ClusterName=instep
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
MailProg=/bin/true
# A job that is requeued waits for a second longer than credentials last.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
# No cgroups, which a container may lack and two clusters would share. So what has lost its parent
# outlives its job, and a job that takes too much memory is FAILED, not OUT_OF_MEMORY.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=1
JobAcctGatherParams=OverMemoryKill
PropagateResourceLimits=NONE
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerNode=4000
SchedulerParameters=bf_interval=1,sched_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=5
MinJobAge=86400
# A node that is gone is down after 19 seconds; one that is only slow, as tests run beside, is not.
SlurmdTimeout=10
MessageTimeout=5
ReturnToService=2
# Nodes promise more than the machine has.
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=DEFAULT CPUs=8 RealMemory=16000 Gres=gpu:2
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={n1}
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={n2}
PartitionName=gpu Nodes=n1,n2 Default=YES
PartitionName=cpu Nodes=n1,n2
PartitionName=urgent Nodes=n1,n2 PriorityTier=2
"""
GPUS = "Name=gpu File=/dev/null,/dev/zero\n"  # any two devices

Reached = TypeVar("Reached")


class Cluster:
    """Slurm's controller and the nodes n1 and n2, all of them on this machine, from idle on.

    `sbatch` and its like find it by `environment`. A job that names no partition is in gpu, which
    shares its nodes with cpu; one in urgent takes them from both. All files are in `folder`, with
    what each daemon says in its name.out.
    """

    def __enter__(self) -> Self:
        if os.geteuid() != 0:
            pytest.skip("Slurm's daemons, and to install them, need root")
        install(NEEDED, "--no-install-recommends")
        self._temporary = tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True)
        self.folder = Path(self._temporary.name)
        self.folder.chmod(0o755)  # MUNGE refuses a socket that not everybody can come to
        self.environment = {"SLURM_CONF": str(self.folder / "slurm.conf")}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._configure()
        try:
            self._start_munge()
            self._start("slurmctld", "slurmctld", "-D", "-i")
            for name in NODES:
                self.start_node(name)
            self.wait_until(lambda: self.nodes() == dict.fromkeys(NODES, "idle"))
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run one of Slurm's commands, or one that uses them, in the cluster's folder."""
        return run([*command], self.folder, check, **self.environment)

    def submit(self, script: str, *options: str) -> str:
        """The number of a new job, which runs these lines of bash in the cluster's folder."""
        path = self.folder / "script.sh"
        path.write_text(f"#!/bin/bash\n{script}\n")
        return self.run("sbatch", "--parsable", *options, str(path)).stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """JobState, Reason, ExitCode and all else of a job, which Slurm forgets after a day."""
        return _fields(self.run("scontrol", "--oneliner", "show", "job", number).stdout)

    def jobs(self) -> list[dict[str, str]]:
        """All jobs, as `job` has each."""
        lines = self.run("scontrol", "--oneliner", "show", "job").stdout.splitlines()
        return [_fields(line) for line in lines]

    def output(self, number: str) -> str:
        """What a job has printed so far."""
        path = Path(self.job(number)["StdOut"])
        return path.read_text() if path.exists() else ""

    def wait(self, number: str, state: str) -> dict[str, str]:
        """The job once it is in this state; an AssertionError where it has ended in another."""

        def reached() -> dict[str, str] | None:
            job = self.job(number)
            return job if job["JobState"] not in UNENDED - {state} else None

        job = self.wait_until(reached)
        assert job["JobState"] == state, f"{job}\n{self.output(number)}"
        return job

    def wait_until(self, reached: Callable[[], Reached | None]) -> Reached:
        """The first value that is not false or None.

        Raises:
            AssertionError: a daemon has ended, or PATIENCE; with all that was said.
        """
        end = time.monotonic() + PATIENCE
        while not (value := reached()):
            alive = all(daemon.poll() is None for daemon in self._daemons.values())
            if not alive or time.monotonic() > end:
                said = [f"{path.name}:\n{path.read_text()}" for path in self.folder.glob("*.out")]
                raise AssertionError("\n".join(said))
            time.sleep(0.1)
        return value

    def nodes(self) -> dict[str, str]:
        """Each node's state as `sinfo` says it; none while the controller can't be asked."""
        asked = ("--noheader", "--Node", "--partition=gpu", "--format=%N %T")
        told = self.run("sinfo", *asked, check=False)
        return {} if told.returncode else dict(line.split() for line in told.stdout.splitlines())

    def start_node(self, name: str) -> None:
        """Start a node that isn't running."""
        (self.folder / name).mkdir(exist_ok=True)
        self._start(name, "slurmd", "-D", "-N", name)

    def kill_node(self, name: str) -> None:
        """End all that runs on a node, as a loss of power would.

        Its daemons go first, lest one tells how its job has ended. Those of steps are no children
        of the node's, but work where it does. All that they have started knows the node's name,
        also what has lost its parent.
        """
        self._kill(name)
        place = str(self.folder / name)
        known = {**self.environment, "SLURMD_NODENAME": name}.items()
        _kill_all(lambda process: process["cwd"] == place)
        _kill_all(lambda process: known <= (process["environ"] or {}).items())

    def _configure(self) -> None:
        (self.folder / "state").mkdir()
        host, user = socket.gethostname().partition(".")[0], getpass.getuser()
        ports = {name: free_port() for name in ("port", *NODES)}
        text = CONFIGURATION.format(host=host, user=user, folder=self.folder, **ports)
        Path(self.environment["SLURM_CONF"]).write_text(text)
        (self.folder / "gres.conf").write_text(GPUS)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)

    def _start_munge(self) -> None:
        files = ("key", "log", "pid", "seed")
        options = [f"--{file}-file={self.folder}/munge.{file}" for file in files]
        socket_option = f"--socket={self.folder}/munge.socket"
        self._start("munged", "munged", "--foreground", socket_option, *options)
        self.wait_until((self.folder / "munge.socket").is_socket)

    def _start(self, name: str, *command: str) -> None:
        own = environment(**self.environment)
        own["PATH"] += ":/usr/sbin"
        with (self.folder / f"{name}.out").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                command,
                cwd=self.folder / name if name in NODES else self.folder,
                env=own,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _kill(self, name: str) -> None:
        if daemon := self._daemons.pop(name, None):
            with suppress(ProcessLookupError):
                os.killpg(daemon.pid, signal.SIGKILL)
            daemon.wait()

    def _end(self) -> None:
        self._kill("slurmctld")  # first, as it would act on what is killed next
        for name in NODES:
            self.kill_node(name)
        self._kill("munged")
        self._temporary.cleanup()


def _fields(line: str) -> dict[str, str]:
    return dict(field.split("=", 1) for field in line.split() if "=" in field)


def _kill_all(chosen: Callable[[dict[str, Any]], bool]) -> None:
    """Kill such processes until there are none: one that is killed may just have started others."""
    while left := [one for one in psutil.process_iter(["cwd", "environ"]) if chosen(one.info)]:
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        time.sleep(0.05)
