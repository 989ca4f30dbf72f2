"""Other values in a YAML file, and its comments still in place."""

import io
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import CommentMark
from ruamel.yaml.representer import RoundTripRepresenter
from ruamel.yaml.tokens import CommentToken


def rewrite(path: Path, change: Callable[[CommentedMap], None]) -> str:
    """The text of a YAML file after a change of its content.

    A line of comment belongs to the key below it and goes with it, and the sections have an empty
    line between them. New lists stand in a line, or in more where it would be long, and null is
    written out: `dvc exp run -S` leaves a line for each item, and nothing for null.
    """
    yaml = YAML()
    yaml.width = sys.maxsize
    yaml.Representer = _Representer
    document: CommentedMap = yaml.load(path)
    foot = _settle(document, [])
    for key in [*document][1:]:
        _, above, beside, _ = document.ca.items[key]
        document.ca.items[key] = [None, above or [_comment("")], beside, None]
    change(document)
    stream = io.StringIO()
    yaml.dump(document, stream)
    text = "".join([stream.getvalue(), *(f"{line}\n" for line in foot)])
    return re.sub(r"(?m)^ *[\w.]+: \[[^#\n]{80,}\](?= #|$)", _broken, text)


class _Representer(RoundTripRepresenter):
    """Writes new lists in a line, and null as `null`."""


_Representer.add_representer(
    list, lambda self, items: self.represent_sequence("tag:yaml.org,2002:seq", items, True)
)
_Representer.add_representer(
    type(None), lambda self, _: self.represent_scalar("tag:yaml.org,2002:null", "null")
)


def _settle(section: CommentedMap, above: list[str], indent: int = 0) -> list[str]:
    """Give each key the lines above it and the comment beside it; returns what stands below all.

    ruamel.yaml keeps lines with the value that they follow, and would lose them with it; and it
    leaves a comment in its column, however short the value has become.
    """
    for key, value in section.items():
        _, before, beside, inside = section.ca.items.get(key, [None, None, None, None])
        above = above + _lines(before)
        text, *below = _lines([beside]) or [""]
        below += _lines(inside)
        if isinstance(value, CommentedMap) and value and not value.fa.flow_style():
            below = _settle(value, below, indent + 2)
            value.ca.comment = None
        elif isinstance(value, CommentedSeq) and value and not value.fa.flow_style():
            above, below = above + below, _cut_below(value)
            value.ca.comment = None
        comments = [_comment(line, indent) for line in above]
        section.ca.items[key] = [None, comments, _comment(text) if text else None, None]
        above = below
    return above


def _cut_below(items: Any) -> list[str]:
    """Take away the lines that stand below a list."""
    last = [*items][-1] if isinstance(items, dict) else len(items) - 1
    if isinstance(items[last], CommentedMap | CommentedSeq) and not items[last].fa.flow_style():
        return _cut_below(items[last])
    for token in items.ca.items.get(last, []):
        if isinstance(token, CommentToken):
            text, *below = _lines([token])
            token.value = f"{text}\n"
            return below
    return []


def _lines(comments: list[CommentToken | None] | None) -> list[str]:
    return [line.strip() for token in comments or [] if token for line in token.value.splitlines()]


def _comment(line: str, indent: int = 0) -> CommentToken:
    return CommentToken(f"{line}\n", CommentMark(indent if line else 0))


def _broken(line: re.Match[str]) -> str:
    """A key and its list in lines of at most 100 columns, of a list of lists each in one."""
    between = r"(?<=\],) " if ": [[" in line[0] else r"(?<=,) "
    items = (item.replace(" ", "\0") for item in re.split(between, line[0]))
    indent = len(line[0]) - len(line[0].lstrip()) + 2
    wrapped = textwrap.fill(
        " ".join(items),
        width=100,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return wrapped.replace("\0", " ")
