"""The stages of the pipeline: each file is one, `python -m stages.<name>`, as dvc.yaml has it.

What torch is to do on the CPU it reads from the environment, once, when it is imported; what stands
there already is left. A thread of OpenMP that has nothing to do sleeps: by default it spins for a
while, and beside another busy process that makes a training up to ten times slower. Memory comes in
huge pages, where the system has some (Linux): a batch is then made with a tenth of the page faults.
"""

import ctypes
import gc
import os
import sys
from collections.abc import Callable

from pipeline.errors import InputError, shown

os.environ.setdefault("OPENCV_LOG_LEVEL", "ERROR")  # of a broken file we say it, with its name
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


def keep_freed_memory() -> None:
    """Have glibc's malloc keep what is freed (Linux).

    It gives large blocks back to the system at once, and a training step would then ask for all of
    its activations anew, page by page.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(M_MMAP_MAX, 0)
        library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def run_main(main: Callable[[], None]) -> None:
    """Run a stage or command to its end; an InputError is said alone, with exit code 1.

    Its objects are then kept from the garbage collector, which would look for cycles in all that
    torch and MLflow have made, a second long, in a process that ends.
    """
    try:
        main()
    except InputError as error:
        sys.exit("error: " + "\n".join(map(shown, str(error).split("\n"))))
    finally:
        gc.freeze()
