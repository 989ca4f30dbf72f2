"""params.yaml -> frozen, typed objects, by every rule there is about a parameter."""

import difflib
import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

Probability = Annotated[float, Field(ge=0, le=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[int, Field(ge=1)]
Size = tuple[Positive, Positive]
Grey = Annotated[int, Field(ge=0, le=255)]
Colour = tuple[Grey, Grey, Grey]
Above0 = Annotated[float, Field(gt=0)]
Weights = Annotated[tuple[Above0, ...], Field(strict=False)]  # a list, as YAML has it


class Section(BaseModel):
    """A part of params.yaml. Nothing is converted: `two` is no number and `1` is no boolean."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class SplitsParams(Section):
    """Where train, val and test come from."""

    source: Literal["given", "drawn"]
    val: Share
    test: Share
    seed: int = Field(ge=0)
    group_by: str | None

    @field_validator("group_by")
    @classmethod
    def _is_a_pattern(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"must be a regular expression: {error}") from None
        return pattern

    @model_validator(mode="after")
    def _leaves_some_for_training(self) -> Self:
        if self.val + self.test >= 1:
            raise ValueError(f"val + test is {self.val + self.test:g}; it must stay below 1")
        return self


class DataParams(Section):
    """What `prepare` reads and what it is called."""

    name: str = Field(min_length=1)
    format: Literal["bluemarble", "pairs"]
    root: str = Field(min_length=1)
    images: str = Field(min_length=1)
    targets: str = Field(min_length=1)
    classes: tuple[str, ...] = Field(min_length=2, max_length=255)
    palette: tuple[Colour, ...]
    ignore_index: Grey
    splits: SplitsParams

    @model_validator(mode="after")
    def _classes_agree(self) -> Self:
        if len(set(self.classes)) != len(self.classes):
            raise ValueError("classes: every name must stand once")
        if len(self.palette) != len(self.classes):
            raise ValueError(
                f"palette has {len(self.palette)} colours for {len(self.classes)} classes; "
                "give one [red, green, blue] a class"
            )
        if self.ignore_index < len(self.classes):
            raise ValueError(
                f"ignore_index {self.ignore_index} is the id of class "
                f"{self.classes[self.ignore_index]!r}; use 255 or another id "
                f"from {len(self.classes)} up"
            )
        if self.format == "bluemarble" and self.splits.source == "drawn":
            raise ValueError("splits.source: bluemarble is split by longitude; use `given`")
        return self


class FlipParams(Section):
    """Probabilities of mirroring an image."""

    horizontal: Probability
    vertical: Probability


class AugmentationParams(Section):
    """How a training sample is drawn from an image."""

    crop_size: Size
    scale: Size | None
    ratio_range: tuple[float, float]
    cat_max_ratio: float = Field(gt=0, le=1)
    flip: FlipParams
    photometric: bool

    @field_validator("ratio_range")
    @classmethod
    def _is_a_range(cls, ratios: tuple[float, float]) -> tuple[float, float]:
        if not 0 < ratios[0] <= ratios[1]:
            raise ValueError(f"must be [low, high] with 0 < low <= high, not {list(ratios)}")
        return ratios


class BackboneParams(Section):
    """The encoder, from timm."""

    name: Literal["resnet18", "resnet50c", "resnet101c", "efficientnet_lite0"]
    output_stride: Literal[8, 16, 32]
    pretrained: str | None
    with_cp: bool


class PSPNetParams(Section):
    """The pyramid pooling head."""

    pool_scales: tuple[Positive, ...] = Field(min_length=1)
    channels: Positive


class UNetParams(Section):
    """The U-Net decoder's channels, from the coarsest of its five stages to the finest."""

    channels: tuple[Positive, Positive, Positive, Positive, Positive]


class ModelParams(Section):
    """The network, and the normalisation its weights expect."""

    name: Literal["pspnet", "unet"]
    backbone: BackboneParams
    mean: tuple[float, float, float]
    std: tuple[
        Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]
    ]
    dropout: Fraction
    aux_weight: float = Field(ge=0)
    pspnet: PSPNetParams
    unet: UNetParams


class LossParams(Section):
    """The terms of the loss by their weights, 0 for none, and what some of them need."""

    cross_entropy: float = Field(ge=0)
    ohem: float = Field(ge=0)
    dice: float = Field(ge=0)
    focal: float = Field(ge=0)
    lovasz: float = Field(ge=0)
    tversky: float = Field(ge=0)
    avg_non_ignore: bool
    class_weights: Weights | Literal["balanced"] | None
    ohem_threshold: Probability
    ohem_min_kept: Positive

    @property
    def terms(self) -> dict[str, float]:
        """The weights of the terms that are on."""
        names = ("cross_entropy", "ohem", "dice", "focal", "lovasz", "tversky")
        return {name: getattr(self, name) for name in names if getattr(self, name) > 0}

    @field_validator("class_weights", mode="wrap")
    @classmethod
    def _are_weights(cls, given: Any, check: ValidatorFunctionWrapHandler) -> Any:
        try:
            return check(given)
        except ValidationError:
            raise ValueError(
                "must be null, balanced, or a list with a number above 0 for each class"
            ) from None

    @model_validator(mode="after")
    def _has_a_term(self) -> Self:
        if not self.terms:
            raise ValueError("every term has weight 0; give one of them, as cross_entropy, 1")
        if self.class_weights and not self.terms.keys() & {"cross_entropy", "ohem"}:
            raise ValueError(
                "class_weights weigh cross_entropy and ohem, and both are 0; set class_weights null"
            )
        return self


class ScheduleParams(Section):
    """The learning rate over the iterations."""

    policy: Literal["poly", "cosine"]
    power: float = Field(gt=0)
    min_lr: float = Field(ge=0)
    warmup_iters: int = Field(ge=0)
    warmup_ratio: Probability


class CheckpointParams(Section):
    """When the training can be taken up again."""

    interval: Positive


class TrainParams(Section):
    """The optimisation, and the machine it runs on."""

    gpus: Positive
    device: Literal["auto", "cuda", "cpu"]
    workers: int = Field(ge=0)
    batch_size: Positive
    accumulation: Positive
    iterations: Positive
    optimizer: Literal["sgd", "adamw"]
    lr: float = Field(gt=0)
    base_batch_size: Positive
    auto_scale_lr: bool
    momentum: Fraction
    weight_decay: float = Field(ge=0)
    decay_norm: bool
    head_lr_mult: float = Field(gt=0)
    clip_grad_norm: Above0 | None
    ema_decay: Share | None
    loss: LossParams
    schedule: ScheduleParams
    precision: Literal["fp32", "fp64", "bf16", "fp16"]
    seed: int = Field(ge=0, lt=2**32)
    deterministic: bool
    validation: bool = Field(alias="validate")
    work_dir: str = Field(min_length=1)
    resume_from: str | None
    load_from: str | None
    checkpoint: CheckpointParams

    @field_validator("work_dir")
    @classmethod
    def _stays_in_the_repository(cls, work_dir: str) -> str:
        path = Path(work_dir)
        if path.is_absolute() or ".." in path.parts or not path.parts:
            raise ValueError(
                f"must be a folder inside the repository, relative to it, not {work_dir!r}: "
                "DVC refuses any other output, and only after the training"
            )
        return work_dir

    @model_validator(mode="after")
    def _batch_is_divisible(self) -> Self:
        share = self.gpus * self.accumulation
        if self.batch_size % share:
            lower, upper = self.batch_size // share * share, -(-self.batch_size // share) * share
            nearest = f"{lower} or {upper}" if lower else f"{upper}"
            raise ValueError(
                f"batch_size {self.batch_size} is the batch of all processes together; it must be "
                f"divisible by gpus x accumulation = {self.gpus} x {self.accumulation}; "
                f"use {nearest}"
            )
        if self.resume_from and self.load_from:
            raise ValueError("resume_from and load_from exclude each other; set one of them null")
        if self.schedule.warmup_iters >= self.iterations:
            raise ValueError(
                f"schedule.warmup_iters {self.schedule.warmup_iters} must stay below "
                f"iterations {self.iterations}"
            )
        return self


class EvaluationParams(Section):
    """How a model is measured."""

    interval: Positive
    mode: Literal["whole", "slide"]
    crop: Size
    stride: Size
    split: Literal["val", "test"]
    flip: bool
    batch_size: Positive

    @model_validator(mode="after")
    def _windows_meet(self) -> Self:
        if any(step > side for step, side in zip(self.stride, self.crop, strict=True)):
            raise ValueError(
                f"stride {list(self.stride)} leaves pixels between windows of {list(self.crop)}; "
                "it must not exceed crop"
            )
        return self


class TrackingParams(Section):
    """Where and how often MLflow hears of a run."""

    uri: str | None
    experiment: str = Field(min_length=1)
    log_interval: Positive


class Params(Section):
    """The whole of params.yaml."""

    data: DataParams
    augmentation: AugmentationParams
    model: ModelParams
    train: TrainParams
    evaluation: EvaluationParams
    tracking: TrackingParams

    @model_validator(mode="after")
    def _every_class_has_a_weight(self) -> Self:
        weights, classes = self.train.loss.class_weights, len(self.data.classes)
        if isinstance(weights, tuple) and len(weights) != classes:
            raise ValueError(
                f"train.loss.class_weights has {len(weights)} numbers for the {classes} "
                "data.classes; give one a class, or balanced"
            )
        return self

    @model_validator(mode="after")
    def _pooled_batch_has_a_variance(self) -> Self:
        microbatch = self.train.batch_size // self.train.accumulation
        if self.model.name == "pspnet" and 1 in self.model.pspnet.pool_scales and microbatch < 2:
            raise ValueError(
                "train.batch_size / train.accumulation is 1, and the 1x1 pooling of the PSPNet "
                "leaves batch normalisation a single value a channel; use at least 2"
            )
        return self


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core schema, which DVC reads: PyYAML's own is 1.1 (`off` is False, `1e-3` text).

    Source: https://yaml.org/spec/1.2.2/#103-core-schema
    """


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    (
        "int",
        r"^[-+]?(?:[0-9][0-9_]*|0b[01_]+|0o[0-7_]+|0x[0-9a-fA-F_]+)$",
        list("-+0123456789"),
    ),
    (
        "float",
        r"^(?:[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.[0-9][0-9_]*(?:[eE][-+][0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        list("-+.0123456789"),
    ),
    ("merge", r"^(?:<<)$", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node)).replace("_", "")
    base = {"0b": 2, "0o": 8, "0x": 16}.get(text.lstrip("+-")[:2], 10)
    return int(text, base)


def _construct_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    names = [key.value for key, _ in node.value]
    for name in names:
        if names.count(name) > 1:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {name} stands twice", node.start_mark
            )
    loader.flatten_mapping(node)
    return {
        loader.construct_object(k): loader.construct_object(v, deep=True) for k, v in node.value
    }


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Loader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)


def read_yaml(path: Path) -> Any:
    """The content of a YAML 1.2 file, as DVC reads it.

    Raises:
        ValueError: the file is no YAML, with the line.
    """
    with path.open(encoding="utf-8") as file:
        try:
            return yaml.load(file, _Loader)
        except yaml.YAMLError as error:
            raise ValueError(f"{path} can't be read: {error}") from None


def load_params(path: Path = Path("params.yaml")) -> Params:
    """Read and check params.yaml.

    Raises:
        ValueError: every unknown key, wrong type and value out of range at once, each with the
            rule and, for a key, the nearest valid name.
    """
    document = read_yaml(path)
    if not isinstance(document, dict):
        raise ValueError(f"{path}: must hold the sections {', '.join(Params.model_fields)}")
    try:
        return Params.model_validate_json(json.dumps(document))
    except ValidationError as error:
        findings = [f"  {_explain(finding)}" for finding in error.errors()]
        raise ValueError("\n".join([f"{path} can't be used:", *findings])) from None
    except TypeError as error:  # a key or value that JSON has no word for
        raise ValueError(f"{path} can't be used: {error}") from None


def _explain(finding: Any) -> str:
    name = ".".join(str(part) for part in finding["loc"]) or "params"
    given = json.dumps(finding["input"]) if not isinstance(finding["input"], dict) else ""
    match finding["type"]:
        case "extra_forbidden":
            return f"{name}: no such parameter{_nearest(finding['loc'])}"
        case "missing":
            return f"{name}: missing; every parameter must stand in the file"
        case "value_error":
            return f"{name}: {finding['ctx']['error']}"
        case _:
            rule = finding["msg"].removeprefix("Input ")
            return f"{name}: {given} {rule}" if given else f"{name}: {rule}"


def _nearest(location: tuple[int | str, ...]) -> str:
    section: Any = Params
    for part in location[:-1]:
        section = section.model_fields[part].annotation
    names = [field.alias or name for name, field in section.model_fields.items()]
    close = difflib.get_close_matches(str(location[-1]), names, n=1, cutoff=0)
    return f"; did you mean {'.'.join([*map(str, location[:-1]), close[0]])}?" if close else ""


def main_checkout() -> Path:
    """The repository itself, also inside a temporary or queued experiment's workspace."""
    return Path(os.environ.get("DVC_ROOT", ".")).resolve()


def plain(section: Section) -> dict[str, Any]:
    """A section as plain dicts, lists and scalars, under the names of params.yaml."""
    return section.model_dump(mode="json", by_alias=True)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
