"""Splits drawn by a seed, cut into folds, or read from lists."""

from collections import Counter
from pathlib import Path

import pytest

from pipeline.data.splits import SPLITS, SplitsParams, draw_splits, listed_splits


def splits(**changes: object) -> SplitsParams:
    return SplitsParams.model_validate({"source": "drawn", "val": 0.2, "test": 0.1} | changes)


STEMS = [f"walk{i % 20:02}/step{i:03}" for i in range(100)]


def test_drawn_splits_have_the_sizes_asked_for():
    assert Counter(draw_splits(STEMS, splits()).values()) == {"train": 70, "val": 20, "test": 10}


def test_drawn_splits_depend_on_the_seed_and_on_nothing_else():
    drawn = draw_splits(STEMS, splits())
    assert draw_splits(STEMS[::-1], splits()) == drawn
    assert draw_splits(STEMS, splits(seed=1)) != drawn


@pytest.mark.parametrize("pattern", [r"walk\d\d", r"^(.+)/step", r"k(\d\d)/(step)"])
def test_drawn_splits_keep_groups_together(pattern: str):
    drawn = draw_splits(STEMS, splits(group_by=pattern))
    of_walk = {
        walk: {drawn[s] for s in STEMS if s.startswith(walk)}
        for walk in (f"walk{i:02}" for i in range(20))
    }
    assert all(len(found) == 1 for found in of_walk.values())
    assert Counter(next(iter(f)) for f in of_walk.values()) == {"train": 14, "val": 4, "test": 2}


def test_a_stem_that_the_pattern_does_not_match_is_its_own_group():
    drawn = draw_splits(STEMS, splits(group_by="sprint"))
    assert drawn == draw_splits(STEMS, splits())


def test_a_share_of_nothing_is_an_empty_split():
    drawn = draw_splits(STEMS, splits(val=0.0, test=0.3))
    assert Counter(drawn.values()) == {"train": 70, "test": 30}


@pytest.mark.parametrize("folds", [2, 3, 7])
def test_every_group_is_val_in_exactly_one_fold_and_test_in_all_or_none(folds: int):
    pattern = r"walk\d\d"
    of_walk: dict[str, Counter[str]] = {f"walk{i:02}": Counter() for i in range(20)}
    for fold in range(folds):
        drawn = draw_splits(STEMS, splits(group_by=pattern, folds=folds, fold=fold))
        for walk, counts in of_walk.items():
            (split,) = {drawn[stem] for stem in STEMS if stem.startswith(walk)}
            counts[split] += 1
    tested = [counts for counts in of_walk.values() if counts["test"]]
    assert tested == [{"test": folds}] * 2
    assert Counter(counts["val"] for counts in of_walk.values()) == {0: 2, 1: 18}
    unfolded = draw_splits(STEMS, splits(group_by=pattern))
    assert {w for w, c in of_walk.items() if c["test"]} == {
        stem.split("/")[0] for stem in STEMS if unfolded[stem] == "test"
    }


def test_the_folds_differ_by_one_group_at_most_and_depend_on_the_seed():
    def fold(number: int, seed: int = 0) -> set[str]:
        drawn = draw_splits(STEMS, splits(test=0.0, folds=7, fold=number, seed=seed))
        return {stem for stem in STEMS if drawn[stem] == "val"}

    assert sorted(len(fold(number)) for number in range(7)) == [14] * 5 + [15] * 2
    assert fold(0) != fold(0, seed=1)


def test_lists_name_stems_with_their_suffix_or_without(tmp_path: Path):
    (tmp_path / "train.txt").write_text("\ufeffwalk/a.jpg\r\nb.1\n\n  é f \n", encoding="utf-8")
    (tmp_path / "val.txt").write_text("d.PNG", encoding="utf-8")
    found = listed_splits(tmp_path, SPLITS, ["walk/a", "b.1", "é f", "d", "left out"])
    assert found == ({"walk/a": "train", "b.1": "train", "é f": "train", "d": "val"}, [])


def test_what_is_wrong_with_lists_is_named(tmp_path: Path):
    (tmp_path / "val.txt").write_text("a\nb\na.png\n", encoding="utf-8")
    (tmp_path / "test.txt").write_text("c\nb\nd.png\n.\n", encoding="utf-8")
    assert listed_splits(tmp_path, SPLITS, ["a", "b", "c"]) == (
        {"a": "val", "b": "val", "c": "test"},
        [
            f"{tmp_path}/train.txt: no such file; it lists train's images",
            f"{tmp_path}/val.txt: a.png is listed in val.txt already",
            f"{tmp_path}/test.txt: b is listed in val.txt already",
            f"{tmp_path}/test.txt: there is no image d.png",
            f"{tmp_path}/test.txt: there is no image .",
        ],
    )
