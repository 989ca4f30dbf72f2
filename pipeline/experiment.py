"""params.yaml as a whole: its sections together, and the rules between them.

Nothing here changes a result, it can only refuse one: so no stage depends on this file, and every
stage checks the whole of params.yaml before it works.
"""

from pathlib import Path
from typing import Any, Self

from pydantic import SerializeAsAny, field_validator, model_validator

from pipeline.data.params import DataParams
from pipeline.data.transforms import AugmentationParams
from pipeline.errors import InputError
from pipeline.evaluation.comparison import GateParams
from pipeline.evaluation.inference import EvaluationParams
from pipeline.launchers import LAUNCHERS, LauncherParams
from pipeline.models import ModelParams, head_of
from pipeline.params import Section, choose, one_of, read_section
from pipeline.tracking.store import TrackingParams
from pipeline.training.params import TrainParams


class Params(Section):
    """The whole of params.yaml."""

    data: DataParams
    augmentation: AugmentationParams
    model: ModelParams
    train: TrainParams
    evaluation: EvaluationParams
    tracking: TrackingParams
    launcher: SerializeAsAny[LauncherParams]
    gate: GateParams | None

    @field_validator("launcher", mode="before")
    @classmethod
    def _launcher_of_its_name(cls, given: Any) -> LauncherParams:
        return choose(LAUNCHERS, given)

    @model_validator(mode="after")
    def _batch_is_divisible(self) -> Self:
        nodes, gpus = self.launcher.machines, self.train.gpus
        share = nodes * gpus * self.train.accumulation
        if nodes > 1 and self.train.batch_size % share:
            raise InputError(
                f"train.batch_size {self.train.batch_size} is the batch of all processes together; "
                "it must be divisible by launcher.nodes x train.gpus x train.accumulation = "
                f"{nodes} x {gpus} x {self.train.accumulation}; use a multiple of {share}"
            )
        return self

    @model_validator(mode="after")
    def _every_class_has_a_weight(self) -> Self:
        weights = self.model.loss and self.model.loss.class_weights
        classes = len(self.data.classes)
        if isinstance(weights, tuple) and len(weights) != classes:
            raise InputError(
                f"model.loss.class_weights has {len(weights)} numbers for the {classes} "
                "data.classes; give one a class, or balanced"
            )
        return self

    @model_validator(mode="after")
    def _the_gate_holds_classes(self) -> Self:
        for name in self.gate.classes if self.gate else ():
            one_of("gate.classes", name, self.data.classes)
        return self

    @model_validator(mode="after")
    def _batch_suits_the_model(self) -> Self:
        head_of(self.model.head).check_batch(
            self.model.head, self.train.microbatch, self.augmentation.crop_size
        )
        return self


def load_params(path: Path = Path("params.yaml")) -> Params:
    """Read and check params.yaml.

    Raises:
        InputError: every unknown key, wrong type and value out of range at once, each with the
            rule and, for a key, the nearest valid name.
    """
    return read_section(Params, path)
