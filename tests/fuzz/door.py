"""Valid files are broken by a seed, and a door must refuse each by a message, or be right.

A module of this folder is a door: `python -m tests.fuzz.images --cases 2000`. It prints a tally,
and fails where anything else happened, with the number of the case: the same number makes the same
case again (`--first 17 --cases 1`).

A message is judged as `stages.run_main` prints it: a door may quote what a terminal obeys, which is
escaped there.
"""

import argparse
import copy
import faulthandler
import json
import os
import resource
import select
import shutil
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

from pipeline.errors import InputError, shown

LIMIT = 20.0  # seconds that a case may take
MEMORY = 2 * 2**30  # bytes that a case may add to what its process has
LINES = 30  # of a message
RIGHT, REFUSED, ELSE = "accepted and right", "refused with a message", "anything else"
NUMBERS = (0, 1, 255, 65535, 2**31 - 1, 2**32 - 1)
VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 3, 255, 2**31, 2**70, 10**30, 0.5, 1e308, float("nan"), "", " ",
    "\0", "\x1b", "\ud800", "é", "x" * 5000, "train", "../x", [], [[]], [0], [1, 2], {}, {"": None},
]  # fmt: skip
Attempt = Callable[[Random, Path], str]


def main(attempt: Attempt) -> None:
    """Try cases as the command line says, and print the tally.

    `attempt` opens the door once, in an empty folder of its own. It says how the file was accepted,
    mostly RIGHT, or raises an InputError, which refuses it; anything that it raises else, such as
    an AssertionError where the result was wrong, is a fault.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    tally = Counter({RIGHT: 0, REFUSED: 0, ELSE: 0})
    with TemporaryDirectory(prefix="instep-fuzz-") as root:
        cases = range(options.first, options.first + options.cases)
        for case, kind, text in _tried(attempt, cases, Path(root)):
            tally[kind] += 1
            if kind == ELSE:
                print(f"case {case}: {text}", flush=True)
    counts = ", ".join(f"{kind}: {count}" for kind, count in tally.items())
    print(f"{Path(sys.argv[0]).stem}: {counts}")
    sys.exit(tally[ELSE] > 0)


def _tried(attempt: Attempt, cases: range, root: Path) -> Iterator[tuple[int, str, str]]:
    """How each case ended. A process does them; where it hangs or dies, another one goes on."""
    while cases:
        reading, writing = os.pipe()
        process = os.fork()
        if process == 0:
            _work(attempt, cases, root, writing)
        os.close(writing)
        try:
            for line in _lines(reading):
                yield (cases[0], *json.loads(line))
                cases = cases[1:]
        finally:
            os.close(reading)
            os.kill(process, signal.SIGKILL)
            _, status = os.waitpid(process, 0)
        if cases:
            code = os.waitstatus_to_exitcode(status)
            hung = code == -signal.SIGKILL
            yield cases[0], ELSE, f"no end within {LIMIT:g} s" if hung else f"it died of {code}"
            cases = cases[1:]


def _lines(reading: int) -> Iterator[bytes]:
    """What the process says, until it ends or says nothing for too long."""
    rest = b""
    while select.select([reading], [], [], LIMIT)[0]:
        found = os.read(reading, 65536)
        if not found:
            return
        *whole, rest = (rest + found).split(b"\n")
        yield from whole


def _work(attempt: Attempt, cases: range, root: Path, writing: int) -> None:
    """Do cases, and end. Of what libraries print only the stack of a crash is let through."""
    try:
        faulthandler.enable(os.dup(sys.stderr.fileno()))
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        for case in cases:
            folder = root / str(case)
            folder.mkdir()
            told = _judged(attempt, Random(case), folder)
            os.write(writing, json.dumps(told).encode() + b"\n")
            shutil.rmtree(folder)
    finally:
        os._exit(1)


def _judged(attempt: Attempt, rng: Random, folder: Path) -> tuple[str, str]:
    try:
        return attempt(rng, folder), ""
    except InputError as error:
        text = _printed(str(error))
    except BaseException:
        return ELSE, _printed(traceback.format_exc(limit=-3)[-2000:])
    lines = text.split("\n")
    clear = text.strip() and len(lines) <= LINES and "weights_only" not in text
    if clear and all(line.isprintable() for line in lines):
        return REFUSED, ""
    return ELSE, f"an unclear message: {text[:2000]}"


def _printed(text: str) -> str:
    return "\n".join(map(shown, text.split("\n")))


def anywhere(content: Sequence[int], rng: Random) -> int:
    """A place in the content, or its end."""
    return rng.randint(0, len(content))


def mutated(
    content: bytes,
    rng: Random,
    *,
    pieces: Sequence[bytes] = (),
    place: Callable[[bytearray, Random], int] = anywhere,
    changes: int = 3,
) -> bytes:
    """The content with up to so many changes: bits, numbers, parts moved, doubled, lost or added.

    `pieces` are what a door wants added, too, and `place` draws where something is changed.
    """
    data = bytearray(content)
    for _ in range(rng.randint(1, changes)):
        start, other, length = place(data, rng), place(data, rng), int(2 ** rng.uniform(0, 9))
        stop = rng.choice([start + length, start + length, max(start, other)])
        match rng.randrange(8):
            case 0 | 1 if start < len(data):
                data[start] ^= 1 << rng.randrange(8)
            case 2:
                number = rng.choice(NUMBERS).to_bytes(4, rng.choice(["little", "big"]))
                data[start : start + 4] = number
            case 3:
                del data[start:stop]
            case 4:
                part = data[start:stop]
                if rng.random() < 0.5:
                    del data[start:stop]
                data[other:other] = part
            case 5 if rng.random() < 0.5:
                del data[start:]
            case _:
                piece = rng.choice([rng.randbytes(length), *pieces])
                data[start : start + rng.choice([0, len(piece)])] = piece
    return bytes(data)


def forge(
    tree: Any,
    rng: Random,
    values: Sequence[Any] = VALUES,
    *,
    names: Sequence[Any] = ("",),
    depth: int = 100,
) -> None:
    """Change something in a tree of dicts and lists: another value or name, or it is taken away.

    A value may lie in up to `depth` lists and dicts; `names` are what a key is called, too.
    """
    places = [(holder, key) for holder, key in places_in(tree) if not isinstance(holder, tuple)]
    top = [(holder, key) for holder, key in places if holder is tree]
    if not top:
        return
    holder, key = rng.choice(top if rng.random() < 0.3 else places)
    value = copy.deepcopy(rng.choice(values))
    match rng.randrange(7):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[rng.choice([f"{key}x", *names])] = holder.pop(key)
        case 2 if isinstance(holder[key], int):
            holder[key] += rng.randint(-3, 3)
        case 3:
            holder[key] = nested(value, rng, rng.choice([1, 5, 30, depth]))
        case _:
            holder[key] = value


def places_in(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every holder in a tree of dicts, lists and tuples, with each of its keys."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield tree, key
        if isinstance(value, dict | list | tuple):
            yield from places_in(value)


def nested(value: Any, rng: Random, depth: int) -> Any:
    """A value in so many lists and dicts."""
    for _ in range(depth):
        value = [value] if rng.random() < 0.5 else {"image": value}
    return value


def encoded(
    images: Iterable[tuple[Image.Image, str, dict[str, Any]]],
) -> list[tuple[str, bytes]]:
    """Each image as a file of a format, by Pillow's options, with the format."""
    found = []
    for image, kind, options in images:
        file = BytesIO()
        image.save(file, kind, **options)
        found.append((kind, file.getvalue()))
    return found
