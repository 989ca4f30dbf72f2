"""The section `train` of params.yaml: the optimisation, and the machine it runs on."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from pipeline.errors import InputError
from pipeline.params import (
    Above0,
    AtLeast0,
    Batch,
    Count,
    Few,
    Fraction,
    Positive,
    Probability,
    Section,
    Share,
)


class ScheduleParams(Section):
    """The learning rate over the iterations: see `optimization.learning_rate`."""

    policy: Literal["poly", "cosine"]
    power: AtLeast0
    min_lr: Annotated[float, Field(ge=0, le=1000)]
    warmup_iters: Count
    warmup_ratio: Probability


class EarlyStopParams(Section):
    """See `loop.stopped_early`."""

    patience: Positive
    min_gain: AtLeast0 = 0.0


class CheckpointParams(Section):
    """`interval` iterations lie between two moments that a killed training goes on from."""

    interval: Positive


class TrainParams(Section):
    """Every key is explained beside it in params.yaml."""

    gpus: Few
    parallel: Literal["ddp", "fsdp"]
    device: Literal["auto", "cuda", "cpu"]
    workers: int = Field(ge=0, le=1024)
    timeout: Annotated[int, Field(ge=1, le=86400)]
    batch_size: Batch
    accumulation: Batch
    iterations: Count
    extend: Count
    optimizer: Literal["sgd", "adamw"]
    lr: Annotated[float, Field(gt=0, le=1000)]
    base_batch_size: Batch
    auto_scale_lr: bool
    momentum: Fraction
    weight_decay: AtLeast0
    decay_norm: bool
    head_lr_mult: Above0
    layer_decay: Annotated[float, Field(gt=0, le=1)]
    clip_grad_norm: Above0 | None
    leave_out_nonfinite: Count
    ema_decay: Share | None
    schedule: ScheduleParams
    shuffle: Literal["full", "blocks"]
    rare_class_temperature: Annotated[float, Field(ge=1e-4, le=1e6)] | None
    precision: Literal["fp32", "fp64", "bf16", "fp16"]
    seed: int = Field(ge=0, lt=2**32)
    deterministic: bool
    validation: bool = Field(alias="validate")
    early_stop: EarlyStopParams | None
    work_dir: str = Field(min_length=1)
    resume_from: str | None
    load_from: str | None
    load_strict: bool
    checkpoint: CheckpointParams

    @property
    def total(self) -> int:
        """Iterations of the whole training, its extension included."""
        return self.iterations + self.extend

    def horizon(self, iteration: int) -> int:
        """Where the schedule that holds in an iteration ends: that of an extension begins late."""
        return self.iterations if iteration < self.iterations else self.total

    @property
    def doubts(self) -> list[str]:
        """What may be meant as it is, and seldom is, a line each."""
        warmup = self.schedule.warmup_iters
        if not 0 < self.iterations <= warmup:
            return []
        return [
            f"train.schedule.warmup_iters {warmup} is not below train.iterations "
            f"{self.iterations}: the learning rate never gets to train.lr"
        ]

    @property
    def microbatch(self) -> int:
        """Images that all processes together compute at once."""
        return self.batch_size // self.accumulation

    @field_validator("work_dir")
    @classmethod
    def _stays_in_the_repository(cls, work_dir: str) -> str:
        path = Path(work_dir)
        if path.is_absolute() or ".." in path.parts or not path.parts:
            raise InputError(
                f"must be a folder inside the repository, relative to it, not {work_dir!r}: "
                "DVC refuses any other output, and only after the training"
            )
        return work_dir

    @model_validator(mode="after")
    def _one_order(self) -> Self:
        if self.shuffle == "blocks" and self.rare_class_temperature is not None:
            raise InputError(
                "shuffle: blocks reads each shard once an epoch, and rare_class_temperature draws "
                "from all; set one of them to full and null"
            )
        return self

    @model_validator(mode="after")
    def _batch_is_divisible(self) -> Self:
        share = self.gpus * self.accumulation
        if rest := self.batch_size % share:
            lower = self.batch_size - rest
            near = f"{lower} or {lower + share}" if lower else str(share)
            raise InputError(
                f"batch_size {self.batch_size} is the batch of all processes together; it must be "
                f"divisible by gpus x accumulation = {self.gpus} x {self.accumulation}; "
                f"use {near}"
            )
        return self

    @model_validator(mode="after")
    def _can_stop_early(self) -> Self:
        if self.early_stop and not self.validation:
            raise InputError("early_stop goes by validations; it needs validate: true")
        if self.early_stop and self.extend:
            raise InputError("a training with early_stop can't be extended: set one of them to 0")
        return self

    @model_validator(mode="after")
    def _starts_from_one_file(self) -> Self:
        if self.resume_from and self.load_from:
            raise InputError("resume_from and load_from exclude each other; set one of them null")
        return self
