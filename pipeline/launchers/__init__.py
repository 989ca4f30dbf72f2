"""Where the processes of a stage run: the section `launcher` of params.yaml."""

from typing import Annotated, NamedTuple

from pydantic import Field

from pipeline.params import Few, Named


class Meeting(NamedTuple):
    """Where machines meet that train together, as many as `nodes`."""

    nodes: int = 1
    host: str = "127.0.0.1"
    port: int = 0  # any free one


ALONE = Meeting()


class LauncherParams(Named):
    """What all launchers have in common: that they know where the processes meet."""

    def meeting(self) -> Meeting:
        """By default this machine is alone."""
        return ALONE


class Local(LauncherParams):
    """This machine alone."""


class Torchrun(LauncherParams):
    """Several machines, on each of which somebody or something gives the same command.

    They meet at `endpoint`, host:port: the name or address of one of them that all reach, and a
    free port there.
    """

    nodes: Few
    endpoint: Annotated[str, Field(pattern=r"^[^:]+:[0-9]{1,5}$")]

    def meeting(self) -> Meeting:
        """See LauncherParams."""
        host, _, port = self.endpoint.partition(":")
        return Meeting(self.nodes, host, int(port))


LAUNCHERS: dict[str, type[LauncherParams]] = {"local": Local, "torchrun": Torchrun}
