"""Hostile cases through one door, each where it may hang, die or take all memory, and their tally.

A case is known by its number: the same number makes the same case again (`--first 17 --cases 1`).
"""

import argparse
import json
import os
import random
import resource
import select
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import InputError

LIMIT = 20.0  # seconds that a case may take
MEMORY = 2 * 2**30  # bytes that a case may add to what its process has
LINES = 30  # of a message
RIGHT, REFUSED, OTHER = "accepted and right", "refused with a message", "anything else"


class Told(NamedTuple):
    """How a case ended, and the message or the traceback's last line."""

    case: int
    kind: str
    text: str = ""


def run(door: Callable[[int, Path], str], title: str) -> None:
    """Try the cases that the command line asks for; exit with 1 where one is anything else.

    `door` puts a case, by its number, through the door, in a folder of its own. It returns how the
    case was accepted, and raises an InputError for what is refused.
    """
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--cases", type=int, default=2000, metavar="N")
    parser.add_argument("--first", type=int, default=0, metavar="CASE")
    options = parser.parse_args()
    counts: Counter[str] = Counter({RIGHT: 0, REFUSED: 0, OTHER: 0})
    for told in _tried(door, options.first, options.first + options.cases):
        counts[told.kind] += 1
        if told.kind == OTHER:
            print(f"case {told.case}: {told.text}", flush=True)
    print(f"{title}, {options.cases} cases:")
    for kind, count in counts.items():
        print(f"  {kind}: {count}")
    sys.exit(1 if counts[OTHER] else 0)


def _tried(door: Callable[[int, Path], str], case: int, stop: int) -> Iterator[Told]:
    """A forked process does one case after the other; where it hangs or dies, another goes on."""
    while case < stop:
        reading, writing = os.pipe()
        process = os.fork()
        if process == 0:
            os.close(reading)
            _work(door, range(case, stop), writing)
        os.close(writing)
        for line in _lines(reading):
            told = Told(*json.loads(line))
            yield told
            case = told.case + 1
        os.close(reading)
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        if case < stop:
            signalled = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
            hung = signalled == signal.SIGKILL
            how = f"no end within {LIMIT:g} s" if hung else f"the process died of {status}"
            yield Told(case, OTHER, how)
            case += 1


def _lines(reading: int) -> Iterator[bytes]:
    """What the process says, until it ends or says nothing for too long."""
    rest = b""
    while select.select([reading], [], [], LIMIT)[0]:
        found = os.read(reading, 65536)
        if not found:
            return
        *whole, rest = (rest + found).split(b"\n")
        yield from whole


def _work(door: Callable[[int, Path], str], cases: range, writing: int) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for case in cases:
        with tempfile.TemporaryDirectory(prefix="instep-fuzz-") as folder:
            told = _judged(door, case, Path(folder))
        os.write(writing, json.dumps(told).encode() + b"\n")
    os._exit(0)


def _judged(door: Callable[[int, Path], str], case: int, folder: Path) -> Told:
    try:
        return Told(case, door(case, folder))
    except InputError as error:
        text = str(error)
    except BaseException as error:
        return Told(case, OTHER, f"{type(error).__name__}: {str(error)[:300]!r}")
    clear = text.strip() and text.count("\n") < LINES and "weights_only" not in text
    shown = all(part.isprintable() for part in text.split("\n"))
    return Told(case, REFUSED if clear and shown else OTHER, f"an unclear message: {text[:300]!a}")


def places_in(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every holder in a tree of dicts and lists, with each of its keys."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield tree, key
        if isinstance(value, dict | list | tuple):
            yield from places_in(value)


def nested(rng: random.Random, values: Sequence[Any], depths: Sequence[int], key: str) -> Any:
    """One of the values, in as many lists and dicts as one of the depths says."""
    made: Any = rng.choice(values)
    for _ in range(rng.choice(depths)):
        made = [made] if rng.random() < 0.5 else {key: made}
    return made


def equal(one: Any, other: Any) -> bool:
    """Whether two trees of dicts, lists and scalars are equal, of whatever types of number."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)
