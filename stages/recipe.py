"""`python -m stages.recipe`: named experiments, most of them MMSegmentation's, for params.yaml.

A recipe, pipeline/recipes/<name>.yaml, holds a `description`, perhaps what to do `next`, and values
in the sections of params.yaml; `base` names the pieces, files that begin with an underscore, whose
values it starts from. Together they set every parameter that changes a result except `data.root`,
`train.seed` and `train.deterministic`: so a recipe means the same whatever stood in params.yaml.
"""

import argparse
import difflib
import json
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.params import flatten, load_params, read_yaml

RECIPES = Path(__file__).parents[1] / "pipeline" / "recipes"
PARAMS = Path("params.yaml")


@dataclass(frozen=True)
class Recipe:
    """`values` are YAML as it is written, by dotted name; `next` is a line for each thing to do."""

    values: dict[str, str]
    next: list[str]


def main() -> None:
    """Obey the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m stages.recipe", description="named experiments"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="name the recipes")
    for command, text in (
        ("show", "print params.yaml as `use` would write it"),
        ("use", "write a recipe into params.yaml; its comments stay, and so do data.root and seed"),
    ):
        commands.add_parser(command, help=text).add_argument("name")
    options = parser.parse_args()
    match options.command:
        case "list":
            width = max(map(len, names()))
            for name in names():
                about = read_yaml(RECIPES / f"{name}.yaml").get("description", "")
                print(f"{name:{width}}  {about}")
        case "show":
            print(rewritten(PARAMS, load_recipe(options.name).values), end="")
        case "use":
            use(options.name)


def names() -> list[str]:
    """Every recipe's name."""
    return sorted(path.stem for path in RECIPES.glob("[!_]*.yaml"))


def load_recipe(name: str) -> Recipe:
    """A recipe, the values of its pieces included.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in names():
        (close,) = difflib.get_close_matches(name, names(), n=1, cutoff=0)
        raise ValueError(
            f"there is no recipe {name!r}; did you mean {close}? "
            "`python -m stages.recipe list` names all"
        )
    values: dict[str, str] = {}
    steps: list[str] = []
    for path in _pieces(name):
        text = path.read_text(encoding="utf-8")
        values |= {key: text[start:end] for key, (_, start, end) in places(text).items()}
        steps += read_yaml(path).get("next", [])
    for about in ("description", "base", "next"):
        values.pop(about, None)
    return Recipe(values, steps)


def _pieces(name: str) -> list[Path]:
    """The files of a recipe, those it is based on first."""
    path = RECIPES / f"{name}.yaml"
    if not path.is_file():
        raise ValueError(f"{path}: there is no such piece of a recipe")
    bases = read_yaml(path).get("base", [])
    if not isinstance(bases, list):
        raise ValueError(f"{path}: base must be a list, as [_common, _ade20k]")
    return [*(piece for base in bases for piece in _pieces(base)), path]


def places(text: str) -> dict[str, tuple[int, int, int]]:
    """Of every dotted name in a YAML text: where the key ends, and the value begins and ends."""
    return dict(_leaves("", 0, yaml.compose(text, yaml.SafeLoader)))


def _leaves(name: str, key_end: int, node: Any) -> Iterator[tuple[str, tuple[int, int, int]]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            path = f"{name}.{key.value}".removeprefix(".")
            yield from _leaves(path, key.end_mark.index, value)
    else:
        yield name, (key_end, node.start_mark.index, _last(node).end_mark.index)


def _last(node: Any) -> Any:
    # A list of lines that begin with dashes ends, for PyYAML, where the next key begins.
    lines = isinstance(node, yaml.SequenceNode) and not node.flow_style
    return _last(node.value[-1]) if lines else node


def rewritten(path: Path, values: dict[str, str]) -> str:
    """The text of a YAML file with other values, and everything else in it as it stands.

    `dvc exp run -S` leaves lists in lines of their own, below the comment of their key, and nothing
    for null; both become a line again.

    Raises:
        ValueError: the file is no YAML, or lacks a name that is to be set.
    """
    if not isinstance(read_yaml(path), dict):
        raise ValueError(f"{path} holds no parameters; `git checkout {path}` brings them back")
    text = path.read_text(encoding="utf-8")
    found = places(text)
    if unknown := [name for name in values if name not in found]:
        raise ValueError(f"{path} has no parameter {', '.join(unknown)}, which the recipe sets")
    for name in sorted(values, key=found.__getitem__, reverse=True):
        key_end, start, end = found[name]
        comment = text[key_end:start].strip().removeprefix(":").strip()
        rest = text[end:]
        if rest.lstrip(" ").startswith("#"):
            rest = " " + rest.lstrip(" ")
        text = f"{text[:key_end]}: {' '.join(filter(None, [values[name], comment]))}{rest}"
    return text


def use(name: str) -> None:
    """Write a recipe into params.yaml, if the result is valid, and tell what has changed.

    Raises:
        ValueError: the file and the recipe don't fit; the file is then as it was.
    """
    recipe = load_recipe(name)
    text = rewritten(PARAMS, recipe.values)
    before = flatten(read_yaml(PARAMS))
    draft = PARAMS.with_name(f"{PARAMS.name}.new")
    try:
        draft.write_text(text, encoding="utf-8")
        load_params(draft)
        after = flatten(read_yaml(draft))
        draft.replace(PARAMS)
    except ValueError as error:
        raise ValueError(f"{PARAMS} stays as it is: {error}") from None
    finally:
        draft.unlink(missing_ok=True)
    report(name, recipe, before, after)


def report(name: str, recipe: Recipe, before: dict[str, Any], after: dict[str, Any]) -> None:
    """Print what changed, what a recipe leaves alone, and what is to be done next."""
    print(f"{PARAMS} is now {name}. Changed:")
    for key, value in after.items():
        if before[key] != value:
            print(f"  {key}: {_short(before[key])} -> {_short(value)}")
    print("Left as they were:")
    for key, value in after.items():
        if key not in recipe.values:
            print(f"  {key}: {_short(value)}")
    print("Next:")
    for step in recipe.next:
        print(f"  {step}")


def _short(value: Any) -> str:
    return textwrap.shorten(json.dumps(value, ensure_ascii=False), 40, placeholder=" ...")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
