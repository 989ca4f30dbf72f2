"""`python -m stages.labels [NAME ...]`: images whose labels look wrong, for the annotators.

Each NAME is an experiment, a revision, an MLflow run or `workspace`; its model judges the images
that it was evaluated on, which it has not learned from. Folds together judge every image.
"""

import argparse
import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from pipeline.data.store import PREPARED, Split, Store
from pipeline.disk import write_text, writing
from pipeline.errors import InputError
from pipeline.experiment import Params, load_params
from pipeline.pages.labels import Suspect, labels_page, pictures
from pipeline.prediction.labels import Doubt, judge, ranked
from pipeline.prediction.model import Model, load_model
from pipeline.results import WORKSPACE, find, find_model
from stages import at_least_1, run_main

COLUMNS = ("quality", "unlikely share", "pixels", "left", "top", "width", "height")


def main() -> None:
    """Obey the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m stages.labels",
        description="Rank the images that a training was evaluated on by how wrong their labels "
        "look: a page with pictures, and a table for the annotators.",
    )
    parser.add_argument(
        "names",
        nargs="*",
        default=[WORKSPACE],
        metavar="NAME",
        help="by default what lies here",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("labels.html"), help="the page; %(default)s"
    )
    parser.add_argument(
        "--shown", type=at_least_1, default=24, metavar="N", help="images on the page; %(default)s"
    )
    options = parser.parse_args()
    params, store = load_params(), Store(PREPARED)
    held = store.by_name()
    models: dict[str, Model] = {}
    for images, model in judges(options.names, params, store):
        for image in images:
            if image not in held:
                raise InputError(f"{image} is not in {PREPARED}; run `dvc repro prepare`")
            if image in models:
                raise InputError(f"{image} was measured twice; name each fold, or one seed, once")
            models[image] = model
    doubts = [
        (image, judge(model, *held[image][0][held[image][1]])[0])
        for image, model in tqdm(models.items(), desc="judge", disable=None)
    ]
    listed = ranked(doubts)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_csv(options.out.with_suffix(".csv"), listed)
    suspects = [
        show(image, models[image], held[image], store) for image, _ in listed[: options.shown]
    ]
    legend = list(store.colours.items())
    write_text(options.out, labels_page(suspects, len(listed), legend))
    for image, doubt in listed[:5]:
        print(f"{doubt.quality:.4f}  {image}")
    print(f"as a page: {options.out}, and all of them in {options.out.with_suffix('.csv')}")


def judges(
    names: Sequence[str], params: Params, store: Store
) -> Iterator[tuple[Sequence[str], Model]]:
    """The images that each training was evaluated on, and its model."""
    for name in dict.fromkeys(names):
        per_image = find(name, params).per_image
        model = load_model(find_model(name, params))
        if list(model.classes) != list(store.classes):
            raise InputError(f"{name} has other classes than {PREPARED}")
        yield per_image.names.tolist(), model


def show(image: str, model: Model, place: tuple[Split, int], store: Store) -> Suspect:
    """An image with its pictures."""
    split, index = place
    photograph, target = split[index]
    doubt, prediction, unlikely = judge(model, photograph, target)
    layers = [photograph, target, prediction, unlikely]
    return Suspect(image, doubt, pictures(layers, doubt, store.palette))


def write_csv(path: Path, listed: Sequence[tuple[str, Doubt]]) -> None:
    """A row an image, the most doubtful first."""
    with writing(path), path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["image", *COLUMNS, "label", "looks like"])
        for image, doubt in listed:
            scores = [f"{doubt.quality:.6f}", f"{doubt.share:.6f}", doubt.pixels]
            table.writerow([image, *scores, *doubt.box, doubt.label, doubt.prediction])


if __name__ == "__main__":
    run_main(main)
