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
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path

from pipeline.disk import UNWRITABLE, unwritable
from pipeline.errors import INTERRUPTED, InputError, Interrupted, one_line, shown
from pipeline.interruption import end_by_signals, ignore_signals, raise_by_signals, say

os.environ.setdefault("OPENCV_LOG_LEVEL", "ERROR")  # of a broken file we say it, with its name
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

if sys.argv[0] == "-m":  # this is `python -m stages.<name>`, and importing torch takes seconds
    end_by_signals()

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


def keep_freed_memory() -> None:
    """Have glibc's malloc keep what is freed (Linux).

    It gives large blocks back to the system at once, and a training step would then ask for all of
    its activations anew, page by page.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(M_MMAP_MAX, 0)
        library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def at_least_1(text: str) -> int:
    """An option's whole number, for argparse."""
    number = int(text)
    if number < 1:
        raise ArgumentTypeError(f"{number}, and it must be at least 1")
    return number


def run_main(main: Callable[[], None]) -> None:
    """Run a stage or command to its end; an InputError is said alone, with exit code 1.

    So is what the machine does not let us do, such as to write on a full disk. After SIGTERM,
    Ctrl-C or SIGUSR1 one line says how to go on, and the exit code is INTERRUPTED.

    The objects of a stage that ends are kept from the garbage collector, which would look for
    cycles in all that torch and MLflow have made, a second long.
    """
    raise_by_signals()
    try:
        main()
    except InputError as error:
        sys.exit(_said(error))
    except Interrupted as ended:
        if isinstance(ended.__context__, InputError):  # torchrun ends who has something to say
            sys.exit(_said(ended.__context__))
        if not ended.told:
            say(str(ended))
        sys.exit(INTERRUPTED)
    except RuntimeError as error:
        torch = sys.modules.get("torch")
        if torch is None or not isinstance(error, torch.OutOfMemoryError):
            raise
        sys.exit(
            f"error: the device has too little memory: {one_line(error)}; of an evaluation, lower "
            "evaluation.batch_size, or set evaluation.mode: slide and a smaller evaluation.crop"
        )
    except OSError as error:
        path = error.filename2 or error.filename
        if error.errno in UNWRITABLE:
            sys.exit(f"error: {unwritable(error, Path(str(path or 'a file here')))}")
        if isinstance(error, PermissionError) and path:
            sys.exit(f"error: {path}: permission is denied")
        raise
    finally:
        ignore_signals()
        gc.freeze()


def _said(error: InputError) -> str:
    return "error: " + "\n".join(map(shown, str(error).split("\n")))
