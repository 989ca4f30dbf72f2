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

MODELS = (
    "deeplabv3",
    "deeplabv3plus",
    "fcn",
    "pointrend",
    "pspnet",
    "segformer",
    "semantic_fpn",
    "unet",
    "upernet",
)
LIBRARY = "smp."  # what the names of segmentation_models_pytorch's networks begin with
BACKBONES = (
    "resnet18",
    "resnet18c",
    "resnet50c",
    "resnet101c",
    "efficientnet_lite0",
    *(f"mit_b{size}" for size in range(6)),
)


class Section(BaseModel):
    """A part of params.yaml. Nothing is converted: `two` is no number and `1` is no boolean."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class SplitsParams(Section):
    """Where train, val and test come from."""

    source: Literal["given", "drawn", "files"]
    val: Fraction
    test: Fraction
    seed: int = Field(ge=0)
    group_by: str | None
    folds: Annotated[int, Field(ge=2)] | None
    fold: int = Field(ge=0)

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

    @model_validator(mode="after")
    def _fold_is_one_of_the_folds(self) -> Self:
        if self.folds is not None and self.source != "drawn":
            raise ValueError(f"folds are drawn, and source is {self.source}; use `drawn`, or null")
        if self.fold >= (self.folds or 1):
            last = f"at most {self.folds - 1}" if self.folds else "0, or give the number of folds"
            raise ValueError(f"fold {self.fold} of {self.folds} folds; use {last}")
        return self


class DataParams(Section):
    """What `prepare` reads and what it is called."""

    name: str = Field(min_length=1)
    format: Literal["bluemarble", "pairs", "ade20k", "cityscapes", "voc"]
    root: str = Field(min_length=1)
    images: str = Field(min_length=1)
    targets: str = Field(min_length=1)
    target_suffixes: tuple[str, ...] = Field(min_length=1)
    color_map: tuple[Colour, ...] | None
    classes: tuple[str, ...] = Field(min_length=2, max_length=255)
    palette: tuple[Colour, ...]
    ignore_index: Grey
    reduce_zero_label: bool
    splits: SplitsParams

    @field_validator("images", "targets")
    @classmethod
    def _lies_below_the_root(cls, folder: str) -> str:
        if Path(folder).is_absolute() or ".." in Path(folder).parts:
            raise ValueError(
                f"must be a folder below data.root, not {folder!r}: DVC watches data.root alone"
            )
        return folder

    @property
    def num_ids(self) -> int:
        """The number of ids in the files, ignore_index aside."""
        return len(self.classes) + self.reduce_zero_label

    @model_validator(mode="after")
    def _classes_agree(self) -> Self:
        if len(set(self.classes)) != len(self.classes):
            raise ValueError("classes: every name must stand once")
        if len(self.palette) != len(self.classes):
            raise ValueError(
                f"palette has {len(self.palette)} colours for {len(self.classes)} classes; "
                "give one [red, green, blue] a class"
            )
        if self.ignore_index < self.num_ids:
            name = self.classes[min(self.ignore_index, len(self.classes) - 1)]
            raise ValueError(
                f"ignore_index {self.ignore_index} is the id of class {name!r}; use 255 or "
                f"another id from {self.num_ids} up"
            )
        return self

    @model_validator(mode="after")
    def _colours_agree(self) -> Self:
        if self.color_map is None:
            return self
        if len(set(self.color_map)) != len(self.color_map):
            raise ValueError("color_map: every colour must stand once")
        if len(self.color_map) != self.num_ids:
            raise ValueError(
                f"color_map has {len(self.color_map)} colours for {self.num_ids} ids; give one "
                "[red, green, blue] a class, and with reduce_zero_label first the one to ignore"
            )
        return self

    @model_validator(mode="after")
    def _layout_is_the_formats(self) -> Self:
        if self.format == "pairs":
            return self
        if self.splits.source != "given":
            raise ValueError(f"splits.source: {self.format} has splits of its own; use `given`")
        if self.color_map is not None or self.target_suffixes != ("",):
            raise ValueError(
                f"color_map and target_suffixes are for format pairs, and format is {self.format}; "
                'use null and [""]'
            )
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

    name: str = Field(min_length=1)
    output_stride: Literal[8, 16, 32]
    pretrained: str | None
    with_cp: bool
    drop_path: Fraction
    freeze: bool = False


class FCNParams(Section):
    """The fully convolutional head."""

    channels: Positive
    convs: Positive


class PyramidParams(Section):
    """The heads that pool at several scales: PSPNet and UPerNet."""

    pool_scales: tuple[Positive, ...] = Field(min_length=1)
    channels: Positive


class DeepLabParams(Section):
    """DeepLabV3 and V3+."""

    channels: Positive
    dilations: tuple[Positive, ...] = Field(min_length=1)
    low_level_channels: Positive


class ChannelsParams(Section):
    """A head with one width: Semantic FPN and SegFormer."""

    channels: Positive


class PointRendParams(Section):
    """The point head; its coarse head has the parameters of Semantic FPN."""

    point_channels: Positive
    train_points: Positive
    oversample_ratio: float = Field(ge=1)
    importance_ratio: Probability
    subdivision_steps: int = Field(ge=0)
    subdivision_points: Positive


class UNetParams(Section):
    """The U-Net decoder's channels, from the coarsest of its five stages to the finest."""

    channels: tuple[Positive, Positive, Positive, Positive, Positive]


class ModelParams(Section):
    """The network, and the normalisation its weights expect."""

    name: str
    backbone: BackboneParams
    mean: tuple[float, float, float]
    std: tuple[Above0, Above0, Above0]
    dropout: Fraction
    aux_weight: float = Field(ge=0)
    deeplab: DeepLabParams
    fcn: FCNParams
    pointrend: PointRendParams
    pspnet: PyramidParams
    segformer: ChannelsParams
    semantic_fpn: ChannelsParams
    unet: UNetParams
    upernet: PyramidParams

    @model_validator(mode="after")
    def _network_exists(self) -> Self:
        backbone, transformer = self.backbone, self.backbone.name.startswith("mit_")
        if self.name.startswith(LIBRARY):
            off = {
                "dropout": self.dropout,
                "aux_weight": self.aux_weight,
                "backbone.drop_path": backbone.drop_path,
                "backbone.with_cp": backbone.with_cp,
                "backbone.output_stride": backbone.output_stride - 32,
            }
            if wrong := [name for name, value in off.items() if value]:
                raise ValueError(
                    f"{', '.join(wrong)}: a network of {LIBRARY}* has its own; set output_stride "
                    "to 32, with_cp to false and the others to 0"
                )
            return self
        _one_of("name", self.name, MODELS, f", or {LIBRARY}<Architecture>")
        _one_of("backbone.name", backbone.name, BACKBONES)
        if transformer and backbone.output_stride != 32:
            raise ValueError(
                f"backbone.output_stride {backbone.output_stride}: {backbone.name} has no dilated "
                "form; use 32"
            )
        if transformer and self.name == "unet":
            raise ValueError(
                f"backbone.name {backbone.name} has no features of stride 2, which unet needs; use "
                "a resnet or efficientnet_lite0, or another head"
            )
        return self


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
    iterations: int = Field(ge=0)
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
    rare_class_temperature: Above0 | None
    precision: Literal["fp32", "fp64", "bf16", "fp16"]
    seed: int = Field(ge=0, lt=2**32)
    deterministic: bool
    validation: bool = Field(alias="validate")
    work_dir: str = Field(min_length=1)
    resume_from: str | None
    load_from: str | None
    load_strict: bool
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
        return self


class EvaluationParams(Section):
    """How a model is measured."""

    interval: Positive
    mode: Literal["whole", "slide"]
    crop: Size
    stride: Size
    split: Literal["val", "test"]
    scales: tuple[Above0, ...] = Field(min_length=1)
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
    def _batch_suits_the_model(self) -> Self:
        microbatch = self.train.batch_size // self.train.accumulation
        pooled = {
            "pspnet": 1 in self.model.pspnet.pool_scales,
            "upernet": 1 in self.model.upernet.pool_scales,
            "deeplabv3": True,
            "deeplabv3plus": True,
        }
        if pooled.get(self.model.name) and microbatch < 2:
            raise ValueError(
                f"train.batch_size / train.accumulation is 1, and the 1x1 pooling of "
                f"{self.model.name} leaves batch normalisation a single value a channel; use at "
                "least 2"
            )
        if self.model.name.startswith(LIBRARY) and any(
            side % 32 for side in self.augmentation.crop_size
        ):
            nearest = [max(32, round(side / 32) * 32) for side in self.augmentation.crop_size]
            raise ValueError(
                f"augmentation.crop_size {list(self.augmentation.crop_size)}: {self.model.name} "
                f"is trained on sides that 32 divides; use {nearest}"
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


def _one_of(name: str, given: str, valid: tuple[str, ...], also: str = "") -> None:
    if given not in valid:
        (close,) = difflib.get_close_matches(given, valid, n=1, cutoff=0)
        raise ValueError(
            f"{name} {given!r} is unknown; did you mean {close}? "
            f"It is one of {', '.join(valid)}{also}"
        )


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
