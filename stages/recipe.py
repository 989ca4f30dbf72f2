"""`python -m stages.recipe`: named experiments, most of them MMSegmentation's, for params.yaml.

A recipe, pipeline/recipes/<name>.yaml, holds a `description`, perhaps what to do `next`, and values
in the sections of params.yaml; `base` names the pieces, files that begin with an underscore, whose
values it starts from. Of `data`, `augmentation` and `model` it says everything: what it leaves out
goes from params.yaml and so has its default. In the other sections it sets what it names.
"""

import argparse
import json
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import YAMLError

from pipeline.comments import rewrite
from pipeline.errors import InputError, one_line, shown
from pipeline.experiment import load_params
from pipeline.params import flatten, nearest
from pipeline.yaml12 import read_yaml
from stages import run_main

RECIPES = Path(__file__).parents[1] / "pipeline" / "recipes"
PARAMS = Path("params.yaml")
WHOLE = ("data", "augmentation", "model")  # the sections of which a recipe says everything
LEFT = ("data.root", "model.backbone.with_cp")  # but this: it is the user's
CHOSEN = ("data.format", "model.head")  # their keys, comments included, belong to their name


@dataclass(frozen=True)
class Recipe:
    """`values` are sections of params.yaml; `next` is a line for each thing to do."""

    values: dict[str, Any]
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
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a word
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
        InputError: there is none of that name.
    """
    if name not in names():
        raise InputError(
            f"there is no recipe {name!r}; did you mean {nearest(name, names())}? "
            "`python -m stages.recipe list` names all"
        )
    values: dict[str, Any] = {}
    steps: list[str] = []
    for piece in _pieces(name):
        steps += piece.pop("next", [])
        merge(values, piece)
    values.pop("description", None)
    return Recipe(values, steps)


def _pieces(name: str) -> list[dict[str, Any]]:
    """The files of a recipe, those it is based on first."""
    path = RECIPES / f"{name}.yaml"
    if not path.is_file():
        raise InputError(f"{path}: there is no such piece of a recipe")
    piece = read_yaml(path)
    bases = piece.pop("base", [])
    if not isinstance(bases, list):
        raise InputError(f"{path}: base must be a list, as [_common, _ade20k]")
    return [*(part for base in bases for part in _pieces(base)), piece]


def rewritten(path: Path, values: dict[str, Any]) -> str:
    """The text of params.yaml, or of a file like it, with the values of a recipe.

    Raises:
        InputError: the file is no YAML, or holds nothing.
    """
    if not isinstance(read_yaml(path), dict):
        raise InputError(f"{path} holds no parameters; `git checkout {path}` brings them back")

    def change(document: CommentedMap) -> None:
        for name, section in values.items():
            if not isinstance(document.get(name), dict):
                document[name] = {}
            merge(document[name], section, name if name in WHOLE else None)

    try:
        return rewrite(path, change)
    except YAMLError as error:
        raise InputError(f"{path} can't be changed: {one_line(error)}") from None


def merge(section: Any, values: dict[str, Any], whole: str | None = None) -> None:
    """Set values in a section and in those below it.

    `whole` is the section's name where it is to hold nothing else, but what is left to the user.
    """
    for key in [*section] if whole else []:
        stays = key in values and (whole not in CHOSEN or key == "name")
        if not stays and f"{whole}.{key}" not in LEFT:
            del section[key]
            section.ca.items.pop(key, None)
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(section.get(key), dict):
            merge(section[key], value, whole and f"{whole}.{key}")
        else:
            section[key] = value


def use(name: str) -> None:
    """Write a recipe into params.yaml, if the result is valid, and tell what has changed.

    Raises:
        InputError: the file and the recipe don't fit; the file is then as it was.
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
    except InputError as error:
        raise InputError(f"{PARAMS} stays as it is: {error}") from None
    finally:
        draft.unlink(missing_ok=True)
    report(name, recipe, before, after)


def report(name: str, recipe: Recipe, before: dict[str, Any], after: dict[str, Any]) -> None:
    """Print what changed, what a recipe leaves alone, and what is to be done next."""
    print(f"{PARAMS} is now {name}. Changed:")
    for key in before | after:
        if key not in before or key not in after or before[key] != after[key]:
            print(f"  {key}: {_short(before, key)} -> {_short(after, key)}")
    print("Left as they were:")
    ours = flatten(recipe.values)
    for key in (key for key in after if key not in ours):
        print(f"  {key}: {_short(after, key)}")
    print("Next:")
    for step in recipe.next:
        print(f"  {step}")


def _short(values: dict[str, Any], key: str) -> str:
    if key not in values:
        return "left out"
    return shown(json.dumps(values[key], ensure_ascii=False), 40)


if __name__ == "__main__":
    run_main(main)
