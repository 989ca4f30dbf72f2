"""What the numbers of a run are called in MLflow."""

import hashlib
import re
from functools import lru_cache

NAME_LENGTH = 250  # the longest name that MLflow takes


def curve_of(name: str) -> str | None:
    """What a number of the history is called in MLflow, whose page of charts it must not crowd.

    Of the scores of single classes the IoU alone is there, apart from the others; how fast the
    training is stands beside the machine's load.
    """
    if name == "iteration":
        return None
    section, _, score = name.partition("/")
    if section == "time":  # beside the machine's load, on a page of its own
        return f"system/{score}"
    kind, dot, of = score.partition(".")
    if not dot:
        return name
    return f"{section}/{kind}/{of}" if kind == "iou" else None


@lru_cache(maxsize=10_000)  # for every point again
def metric_name(name: str) -> str:
    """The name as MLflow takes it: another for every other name, and most of them unchanged.

    A character that MLflow refuses becomes its number between colons, `a|b` -> `a:7c:b`; so do a
    colon, and slashes and dots where MLflow, which takes a name for a path, refuses the path:
    `/a`, `a//b`, `a/`, `a/../b`. Of a name that is too long, the end becomes the md5 of the whole.
    """
    refused = r"[^\w\-./ ]|(?<![^/])/|/\Z|(?<![^/])\.(?=\.?(?:/|\Z))|\A\.(?=\.)"
    valid = re.sub(refused, lambda found: f":{ord(found[0]):x}:", name) or "::"
    if len(valid) > NAME_LENGTH:
        digest = hashlib.md5(name.encode("utf-8", "surrogatepass")).hexdigest()
        valid = f"{valid[: NAME_LENGTH - len(digest) - 2]}:{digest}:"
    return valid
