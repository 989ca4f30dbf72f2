"""`python -m stages.predict INPUTS... --weights FILE|NAME --out DIR`: photographs of one's own."""

import argparse
import os
import sys
from itertools import chain
from pathlib import Path

import torch

from pipeline import distributed
from pipeline.disk import file_md5
from pipeline.errors import InputError, shown
from pipeline.experiment import load_params
from pipeline.launchers.torchrun import hand_over
from pipeline.prediction.batch import Folder, find_photographs, predict_files
from pipeline.prediction.model import load_model
from pipeline.results import WORKSPACE, find_model
from stages import at_least_1, run_main


def main() -> None:
    """Obey the command line, here or in the processes of torchrun."""
    options = parser().parse_args()
    find_photographs(options.inputs)  # whose names are in order
    weights = weights_file(options.weights)
    distributed.check_devices(options.device, options.gpus, "--")
    arguments = [*sys.argv[1:], "--weights", str(weights)]  # the last one counts
    if "WORLD_SIZE" in os.environ:
        distributed.die_with_parent()  # who is torchrun; a shell may end before a command does
    if hand_over("stages.predict", options.gpus, arguments):
        return
    with distributed.process_group(options.device) as device:
        run(options, weights, device)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    own = argparse.ArgumentParser(
        prog="python -m stages.predict",
        description="Predict photographs: masks, overlays, and the areas of the classes. "
        "The same command goes on where it was ended.",
    )
    own.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="a photograph, a folder of them, or a quoted pattern such as 'photos/*.jpg'",
    )
    own.add_argument(
        "--weights",
        default=WORKSPACE,
        metavar="FILE|NAME",
        help="a file that a training wrote, or the name of a DVC experiment, a git revision or an "
        "MLflow run; %(default)s is what lies here",
    )
    own.add_argument("--out", type=Path, required=True, metavar="DIR", help="the results' folder")
    own.add_argument(
        "--confidence", action="store_true", help="also how sure each pixel is, 0 to 255"
    )
    own.add_argument(
        "--probabilities",
        action="store_true",
        help="also those of all classes, as npy: (classes, height, width), 0 to 65535",
    )
    own.add_argument(
        "--scales",
        type=float,
        nargs="+",
        default=[1.0],
        metavar="RATIO",
        help="average over images of these ratios to the size of the training",
    )
    own.add_argument("--flip", action="store_true", help="average over the mirrored image, too")
    own.add_argument(
        "--batch-size", type=at_least_1, default=1, metavar="N", help="images of one size at once"
    )
    own.add_argument(
        "--gpus", type=at_least_1, default=1, metavar="N", help="processes, a GPU each"
    )
    own.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    return own


def weights_file(given: str) -> Path:
    """The file of weights that an option names.

    Raises:
        InputError: there is none.
    """
    return Path(given) if Path(given).is_file() else find_model(given, load_params())


def run(options: argparse.Namespace, weights: Path, device: torch.device) -> None:
    """Predict what is not predicted yet; fail in the end where a file could not be read."""
    photographs = find_photographs(options.inputs)
    folder = Folder(options.out, options.confidence, options.probabilities)
    if distributed.rank() == 0:
        views = {"scales": options.scales, "flip": options.flip}
        folder.claim({"weights": file_md5(weights), **views})
    distributed.barrier()
    todo = folder.missing(photographs)
    distributed.barrier()  # until all have read what is done, and nothing more is
    model = load_model(weights, str(device), scales=options.scales, flip=options.flip)
    problems = predict_files(model, todo, folder, options.batch_size)
    distributed.at("the gathering of what has failed")
    problems = [*chain(*distributed.gather_objects(problems))]
    if distributed.rank() != 0:
        return
    folder.write_areas(model.classes)
    done = len(photographs) - len(problems)
    print(f"{done} of {len(photographs)} photographs are predicted in {options.out}")
    if problems:
        lines = "\n".join(f"  {shown(problem)}" for problem in sorted(problems))
        raise InputError(f"{len(problems)} could not be read:\n{lines}")


if __name__ == "__main__":
    run_main(main)
