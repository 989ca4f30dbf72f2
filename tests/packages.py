"""Programs that tests run and that Debian has."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from filelock import FileLock

from pipeline.server import programs


def install(needed: dict[str, str], *options: str) -> None:
    """Have these programs, each of a Debian package, by apt-get with these options.

    Raises:
        AssertionError: some are missing, and why they can't be installed here.
    """
    path = f"{programs()}:/usr/sbin"  # the last is where only root's programs are looked for
    # apt-get refuses to run beside another, which a test in another process may have started.
    with FileLock(Path(tempfile.gettempdir()) / "instep-packages.lock"):
        missing = [name for one, name in needed.items() if not shutil.which(one, path=path)]
        if not missing:
            return
        remedy = " ".join(["apt-get install --yes", *options, *missing])
        if shutil.which("apt-get") is None or os.geteuid() != 0:
            raise AssertionError(f"programs of these tests are missing: run `{remedy}`")
        for command in ("apt-get update", remedy):
            done = subprocess.run(
                command.split(),
                env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
            )
            if done.returncode:
                raise AssertionError(f"`{command}` ended with {done.returncode}:\n{done.stderr}")
