"""Which images are train, val and test: by lists or by a seed."""

import hashlib
import re
from collections.abc import Collection, Sequence
from pathlib import Path

from pipeline.params import SplitsParams

SPLITS = ("train", "val", "test")


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

    A group is what `group_by` matches in the stem (its first parenthesis if it has one); without
    it, and where it does not match, every stem is its own group. With `folds` the groups that test
    leaves are cut into that many parts; part `fold` is val.
    """
    group_of = {}
    for stem in stems:
        match = re.search(splits.group_by, stem) if splits.group_by else None
        parts = (match[1] if match.re.groups else None, match[0]) if match else ()
        group_of[stem] = next((part for part in parts if part), stem)

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
