"""Where the processes of a stage run: the section `launcher` of params.yaml."""

from typing import Annotated

from pydantic import Field

from pipeline.launchers import slurm
from pipeline.launchers.slurm import Job, JobOfNodes
from pipeline.launchers.torchrun import ALONE, Meeting
from pipeline.params import Few, Named


class LauncherParams(Named):
    """What all launchers have in common: where processes meet, and what becomes a job."""

    @property
    def machines(self) -> int:
        """How many train together."""
        return 1

    def meeting(self) -> Meeting:
        """Where they meet; by default this machine is alone."""
        return ALONE

    def place(self) -> tuple[int, int, str]:
        """Which machine this is of how many that prepare together, and a name of their attempt."""
        return 0, 1, "alone"

    def job(self, stage: str) -> Job | None:
        """As what a stage is submitted; None: it runs here."""
        return None


class Local(LauncherParams):
    """This machine alone."""


class Torchrun(LauncherParams):
    """Several machines, on each of which somebody or something gives the same command.

    They meet at `endpoint`, host:port: the name or address of one of them that all reach, and a
    free port there.
    """

    nodes: Few
    endpoint: Annotated[str, Field(pattern=r"^[^:]+:[0-9]{1,5}$")]

    @property
    def machines(self) -> int:
        """See LauncherParams."""
        return self.nodes

    def meeting(self) -> Meeting:
        """See LauncherParams."""
        host, _, port = self.endpoint.partition(":")
        return Meeting(self.nodes, host, int(port))


class Slurm(JobOfNodes, LauncherParams):
    """The training is a job of Slurm's, and so are `prepare` and `evaluate` where they are given.

    The keys of a job are those of the training.
    """

    prepare: JobOfNodes | None = None
    evaluate: Job | None = None

    def meeting(self) -> Meeting:
        """See LauncherParams; only a job knows it."""
        return slurm.meeting() if self.nodes > 1 else ALONE

    def place(self) -> tuple[int, int, str]:
        """See LauncherParams."""
        return slurm.place() if slurm.in_job() else super().place()

    def job(self, stage: str) -> Job | None:
        """See LauncherParams."""
        if slurm.in_job():
            return None
        return {"prepare": self.prepare, "train": self, "evaluate": self.evaluate}[stage]


LAUNCHERS: dict[str, type[LauncherParams]] = {"local": Local, "torchrun": Torchrun, "slurm": Slurm}
