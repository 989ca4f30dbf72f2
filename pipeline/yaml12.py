"""YAML 1.2, as DVC reads it: `1e-3` is a number, `off` is text and `010` is ten.

PyYAML alone reads version 1.1, where they are text, False and eight.
"""

import re
from pathlib import Path
from typing import Any, NoReturn

import yaml
from yaml.constructor import ConstructorError

from pipeline.errors import InputError

DEPTH = 32  # of lists and sections in each other
VALUES = 10_000  # in a file, those of aliases counted each time


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core schema, which DVC reads: PyYAML's own is 1.1 (`off` is False, `1e-3` text).

    Source: https://yaml.org/spec/1.2.2/#103-core-schema

    Values are counted while they are composed, those of an alias as often as it stands there: a
    few lines of aliases in aliases would make billions.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._values = 0
        self._sizes: dict[int, int] = {}  # of whole nodes, by id

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """The next node, while the file is neither too deep nor too large."""
        alias, before = self.check_event(yaml.AliasEvent), self._values
        mark = self.peek_event()  # type: ignore[no-untyped-call]
        self._depth += 1
        if self._depth > DEPTH:
            _refuse(f"nested more than {DEPTH} deep", mark)
        node: yaml.Node | None = super().compose_node(parent, index)
        if alias and id(node) not in self._sizes:
            _refuse("an alias within what it stands for", mark)
        self._values += self._sizes[id(node)] if alias else 1
        if self._values > VALUES:
            _refuse(f"more than {VALUES:,} values, those of aliases counted each time", mark)
        self._sizes.setdefault(id(node), self._values - before)
        self._depth -= 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """The value of a node; what a tag says it is and it isn't, is an error with the line."""
        try:
            return super().construct_object(node, deep)
        except (KeyError, ValueError):
            tag = node.tag.rpartition(":")[2]
            given = str(node.value)
            _refuse(f"no {tag} that can be read: {given[:40]!r}", node)


def _refuse(problem: str, at: Any) -> NoReturn:
    raise ConstructorError(None, None, problem, at.start_mark)


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    (
        "int",
        r"^[-+]?(?:[0-9][0-9_]*|0b[01_]+|0o[0-7_]+|0x[0-9a-fA-F_]+)$",
        list("-+0123456789"),
    ),
    (
        "float",
        r"^(?:[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.[0-9][0-9_]*(?:[eE][-+][0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        list("-+.0123456789"),
    ),
    ("merge", r"^(?:<<)$", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node)).replace("_", "")
    base = {"0b": 2, "0o": 8, "0x": 16}.get(text.lstrip("+-")[:2], 10)
    number = int(text, base)
    if number.bit_length() > 2**13:
        raise ValueError("Python does not write it in decimal digits")
    return number


def _construct_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            _refuse("a key must be a name, not a list or a section", key)
        if key.value in seen:
            _refuse(f"the key {key.value} stands twice", key)
        seen.add(key.value)
    loader.flatten_mapping(node)
    return {
        loader.construct_object(k): loader.construct_object(v, deep=True) for k, v in node.value
    }


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Loader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)
_KNOWN = ("null", "bool", "int", "float", "str", "seq", "map")
_Loader.yaml_constructors = {
    None: _Loader.yaml_constructors[None],  # what refuses any other tag
    **{(tag := f"tag:yaml.org,2002:{kind}"): _Loader.yaml_constructors[tag] for kind in _KNOWN},
}


def read_yaml(path: Path) -> Any:
    """The content of a YAML 1.2 file, as DVC reads it.

    Raises:
        InputError: there is no such file, or it is no YAML, with the line.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise InputError(
            f"there is no {path} in {Path.cwd()}; run this in the repository's root"
        ) from None
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror}") from None
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path} can't be read: line {line} is not UTF-8; save the file as UTF-8"
        ) from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, name: str) -> Any:
    """The same of a text, which errors call by this name."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise InputError(f"{name} can't be read: {_in_a_line(error, text)}") from None


def _in_a_line(error: Exception, text: str) -> str:
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return f"line {line}: {error.reason}: {chr(error.character)!r}"
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        told = ", ".join(part for part in (error.context, error.problem) if part)
        return f"line {mark.line + 1}, column {mark.column + 1}: {told}" if mark else told
    return f"an escape in it is no character ({error})"  # all else that PyYAML raises
