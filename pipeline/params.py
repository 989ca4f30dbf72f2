"""What every section of params.yaml is made of, and in which words a wrong one is refused.

A section's class stands beside the code that it configures; `pipeline/experiment.py` puts them all
together.
"""

import difflib
import json
import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.errors import InputError, shown
from pipeline.yaml12 import read_yaml

Probability = Annotated[float, Field(ge=0, le=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(gt=0, lt=1)]
# The ends are far beyond what anyone means: who gets there has mistyped, and would learn it from a
# network of NaN or a machine without memory.
Above0 = Annotated[float, Field(gt=0, le=1e6)]
AtLeast0 = Annotated[float, Field(ge=0, le=1e6)]
Ratio = Annotated[float, Field(ge=0.01, le=100)]  # to an image's size
Positive = Annotated[int, Field(ge=1, le=10**9)]
Count = Annotated[int, Field(ge=0, le=10**9)]
Batch = Annotated[int, Field(ge=1, le=65536)]  # images
Width = Annotated[int, Field(ge=1, le=16384)]  # of a layer, in channels
Points = Annotated[int, Field(ge=1, le=10**6)]  # of an image, at which something is computed
Few = Annotated[int, Field(ge=1, le=1024)]  # layers, processes, the sides of small maps
Side = Annotated[int, Field(ge=1, le=65536)]  # of an image, in pixels
Size = tuple[Side, Side]
Grey = Annotated[int, Field(ge=0, le=255)]
Colour = tuple[Grey, Grey, Grey]

LISTED = 20  # findings of a file
LONGEST = 1000  # characters of a text
GIVEN = 60  # characters of what was given
# What no screen, page or metric's name can show: control characters, halves of characters, what
# separates lines, and what turns the text around it.
UNSEEN = ("Cc", "Cs", "Zl", "Zp")
TURNING = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


class Section(BaseModel):
    """A part of params.yaml. Nothing is converted: `two` is no number and `1` is no boolean."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Part(Section):
    """A section, or the whole file, of which some keys are needed here and others are nobody's."""

    model_config = ConfigDict(extra="ignore")


class WorkDir(Part):
    """Of the section `train`, where a run leaves its files."""

    work_dir: str


class Named(Section):
    """A section whose keys depend on what its `name` chooses, such as a head of a network."""

    name: str


S = TypeVar("S", bound=Section)
N = TypeVar("N", bound=Named)


def nearest(name: str, valid: Iterable[str]) -> str:
    """Of the valid names the one that is written most like `name`."""
    return difflib.get_close_matches(name, list(valid), n=1, cutoff=0)[0]


def one_of(what: str, given: str, valid: Iterable[str], also: str = "") -> None:
    """Refuse a name that is not valid.

    Raises:
        InputError: says what was given, the nearest valid name and all the others; `also` adds
            what else would be valid.
    """
    names = list(valid)
    if given not in names:
        raise InputError(
            f"{what} {given!r} is unknown; did you mean {nearest(given, names)}? "
            f"It is one of {', '.join(names)}{also}"
        )


def choose(table: Mapping[str, type[N]], given: Any, also: str = "") -> N:
    """The section that `given["name"]` chooses from a table of sections, filled and checked.

    Raises:
        InputError: the name is unknown, or a key does not belong to what it chooses: then it says
            to which of the others the key belongs, or the nearest valid key.
    """
    if isinstance(given, Named):
        return given  # type: ignore[return-value]  # checked before
    if not isinstance(given, dict) or not isinstance(given.get("name"), str):
        raise InputError(f"must be a section with a name: one of {', '.join(table)}{also}")
    name = given["name"]
    one_of("name", name, table, also)
    own = table[name].model_fields
    for key in given.keys() - own.keys():
        others = [other for other, section in table.items() if key in section.model_fields]
        hint = f"it belongs to {', '.join(others)}" if others else ""
        raise InputError(
            f"{name} has no parameter {shown(key, GIVEN)}; {hint or _did_you_mean(key, own)}"
        )
    return table[name].model_validate_json(json.dumps(given))


def read_section(root: type[S], path: Path = Path("params.yaml")) -> S:
    """Read params.yaml, or a file like it, and check it against the class of the whole.

    Raises:
        InputError: every unknown key, wrong type and value out of range at once, each with the
            rule and, for a key, the nearest valid name.
    """
    document = read_yaml(path)
    if not isinstance(document, dict):
        raise InputError(f"{path}: must hold the sections {', '.join(root.model_fields)}")
    if unseen := [*_unseen(document)]:
        raise InputError(_refusal(path, unseen[:LISTED], len(unseen)))
    try:
        return root.model_validate_json(json.dumps(document))
    except ValidationError as error:
        findings = [_explain(root, finding) for finding in error.errors()[:LISTED]]
        raise InputError(_refusal(path, findings, error.error_count())) from None


def _refusal(path: Path, findings: Sequence[str], total: int) -> str:
    lines = [f"  {finding}" for finding in findings]
    more = [f"  ... and {total - len(lines)} more"] if total > len(lines) else []
    return "\n".join([f"{path} can't be used:", *lines, *more])


def _unseen(given: Any, name: str = "") -> Iterator[str]:
    """What is wrong with texts, names included, that are too long or that can't be shown."""
    if isinstance(given, dict):
        for key, value in given.items():
            wrong = [*_unseen(key, f"{name or 'params'}: a name in it")]
            yield from wrong or _unseen(value, f"{name}.{key}".removeprefix("."))
    elif isinstance(given, list):
        for place, value in enumerate(given):
            yield from _unseen(value, f"{name}.{place}")
    elif isinstance(given, str):
        hidden = [one for one in given if unicodedata.category(one) in UNSEEN or one in TURNING]
        if hidden:
            yield f"{name}: '{shown(given, GIVEN)}' holds {hidden[0]!a}, which can't be shown"
        elif len(given) > LONGEST:
            text = shown(given, GIVEN)
            yield f"{name}: {text} has {len(given)} characters; use at most {LONGEST}"


def _explain(root: type[Section], finding: Any) -> str:
    name = ".".join(shown(part, GIVEN) for part in finding["loc"]) or "params"
    text = shown(json.dumps(finding["input"], ensure_ascii=False), GIVEN)
    given = "" if isinstance(finding["input"], dict) else text
    match finding["type"]:
        case "extra_forbidden":
            return f"{name}: no such parameter{_nearest(root, finding['loc'])}"
        case "missing" if isinstance(finding["loc"][-1], int):
            return f"{name}: missing; the list is too short"
        case "missing":
            return f"{name}: missing; this parameter must stand in the file"
        case "value_error":
            return f"{name}: {finding['ctx']['error']}"
        case _:
            rule = finding["msg"].removeprefix("Input ")
            return f"{name}: {given} {rule}" if given else f"{name}: {rule}"


def _nearest(root: type[Section], location: tuple[int | str, ...]) -> str:
    fields: Mapping[str, Any] = root.model_fields
    for part in location[:-1]:
        fields = getattr(getattr(fields.get(str(part)), "annotation", None), "model_fields", {})
    hint = _did_you_mean(str(location[-1]), fields, location[:-1])
    return f"; {hint}" if hint else ""


def _did_you_mean(key: str, fields: Mapping[str, Any], above: tuple[int | str, ...] = ()) -> str:
    names = [field.alias or name for name, field in fields.items()]
    return f"did you mean {'.'.join([*map(str, above), nearest(key, names)])}?" if names else ""


def main_checkout() -> Path:
    """The repository itself, also inside a temporary or queued experiment's workspace."""
    return Path(os.environ.get("DVC_ROOT", ".")).resolve()


def plain(section: Section) -> dict[str, Any]:
    """A section as plain dicts, lists and scalars, under the names of params.yaml.

    What the file leaves out is there with its default.
    """
    return section.model_dump(mode="json", by_alias=True)


def differing(given: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of what is not the same in all of them."""
    names = dict.fromkeys(name for own in given for name in own)
    return [name for name in names if len({repr(own.get(name)) for own in given}) > 1]


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
