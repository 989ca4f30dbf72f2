"""Whether an exported network still says what torch says, and what its int8 form costs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pipeline.data.store import Split
from pipeline.errors import InputError
from pipeline.evaluation.inference import Predictor, predictions
from pipeline.evaluation.metrics import Matrix, confusion_matrix, iou_of, mean_of
from pipeline.evaluation.uncertainty import intervals
from pipeline.prediction.export import run_session

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

# Both compute in fp32 and add in another order: only pixels whose two best classes tie to the last
# digits may differ, at most a few in a hundred thousand. What is really wrong, as another rule of
# padding or resizing, moves every border, and so hundreds of times as many.
DIFFERING = 1e-4
# Half of the last digit in which scores are told here; so many pixels of a rare class may matter
# more than their number says.
COST = 1e-4


@dataclass(frozen=True)
class Measured:
    """What one form of a network finds in a split of N images.

    `areas` (N,3,C) are those of `iou_of`; of the `labelled` pixels so many as `differing` are of
    another class than torch says.
    """

    areas: Matrix
    differing: int
    labelled: int

    @property
    def mean_iou(self) -> float:
        """Mean IoU over all images, nan where no class has one."""
        return float(mean_of(iou_of(self.areas.sum(axis=0))))

    @property
    def share(self) -> float:
        """The differing share of the labelled pixels."""
        return self.differing / max(self.labelled, 1)

    def interval(self, split: Split, classes: Sequence[str]) -> dict[str, float | None]:
        """The 95% interval of mean IoU over other images, as an evaluation has it."""
        groups: NDArray[np.str_] = np.array([entry.group for entry in split.entries])
        found: dict[str, float | None] = intervals(self.areas, groups, classes)["mean_iou"]
        return found


def measure(
    predictor: Predictor,
    sessions: Mapping[str, "InferenceSession"],
    split: Split,
    num_classes: int,
    ignore_index: int,
) -> dict[str, Measured]:
    """What torch, under that name, and each of the sessions find in every image of a split."""
    areas: dict[str, list[Matrix]] = {name: [] for name in ("torch", *sessions)}
    differing = dict.fromkeys(areas, 0)
    labelled = 0
    for index, target, prediction in predictions(predictor, split, list(range(len(split)))):
        image, known = split[index][0], target != ignore_index
        labelled += int(known.sum())
        found = {"torch": prediction}
        for name, session in sessions.items():
            (found[name],) = run_session(session, [image], predictor.scale)
        for name, classes in found.items():
            confusion = confusion_matrix(target, classes, num_classes, ignore_index)
            sides = [np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)]
            areas[name].append(np.stack(sides))
            differing[name] += int((classes != prediction)[known].sum())
    return {name: Measured(np.stack(areas[name]), differing[name], labelled) for name in areas}


def check(torch: Measured, onnx: Measured) -> None:
    """Refuse an export that says something else.

    Raises:
        InputError: gives both numbers and the rule.
    """
    cost = abs(torch.mean_iou - onnx.mean_iou)
    if onnx.share > DIFFERING or cost > COST:
        raise InputError(
            f"the exported network differs from torch's at {onnx.differing} of {onnx.labelled} "
            f"labelled pixels, a share of {onnx.share:.2g}, and by {cost:.2g} of mean IoU; "
            f"{DIFFERING:g} and {COST:g} are the most that ties and last digits explain, so don't "
            "use the file; predict with the checkpoint (python -m stages.predict) and report it"
        )
