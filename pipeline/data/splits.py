"""Which images are train, val and test: by lists or by a seed."""

import hashlib
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from pipeline.errors import InputError
from pipeline.params import Fraction, Section

SPLITS = ("train", "val", "test")


class SplitsParams(Section):
    """Where train, val and test come from: by default from the folders of those names.

    `source: files` takes the lists train.txt, val.txt and test.txt in `data.root`. `source: drawn`
    divides the images by `seed`: `val` and `test` are shares of the groups, see `group`. With
    `folds` the images that test leaves are cut into that many parts, of which number `fold` is val.

    `group_by` is a regular expression for files' names. Images of a group, as those of one patient,
    are no independent ones: they are drawn into one split, and the confidence intervals of an
    evaluation take them as one.
    """

    source: Literal["given", "drawn", "files"] = "given"
    val: Fraction = 0.15
    test: Fraction = 0.15
    seed: int = Field(ge=0, lt=2**32, default=0)
    group_by: str | None = None
    folds: Annotated[int, Field(ge=2, le=1024)] | None = None
    fold: int = Field(ge=0, default=0)

    @property
    def needed(self) -> set[str]:
        """The splits that must not be empty."""
        if self.source != "drawn":
            return {"train"}
        needed = {"train": True, "val": bool(self.folds or self.val), "test": self.test > 0}
        return {split for split, must in needed.items() if must}

    def group(self, stem: str) -> str:
        """What `group_by` matches in a stem: its first parenthesis if it has one.

        Without a pattern, and where it does not match, every stem is its own group.
        """
        match = re.search(self.group_by, stem) if self.group_by else None
        parts = (match[1] if match.re.groups else None, match[0]) if match else ()
        return next((part for part in parts if part), stem)

    @field_validator("group_by")
    @classmethod
    def _is_a_pattern(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise InputError(f"must be a regular expression: {error}") from None
        return pattern

    @model_validator(mode="after")
    def _leaves_some_for_training(self) -> Self:
        if self.val + self.test >= 1:
            raise InputError(f"val + test is {self.val + self.test:g}; it must stay below 1")
        return self

    @model_validator(mode="after")
    def _fold_is_one_of_the_folds(self) -> Self:
        if self.folds is not None and self.source != "drawn":
            raise InputError(f"folds are drawn, and source is {self.source}; use `drawn`, or null")
        if self.fold >= (self.folds or 1):
            last = f"at most {self.folds - 1}" if self.folds else "0, or give the number of folds"
            raise InputError(f"fold {self.fold} of {self.folds} folds; use {last}")
        return self


def listed_splits(
    folder: Path, splits: Sequence[str], stems: Collection[str]
) -> tuple[dict[str, str], list[str]]:
    """{stem: split} by the lists <split>.txt in `folder`, and what is wrong with them.

    A line is the path of an image below its folder, with its suffix or without. Stems that no list
    names are left out; so is a split without a list, train excepted.
    """
    split_of: dict[str, str] = {}
    problems = []
    for split in splits if stems else ():  # without an image every line would be wrong
        path = folder / f"{split}.txt"
        if not path.is_file():
            problems += [f"{path}: no such file; it lists train's images"] * (split == "train")
            continue
        lines = path.read_text(encoding="utf-8-sig", errors="replace").split("\n")
        for name in filter(None, map(str.strip, lines)):
            stem = name if name in stems else name.rpartition(".")[0]
            if stem not in stems:
                problems.append(f"{path}: there is no image {name}")
            elif stem in split_of:
                problems.append(f"{path}: {name} is listed in {split_of[stem]}.txt already")
            else:
                split_of[stem] = split
    return split_of, problems


def draw_splits(stems: Sequence[str], splits: SplitsParams) -> dict[str, str]:
    """Divide stems into train, val and test, whole groups at a time, by seed alone.

    With `folds` the groups that test leaves are cut into that many parts; part `fold` is val.
    """
    group_of = {stem: splits.group(stem) for stem in stems}

    def rank(group: str) -> str:
        return hashlib.sha256(f"{splits.seed}/{group}".encode()).hexdigest()

    groups = sorted(set(group_of.values()), key=rank)
    test = round(len(groups) * splits.test)
    start, end = test, test + round(len(groups) * splits.val)
    if splits.folds is not None:
        rest = len(groups) - test
        start, end = (test + rest * fold // splits.folds for fold in (splits.fold, splits.fold + 1))
    split_of = {
        group: "test" if place < test else "val" if start <= place < end else "train"
        for place, group in enumerate(groups)
    }
    return {stem: split_of[group] for stem, group in group_of.items()}
