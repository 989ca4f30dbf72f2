"""Whether one training is better than another: groups of seeds, by hand and by simulation."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import t as student

from pipeline.evaluation import uncertainty
from pipeline.evaluation.comparison import (
    GateParams,
    Group,
    Result,
    Variance,
    compare,
    gather,
    half_interval,
    worse,
)
from pipeline.evaluation.metrics import ImageAreas
from pipeline.evaluation.per_image import Origin, PerImage
from pipeline.params import differing
from tests.project import REPOSITORY, environment


def result(name: str, right: Any, changes: dict[str, Any] | None = None, **origin: Any) -> Result:
    """Images of 200 pixels, half of each of two classes; so many of the second are right."""
    given = {"seed": 0, "lr": 0.1, "names": None, "groups": None, "split": "test"} | (changes or {})
    names = given["names"] or [f"image {number}" for number in range(len(right))]
    found = [
        ImageAreas(
            number,
            cells=np.array([0, 2, 3]),
            pixels=np.array([100, 100 - pixels, pixels]),
            boundary=np.zeros((2, 2), np.int64),
        )
        for number, pixels in enumerate(np.asarray(right).tolist())
    ]
    about = {
        "classes": ["sea", "land"],
        "params": {
            "train": {"seed": given["seed"], "lr": given["lr"]},
            "evaluation": {"split": given["split"]},
        },
        "code": "code",
        "data": "data",
        "fold": None,
    }
    return Result(
        name, PerImage.of(Origin(**(about | origin)), names, given["groups"] or names, found)
    )


def group(scores: list[Any], lr: float = 0.1) -> Group:
    """One training a seed."""
    (one,) = gather(
        result(f"{lr} {seed}", right, {"seed": seed, "lr": lr}) for seed, right in enumerate(scores)
    )
    return one


SOME = np.arange(20, 80, 3)  # of twenty images


def test_trainings_that_differ_in_the_seed_are_one_group():
    results = [
        result("a", SOME),
        result("b", SOME, {"lr": 0.2}),
        result("c", SOME, {"seed": 1}),
        result("d", SOME, code="other"),
    ]
    groups = gather(results)
    assert [one.name for one in groups] == ["a, c", "b", "d"]
    assert [one.trainings for one in groups] == [2, 1, 1]
    assert differing([group.params for group in groups]) == ["train.lr", "code"]


def test_a_training_that_is_named_twice_is_refused():
    with pytest.raises(ValueError, match="a and b are results of one training: seed 0; name one"):
        gather([result("a", SOME), result("b", SOME)])


def test_the_folds_of_a_training_are_its_images_together():
    names = [f"image {number:02}" for number in range(20)]
    folds = [
        result(
            f"{seed} {fold}",
            SOME[fold::2] + seed,
            {"seed": seed, "names": names[fold::2], "split": "val"},
            fold=fold,
        )
        for seed in (0, 1)
        for fold in (0, 1)
    ]
    (one,) = gather(folds)
    assert one.trainings == 2
    assert one.names.tolist() == names
    assert one.areas[:, 0, 0, 1].tolist() == SOME.tolist()
    assert one.areas[:, 1, 0, 1].tolist() == (SOME + 1).tolist()
    with pytest.raises(ValueError, match="seed 1 lacks fold 1; name the same folds"):
        gather(folds[:3])


def test_the_folds_of_a_test_split_are_so_many_trainings():
    (one,) = gather(result(f"{fold}", SOME, fold=fold) for fold in (0, 1, 2))
    assert one.trainings == 3


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (result("b", SOME[:-1], {"lr": 1}), "1 images, as image 19, are in one of them alone"),
        (result("b", SOME, {"lr": 1}, classes=["sea", "arch"]), "their classes are sea, land and"),
        (
            result("b", SOME, {"lr": 1, "groups": ["one"] * 10 + ["other"] * 10}),
            "the groups of 20 images, as image 0, are not the same",
        ),
    ],
)
def test_what_was_measured_on_other_images_is_not_compared(other: Result, why: str):
    first, second = gather([result("a", SOME), other])
    with pytest.raises(ValueError, match=f"a and b can't be compared: {why}"):
        compare(first, second)


def test_other_targets_are_not_compared():
    other = result("b", SOME, {"lr": 1}).per_image
    other.pixels[4] += 1
    with pytest.raises(ValueError, match="the targets of 1 images, as image 1, are not the same"):
        compare(*gather([result("a", SOME), Result("b", other)]))


def test_a_score_is_the_mean_of_the_trainings():
    # land: 40 and 60 of 100 right; sea: 100 of 160 and of 140
    one = group([[40] * 3, [60] * 3])
    assert one.iou.tolist() == pytest.approx([(100 / 160 + 100 / 140) / 2, 0.5])
    assert one.mean_iou == pytest.approx((100 / 160 + 0.4 + 100 / 140 + 0.6) / 4)
    assert one.image_scores.tolist() == pytest.approx([one.mean_iou] * 3)


def test_a_difference_of_every_image_and_seed_is_shown():
    rng = np.random.default_rng(0)
    seeds = [SOME + rng.integers(-2, 3, 20) for _ in range(6)]
    found = compare(group(seeds[:3]), group([seed + 15 for seed in seeds[3:]], lr=0.2))
    assert found.mean_iou.shown
    assert found.mean_iou.value > (found.mean_iou.half or 0) > 0
    assert found.sentence("A", "B") == (
        f"B beats A by {found.mean_iou.value:.4f} ± {found.mean_iou.half:.4f} mean IoU on 20 "
        "images and 3 seeds: shown"
    )
    other = compare(found.second, found.first)
    assert other.mean_iou.value == -found.mean_iou.value
    assert other.sentence("A", "B").startswith("A beats B by ")
    assert [row.name for row in found.rows()] == ["sea", "land"]
    assert all(row.difference.shown for row in found.rows())


def test_seeds_that_differ_as_much_show_nothing_and_how_many_would():
    first = group([SOME, SOME + 6, SOME + 12])
    found = compare(first, group([SOME + 4, SOME + 10, SOME + 16], lr=0.2))
    assert not found.mean_iou.shown
    assert "not shown; about " in found.sentence("A", "B")
    more = found.mean_iou.more_seeds()
    assert f"about {more} seeds more" in found.sentence("A", "B")
    # Two variances of a third of 6 * 6 points of IoU each; t of 2 * (n - 1) degrees of freedom.
    spread = np.var([one.mean_iou for one in (group([SOME + s]) for s in (0, 6, 12))], ddof=1)
    enough = next(
        n
        for n in range(4, 100)
        if student.ppf(0.975, 2 * (n - 1)) * np.sqrt(2 * spread / n) < found.mean_iou.value
    )
    assert more == pytest.approx(enough - 3, abs=1)


def test_half_an_interval_is_by_students_t():
    assert half_interval([Variance(4, 10)]) == pytest.approx(2 * 2.228139)
    assert half_interval([Variance(1, 2), Variance(1, 2)]) == pytest.approx(2**0.5 * 2.776445)  # 4
    assert half_interval([Variance(0, 3)]) == 0


def test_one_seed_each_is_said_to_show_nothing_of_seeds():
    found = compare(group([SOME]), group([SOME + 15], lr=0.2))
    assert found.mean_iou.shown
    assert "nothing is known of the noise of A and B's seeds: train" in found.sentence("A", "B")
    found = compare(group([SOME, SOME + 1]), group([SOME + 15], lr=0.2))
    assert "on 20 images and 2 and 1 seeds: shown, but nothing is known of the noise of B's" in (
        found.sentence("A", "B")
    )


def test_equal_results_do_not_differ():
    found = compare(group([SOME]), group([SOME], lr=0.2))
    assert (found.mean_iou.value, found.mean_iou.half) == (0, 0)
    assert not found.mean_iou.shown
    assert found.furthest(3) == []


def test_the_images_that_differ_most_come_first():
    other = SOME.copy()
    other[[3, 11]] += (-9, 18)
    found = compare(group([SOME]), group([other], lr=0.2))
    furthest = [str(found.first.names[place]) for place in found.furthest(3)]
    assert furthest == ["image 11", "image 3"]


def test_a_gate_holds_what_it_names_beyond_tolerance_and_noise():
    found = compare(group([SOME]), group([SOME - 15], lr=0.2))
    assert [line.split(":")[0] for line in worse(found, GateParams(baseline="x"))] == ["mean IoU"]
    named = GateParams(baseline="x", classes=("land",))
    assert [line.split(":")[0] for line in worse(found, named)] == ["mean IoU", "land"]
    assert worse(found, GateParams(baseline="x", tolerance=0.2)) == []
    assert worse(compare(found.second, found.first), named) == []  # which is better


def test_a_gate_that_cannot_judge_does_not_pass():
    one = {"groups": ["one"] * 20}
    groups = gather([result("a", SOME, one), result("b", SOME, one | {"lr": 1})])
    found = compare(*groups)
    assert found.sentence("A", "B") == (
        "B and A can't be told apart: 20 images of one group are too few"
    )
    with pytest.raises(ValueError, match="gate: mean IoU can't be judged: fewer than two groups"):
        worse(found, GateParams(baseline="x"))


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_a_difference_lies_within_its_noise_95_times_in_100(
    seeds: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(uncertainty, "DRAWS", 400)
    rng = np.random.default_rng(0)
    held, images = 0, 60

    def trained(effect: float, easy: np.ndarray) -> list[np.ndarray]:
        """What some seeds make of images: each has a level of its own, and each image luck."""
        level = rng.normal(effect, 3, (seeds, 1))
        found = easy + level + rng.normal(0, 8, (seeds, images))
        return [*np.clip(np.rint(found), 0, 100).astype(int)]

    def truth(effect: float) -> float:
        """The mean IoU of very many images and seeds."""
        found = rng.normal(60, 15, 400_000) + rng.normal(effect, 3, 400_000)
        right = np.clip(np.rint(found + rng.normal(0, 8, 400_000)), 0, 100).mean()
        return (100 / (200 - right) + right / 100) / 2

    expected = truth(4) - truth(0)
    for _ in range(2000):
        easy = rng.normal(60, 15, images)
        found = compare(group(trained(0, easy)), group(trained(4, easy), lr=0.2)).mean_iou
        held += abs(found.value - expected) <= found.half
    assert 0.93 < held / 2000 < 0.97, held / 2000


# Run where nothing else of the experiments is: the answer, and every number's every digit.
ELSEWHERE = """
from pathlib import Path
from pipeline.evaluation.comparison import Result, compare, gather
from pipeline.evaluation.per_image import PerImage

paths = sorted(Path().glob("*.npz"), key=lambda path: path.name)
found = gather(Result(path.stem, PerImage.load(path.read_bytes(), path)) for path in paths)
compared = compare(*found)
print(ascii(compared.sentence("A", "B")))
print([one.iou.tolist() for one in found], compared.furthest(5))
for row in compared.rows():
    print(ascii(row), row.difference.half)
"""
# Of the first machine that was asked, an Intel Xeon with AVX-512.
SAID = (
    r"'B is 0.0254 \xb1 0.0350 mean IoU above A on 81 images and 3 seeds: "
    "not shown; about 8 seeds more would be needed'",
    "[[0.6753452520303008, 0.5192181069958848], [0.6916047235700303, 0.5538271604938271]] "
    "[28, 78, 53, 48, 30]",
)
HALVES = {"sea": 0.022509768794146914, "land": 0.047489149029895476}


@pytest.mark.slow
def test_copies_of_per_image_are_compared_alike_on_another_machine(tmp_path: Path):
    rng = np.random.default_rng(0)
    here, there = tmp_path / "here", tmp_path / "thére"
    for lr, better in ((0.1, 0), (0.2, 4)):
        for seed in range(3):
            right = np.clip(rng.integers(20, 80, 81) + better + seed, 0, 100)
            measured = result("", right, {"seed": seed, "lr": lr}).per_image
            measured.save(here / f"{lr} {seed}.npz")
    shutil.copytree(here, there)
    other = {"LC_ALL": "tr_TR.UTF-8", "TZ": "Asia/Kathmandu", "PYTHONHASHSEED": "17"}
    threads = {f"{one}_NUM_THREADS": "4" for one in ("OMP", "OPENBLAS", "MKL")}
    said = [
        subprocess.run(
            [sys.executable, "-c", ELSEWHERE],
            cwd=folder,
            env=environment(PYTHONPATH=str(REPOSITORY), **extra),
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for folder, extra in ((here, {}), (there, other | threads))
    ]
    assert said[0] == said[1]
    *first, sea, land = said[0].splitlines()
    assert tuple(first) == SAID
    halves = {"sea": float(sea.split()[-1]), "land": float(land.split()[-1])}
    assert halves == pytest.approx(HALVES, rel=1e-12, abs=0)
