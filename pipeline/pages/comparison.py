"""The page of a comparison: the answer, both scores class by class, the images that differ most."""

from collections.abc import Mapping
from typing import NamedTuple

import cv2
import numpy as np

from pipeline.data.store import Store
from pipeline.evaluation.comparison import Comparison, Group
from pipeline.evaluation.report import blend, shrunk
from pipeline.evaluation.uncertainty import DRAWS
from pipeline.pages import embedded, render
from pipeline.params import differing

SHOWN = 6  # images
LONGEST = 640  # pixels of a picture's longer side: a page shows it no larger


class Picture(NamedTuple):
    """What an <img> needs."""

    label: str
    source: str


def comparison_page(
    groups: Mapping[str, Group],
    comparisons: Mapping[str, Comparison],
    store: Store | None,
) -> str:
    """HTML. Groups and comparisons are by letter: a comparison is of its group with the first.

    Pictures need the prepared data set that was measured, and the masks that its results kept.
    """
    first = next(iter(groups))
    if store and list(store.classes) != groups[first].classes:
        store = None
    photos = _Photos(store, groups[first]) if store else None
    return render(
        "comparison.html",
        first=first,
        groups=groups,
        differing=differing([group.params for group in groups.values()]),
        comparisons=comparisons,
        draws=f"{DRAWS:,}",
        shown=SHOWN,
        pictures={
            letter: {
                place: photos.pictures(place, {first: one.first, letter: one.second})
                for place in one.furthest(SHOWN)
            }
            for letter, one in comparisons.items()
            if photos
        },
        legend=list(store.colours.items()) if store else [],
    )


class _Photos:
    """The images of a group, by their places, where the prepared data set holds the same ones."""

    def __init__(self, store: Store, group: Group) -> None:
        self._store = store
        self._names = group.names.tolist()
        self._labelled = group.areas[:, 0, 1]
        self._held = store.by_name()

    def pictures(self, place: int, groups: Mapping[str, Group]) -> list[Picture]:
        """The image, its target over it, and the first prediction that each group has kept."""
        name = self._names[place]
        if name not in self._held:
            return []
        split, index = self._held[name]
        image, target = split[index]
        counts = np.bincount(target.ravel(), minlength=256)[: self._labelled.shape[1]]
        if not np.array_equal(counts, self._labelled[place]):
            return []  # an image of this name in other data
        maps = {"target": target}
        for letter, group in groups.items():
            kept = (result.mask(name) for result in group.results)
            mask = next((mask for mask in kept if mask is not None), None)
            if mask is not None:
                maps[f"{letter}'s prediction"] = mask
        image = shrunk(image, LONGEST, cv2.INTER_AREA)
        layers = {"image": image} | {
            label: blend(image, shrunk(labels, LONGEST, cv2.INTER_NEAREST), self._store.palette)
            for label, labels in maps.items()
        }
        return [Picture(label, embedded(layer)) for label, layer in layers.items()]
