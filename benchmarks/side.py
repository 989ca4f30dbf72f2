"""`python -m benchmarks.side ROW SIDE CASE THREADS`: one side of a case, in either environment.

It says what it runs on when it is ready, and then answers every line of its input with a round.
"""

import importlib
import json
import os
import platform
import resource
import sys
from importlib import metadata
from pathlib import Path

NAMED = ("torch", "numpy", "opencv-python", "mmengine", "mmcv-lite", "mmsegmentation", "timm")


def main(row: str, side: str, case: str, threads: int) -> None:
    """Make the case ready, then obey."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    if side == "ours":
        import stages  # noqa: F401 - it sets the environment of every stage, before torch is there
    limit_threads(threads)
    measure = getattr(importlib.import_module(f"benchmarks.{row}"), side)(case)
    print(json.dumps(versions()), file=answers, flush=True)
    for _ in sys.stdin:
        print(json.dumps(measure()), file=answers, flush=True)


def limit_threads(threads: int) -> None:
    """OMP_NUM_THREADS was set for the process; these have settings of their own."""
    import cv2
    import torch

    torch.set_num_threads(threads)
    cv2.setNumThreads(threads)


def versions() -> dict[str, str]:
    """Python's, and those of the libraries that the figures hang on."""
    found = {"python": platform.python_version()}
    for name in NAMED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def peak() -> float:
    """The most memory that this process has had so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # KiB on Linux


def now() -> float:
    """The memory that this process has at this moment, in MiB (Linux)."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / 2**20


def memory(start: float) -> dict[str, float]:
    """The process's peak, and how far that is above what it had at the start."""
    return {"MiB": peak(), "MiB above start": peak() - start}


if __name__ == "__main__":
    main(*sys.argv[1:4], threads=int(sys.argv[4]))
