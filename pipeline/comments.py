"""YAML files as they are read and written again: other values, and the comments still in place."""

import io
import re
import sys
import textwrap
from itertools import pairwise
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import CommentMark
from ruamel.yaml.representer import RoundTripRepresenter
from ruamel.yaml.tokens import CommentToken


def read_commented(path: Path) -> CommentedMap:
    """The sections of a YAML file, with their comments.

    A line between two keys belongs to the second, and goes with it. The first key of a section has
    an empty line above it.
    """
    document: CommentedMap = YAML().load(path)
    _settle(document, between="\n")
    return document


def write_commented(document: CommentedMap) -> str:
    """The text of a YAML file: a key, its value and its comment in a line, in more if it is long.

    `dvc exp run -S` leaves nothing for null, and lists in lines of their own below the comment.
    """
    yaml = YAML()
    yaml.width = sys.maxsize
    yaml.Representer = _Representer
    stream = io.StringIO()
    yaml.dump(document, stream)
    return re.sub(r"(?m)^ *[\w.]+: \[[^#\n]{80,}\](?= #|$)", _broken, stream.getvalue())


def _broken(line: re.Match[str]) -> str:
    """A key and its list in lines of at most 100 columns, of a list of lists each in one."""
    text = line[0]
    between = r"(?<=\],) " if ": [[" in text else r"(?<=,) "
    items = (item.replace(" ", "\0") for item in re.split(between, text))
    indent = " " * (len(text) - len(text.lstrip()) + 2)
    return textwrap.fill(
        " ".join(items),
        width=100,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    ).replace("\0", " ")


class _Representer(RoundTripRepresenter):
    """Writes new lists in a line, and null as `null`."""


_Representer.add_representer(
    list, lambda self, items: self.represent_sequence("tag:yaml.org,2002:seq", items, True)
)
_Representer.add_representer(
    type(None), lambda self, _: self.represent_scalar("tag:yaml.org,2002:null", "null")
)


def _settle(section: CommentedMap, between: str = "") -> None:
    """Take the lines between two keys from the value above, with which ruamel.yaml keeps them.

    Where there are none there will be those of `between`. A comment beside a key begins a space
    after it, however long the value was before.
    """
    for before, key in pairwise(section):
        if lines := _cut_below(section, before) or between:
            comments = section.ca.items.setdefault(key, [None, None, None, None])
            comments[1] = [CommentToken(lines, CommentMark(0))]
    for _, _, beside, _ in section.ca.items.values():
        if beside:
            beside.start_mark = CommentMark(0)
    for value in section.values():
        if isinstance(value, CommentedMap):
            _settle(value)


def _cut_below(node: Any, key: Any) -> str:
    """Take away the lines of comments, and the empty ones, that stand below a value."""
    value = node[key]
    if isinstance(value, CommentedMap | CommentedSeq) and value and not value.fa.flow_style():
        return _cut_below(value, len(value) - 1 if isinstance(value, list) else [*value][-1])
    for comment in node.ca.items.get(key, []):
        if isinstance(comment, CommentToken):
            beside, _, below = comment.value.partition("\n")
            comment.value = f"{beside}\n"
            return below
    return ""
