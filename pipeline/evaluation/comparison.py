"""Whether one way of training is better than another, beyond what images and seeds explain.

A difference of two scores has two sources of noise. With other images it would be another: that is
seen by a bootstrap in which both are measured on the same draws. With other seeds it would be
another: that is seen by how the scores of several trainings differ. The variances are added, with
Student's t for the few trainings that there are (Welch 1947, doi:10.1093/biomet/34.1-2.28): a
bootstrap of three seeds would show two thirds of their variance.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pipeline.data.table import Array
from pipeline.errors import InputError
from pipeline.evaluation.metrics import Matrix, Scores, iou_of, mean_of
from pipeline.evaluation.per_image import PerImage
from pipeline.evaluation.uncertainty import (
    OUTSIDE,
    Sureness,
    bootstrap,
    by_group,
    joint_sureness,
    sureness,
)
from pipeline.params import AtLeast0, Section, flatten

MOST = 1000  # seeds, or times as many images: who needs more has a difference that doesn't matter


class GateParams(Section):
    """The section `gate`: which result the stage of that name holds a new one against.

    `baseline` is an experiment, a revision or an MLflow run. The stage fails where mean IoU, or the
    IoU of one of the `classes`, is worse by more than `tolerance`, and other images don't explain
    it. Both are single trainings, so `tolerance` has to cover what seeds do.
    """

    baseline: str = Field(min_length=1)
    tolerance: AtLeast0 = 0.0
    classes: tuple[str, ...] = ()


class Result(NamedTuple):
    """An evaluation, by the name under which it was asked for.

    `mask` gives the prediction (H,W) of an image by its name, None where it was not kept.
    """

    name: str
    per_image: PerImage
    mask: Callable[[str], Array | None] = lambda image: None


@dataclass(frozen=True)
class Group:
    """Trainings that differ in nothing but the seed, measured on the same N images.

    `areas` (N,R,3,C) are those of each image in each of R trainings. A training in folds is one,
    whose images are those that were val in one of them.
    """

    results: Sequence[Result]
    names: NDArray[np.str_]
    groups: NDArray[np.str_]
    areas: Matrix

    @property
    def name(self) -> str:
        """The names of the results."""
        return ", ".join(result.name for result in self.results)

    @property
    def trainings(self) -> int:
        """R."""
        return len(self.areas[0])

    @property
    def classes(self) -> list[str]:
        """The names of the classes, in the order of their ids."""
        return list(self.results[0].per_image.origin["classes"])

    @property
    def params(self) -> dict[str, Any]:
        """What its trainings have in common, by the parameters' dotted names."""
        return flatten(_shared(self.results[0].per_image))

    @property
    def independent(self) -> int:
        """The number of groups of images, of which each may be drawn by itself."""
        return len(set(self.groups.tolist()))

    @cached_property
    def iou(self) -> Scores:
        """The IoU of each class, as the mean of the trainings: (C,)."""
        return mean_of(iou_of(self.areas.sum(axis=0)).T)

    @cached_property
    def mean_iou(self) -> float:
        """The mean IoU, as the mean of the trainings."""
        return float(mean_of(mean_of(iou_of(self.areas.sum(axis=0)))))

    @cached_property
    def image_scores(self) -> Scores:
        """The mean IoU of each image, as the mean of the trainings: (N,)."""
        return mean_of(mean_of(iou_of(self.areas)))


class Variance(NamedTuple):
    """A part of a variance, and the degrees of freedom by which it was found."""

    value: float
    freedom: float


class Spread(NamedTuple):
    """How far the scores of a group's trainings differ: their variance, and their number."""

    variance: float
    trainings: int


@dataclass(frozen=True)
class Difference:
    """By how much a score of the second group is above the first's.

    `images` is what other images would change it by, None where too few groups of images show
    anything of it; `seeds` holds a spread for each group that was trained more than once.
    """

    value: float
    images: Variance | None
    seeds: tuple[Spread, ...] = ()

    @cached_property
    def half(self) -> float | None:
        """Half of the 95% interval, `value` ± `half`; None where `images` is."""
        return self.images and self._half(self.images, 0)

    @property
    def shown(self) -> bool:
        """Whether noise alone would seldom, once in twenty times, be as large."""
        return self.half is not None and abs(self.value) > self.half

    def more_seeds(self) -> int | None:
        """About how many more of each group would show a difference of this size, if any would."""
        images, own = self.images, min((one.trainings for one in self.seeds), default=MOST)
        if images is None:
            return None
        return _first(range(1, MOST - own), lambda more: self._half(images, more) < abs(self.value))

    def times_images(self) -> int | None:
        """About how many times as many images would show it, if any would."""
        if self.images is None:
            return None
        value, freedom = self.images
        return _first(
            range(2, MOST),
            lambda times: self._half(Variance(value / times, freedom * times), 0) < abs(self.value),
        )

    def _half(self, images: Variance, more: int) -> float:
        """With as many more trainings in the smaller group, and at least as many in the other."""
        least = min((one.trainings for one in self.seeds), default=0) + more
        counts = [max(one.trainings, least) for one in self.seeds]
        seeds = [
            Variance(one.variance / count, count - 1)
            for one, count in zip(self.seeds, counts, strict=True)
        ]
        return half_interval([images, *seeds])


class Row(NamedTuple):
    """A class, its IoU by both groups, and their difference."""

    name: str
    first: float
    second: float
    difference: Difference


@dataclass(frozen=True)
class Comparison:
    """Of two groups on the same images. `classes` is in the order of the classes' ids."""

    first: Group
    second: Group
    mean_iou: Difference
    classes: list[Difference]

    def rows(self) -> list[Row]:
        """A line for each class, in the order of their ids."""
        scores = (self.first.iou.tolist(), self.second.iou.tolist())
        return [Row(*row) for row in zip(self.first.classes, *scores, self.classes, strict=True)]

    def furthest(self, count: int) -> list[int]:
        """The images whose own mean IoU differs most, by their place in `first.names`."""
        apart = np.abs(self.second.image_scores - self.first.image_scores)
        order = np.argsort(-apart, kind="stable")
        return [place for place in order.tolist() if apart[place] > 0][:count]

    def sentence(self, first: str, second: str) -> str:
        """The answer, where the groups are called `first` and `second`."""
        found = self.mean_iou
        images = f"{len(self.first.names)} images"
        if found.half is None:
            return f"{second} and {first} can't be told apart: {images} of one group are too few"
        size = f"{abs(found.value):.4f} ± {found.half:.4f} mean IoU"
        on = f"on {images}{self._trainings()}"
        better, worse = (second, first) if found.value > 0 else (first, second)
        if found.shown:
            return f"{better} beats {worse} by {size} {on}: shown{self._unknown(first, second)}"
        side = "above" if found.value > 0 else "below"
        said = f"{second} is {size} {side} {first} {on}: not shown"
        return said + (self._unknown(first, second) or f"; {self._needed()}")

    def _trainings(self) -> str:
        counts = dict.fromkeys([self.first.trainings, self.second.trainings])
        return "" if list(counts) == [1] else f" and {' and '.join(map(str, counts))} seeds"

    def _unknown(self, first: str, second: str) -> str:
        """Of which group the seeds' noise can't be seen."""
        single = [
            name
            for name, group in ((first, self.first), (second, self.second))
            if group.trainings == 1
        ]
        if not single:
            return ""
        return (
            f", but nothing is known of the noise of {' and '.join(single)}'s seeds: train with "
            "several, as by dvc exp run --queue -S 'train.seed=range(0,5)'"
        )

    def _needed(self) -> str:
        """What would show a difference of this size."""
        seeds, images = self.mean_iou.more_seeds(), self.mean_iou.times_images()
        said = [f"{seeds} seeds more"] if seeds else []
        said += [f"{images} times as many images"] if images else []
        if not said:
            return f"a difference this small would need over {MOST} seeds and more images"
        return f"about {' or '.join(said)} would be needed"


def half_interval(parts: Sequence[Variance]) -> float:
    """Half of the 95% interval around what has the sum of these variances."""
    from scipy.special import stdtrit  # here, as importing it takes half a second

    known = [part for part in parts if part.value > 0]
    if not known:
        return 0.0
    total = sum(part.value for part in known)
    freedom = total**2 / sum(part.value**2 / part.freedom for part in known)
    return float(-stdtrit(freedom, OUTSIDE / 2) * np.sqrt(total))


def _first(numbers: range, enough: Callable[[int], bool]) -> int | None:
    return next(filter(enough, numbers), None)


def worse(comparison: Comparison, gate: GateParams) -> list[str]:
    """A line for each score that the gate holds and that the second group has lost.

    Raises:
        InputError: such a score can't be judged, as too few groups of images show it.
    """
    held = {"mean IoU": comparison.mean_iou}
    held |= {row.name: row.difference for row in comparison.rows() if row.name in gate.classes}
    lost = []
    for name, found in held.items():
        if found.half is None:
            raise InputError(
                f"gate: {name} can't be judged: fewer than two groups of the measured images show "
                "anything of it; measure more images, or take it out of gate.classes"
            )
        if found.value + found.half < -gate.tolerance:
            lost.append(f"{name}: {found.value:+.4f} ± {found.half:.4f}")
    return lost


def gather(results: Iterable[Result]) -> list[Group]:
    """Put the trainings together that differ in nothing but the seed, or the fold.

    Raises:
        InputError: a training is there twice, or some folds of it are missing.
    """
    alike: defaultdict[str, list[Result]] = defaultdict(list)
    for result in results:
        alike[json.dumps(_shared(result.per_image), sort_keys=True)].append(result)
    return [_group(same) for same in alike.values()]


def _shared(per_image: PerImage) -> dict[str, Any]:
    """All that an evaluation follows from but the seed and the fold."""
    origin = per_image.origin
    params = deepcopy(origin["params"])
    del params["train"]["seed"]
    return {**params, "data": origin["data"][:8], "code": origin["code"][:8]}


def _group(results: list[Result]) -> Group:
    trainings: defaultdict[tuple[int, int | None], dict[int | None, Result]] = defaultdict(dict)
    of_val = results[0].per_image.origin["params"]["evaluation"]["split"] == "val"
    for result in results:
        origin = result.per_image.origin
        fold, seed = origin["fold"], origin["params"]["train"]["seed"]
        # Each fold is measured on a val of its own, and all of them on one test split.
        training = (seed, None if of_val else fold)
        if other := trainings[training].get(fold):
            raise InputError(
                f"{other.name} and {result.name} are results of one training: seed {seed}"
                + (f", fold {fold}" if fold is not None else "")
                + "; name one of them"
            )
        trainings[training][fold] = result
    folds = set().union(*trainings.values())
    for (seed, _), parts in trainings.items():
        if of_val and parts.keys() != folds:
            lacking = ", ".join(map(str, sorted(folds - parts.keys(), key=str)))
            raise InputError(f"seed {seed} lacks fold {lacking}; name the same folds of each seed")
    first, *others = (_pooled([*parts.values()]) for parts in trainings.values())
    for one in others:
        check_same_images(first, one)
    areas = np.concatenate([first.areas, *(one.areas for one in others)], axis=1)
    return Group(results, first.names, first.groups, areas)


def _pooled(parts: list[Result]) -> Group:
    """A single training, its images in the order of their names."""
    images = [result.per_image for result in parts]
    names = np.concatenate([one.names for one in images])
    order = np.argsort(names, kind="stable")
    groups = np.concatenate([one.groups for one in images])
    areas = np.concatenate([one.areas() for one in images])[:, None]
    return Group(parts, names[order], groups[order], areas[order])


def check_same_images(first: Group, second: Group) -> None:
    """Refuse to compare what was measured on different images, or by different targets.

    Raises:
        InputError: names both, and the first thing in which they differ.
    """
    said = f"{first.name} and {second.name} can't be compared: "
    if first.classes != second.classes:
        raise InputError(
            said + f"their classes are {', '.join(first.classes)} and {', '.join(second.classes)}"
        )
    apart = sorted(set(first.names.tolist()) ^ set(second.names.tolist()))
    if apart:
        raise InputError(
            said + f"{len(apart)} images, as {apart[0]}, are in one of them alone; measure both on "
            "the same split of the same data"
        )
    labelled, labels = (group.areas[:, 0, 1] for group in (first, second))
    for what, changed in (
        ("targets", (labelled != labels).any(axis=1)),
        ("groups", first.groups != second.groups),
    ):
        if changed.any():
            raise InputError(
                said + f"the {what} of {changed.sum()} images, as {first.names[changed][0]}, are "
                "not the same; evaluate both on the same data"
            )


def compare(first: Group, second: Group) -> Comparison:
    """Whether the second is better.

    Raises:
        InputError: they were not measured on the same images.
    """
    check_same_images(first, second)
    areas = by_group(np.concatenate([first.areas, second.areas], axis=1), first.groups)
    each = sureness(areas)
    scores, drawn = iou_of(areas.sum(axis=0)), bootstrap(areas, iou_of)  # (R,C), (B,R,C)
    apart = _apart(drawn.swapaxes(1, 2), first.trainings)  # (B,C)
    classes = [
        _difference(scores[:, number], first.trainings, apart[:, number], sure)
        for number, sure in enumerate(each)
    ]
    joint = joint_sureness(apart, each)
    means = _apart(mean_of(drawn), first.trainings)
    return Comparison(
        first, second, _difference(mean_of(scores), first.trainings, means, joint), classes
    )


def _apart(scores: Scores, first: int) -> Scores:
    """How far the mean of the later trainings (...,R) is above that of the first ones."""
    return mean_of(scores[..., first:]) - mean_of(scores[..., :first])


def _difference(scores: Scores, first: int, drawn: Scores, sure: Sureness) -> Difference:
    """By the scores (R,) of trainings, the first ones and the others, and the draws' (B,)."""
    value = float(_apart(scores, first))
    if sure.freedom <= 0 or np.isnan(value):
        return Difference(value, None)
    images = Variance(float(drawn[~np.isnan(drawn)].var()) * sure.times, sure.freedom)
    seeds = tuple(
        Spread(float(part.var(ddof=1)), len(part))
        for part in (scores[:first], scores[first:])
        if len(part) > 1
    )
    return Difference(value, images, seeds)
