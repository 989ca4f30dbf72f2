"""Valid files are mutated by a seed, and a door must refuse each by a message, or be right.

A module of this folder is a door: `python -m tests.fuzz.images --cases 2000`. It prints a tally,
and fails where anything else happened, with the number of the case, which `--first` repeats.
"""

import argparse
import faulthandler
import os
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from io import BytesIO
from types import FrameType
from typing import Any

import numpy as np
from PIL import Image

from pipeline.errors import InputError

Rng = np.random.Generator
RIGHT, REFUSED, ELSE = "accepted and right", "refused with a message", "anything else"
LONGEST = 30  # seconds of one case
VALUES = (None, True, -1, 0, 1, 255, 2**31, 2**70, 0.5, "", "train", "../x", "\x1b", [], [0], {})


def mutated(content: bytes, rng: Rng) -> bytes:
    """The content with one to three changes: bits, bytes, numbers, parts moved, lost or added."""
    data = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        place = int(rng.integers(0, len(data) + 1))
        length = int(2 ** rng.uniform(0, 9))
        match rng.integers(0, 8):
            case 0 | 1 if place < len(data):
                data[place] ^= 1 << int(rng.integers(0, 8))
            case 2:
                number = int(rng.choice([0, 1, 255, 65535, 2**31 - 1, 2**32 - 1]))
                data[place : place + 4] = number.to_bytes(4, ("little", "big")[rng.integers(2)])
            case 3:
                data[place : place + length] = rng.bytes(length)
            case 4:
                data[place:place] = rng.bytes(length)
            case 5:
                del data[place : place + length]
            case 6:
                other = int(rng.integers(0, len(data) + 1))
                data[place:place] = data[other : other + length]
            case _:
                del data[place:]
    return bytes(data)


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


def forge(tree: Any, rng: Rng) -> None:
    """Give another value to something that lies somewhere in a tree of JSON, or take it away."""
    place: Any = tree
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = keys[int(rng.integers(len(keys)))]
        inner = place[key]
        if not isinstance(inner, dict | list) or not inner or rng.random() < 0.1:
            break
        place = inner
    match rng.integers(0, 4):
        case 0:
            del place[key]
        case 1 if isinstance(inner, int):
            place[key] = inner + int(rng.integers(-3, 4))
        case _:
            place[key] = VALUES[int(rng.integers(len(VALUES)))]


def main(attempt: Callable[[Rng], str]) -> None:
    """Try cases as the command line says, and print the tally.

    `attempt(rng)` opens the door once. It says how the file was accepted, mostly RIGHT, or raises
    what the door raises; an AssertionError says that the result was wrong.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    faulthandler.enable(os.dup(sys.stderr.fileno()))
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # what libraries print
    signal.signal(signal.SIGALRM, _too_long)
    tally = Counter({RIGHT: 0, REFUSED: 0, ELSE: 0})
    for number in range(options.first, options.first + options.cases):
        try:
            signal.alarm(LONGEST)
            tally[attempt(np.random.default_rng(number))] += 1
        except InputError as error:
            tally[REFUSED if str(error) else ELSE] += 1
        except Exception:
            tally[ELSE] += 1
            print(f"case {number}:\n{traceback.format_exc()}", flush=True)
        finally:
            signal.alarm(0)
    print(", ".join(f"{what}: {count}" for what, count in tally.items()))
    sys.exit(tally[ELSE] > 0)


def _too_long(signum: int, frame: FrameType | None) -> None:
    raise TimeoutError(f"more than {LONGEST} s")
