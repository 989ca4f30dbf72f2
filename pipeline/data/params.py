"""The section `data` of params.yaml: what `prepare` reads and what it is called."""

import unicodedata
from pathlib import Path
from typing import Annotated, Any, Self
from urllib.parse import urlsplit

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from pipeline.data.files import LARGEST
from pipeline.data.formats import FORMATS, Exif, FormatParams, Reader
from pipeline.errors import InputError
from pipeline.params import Colour, Grey, Positive, Section, choose


class DataParams(Section):
    """What `prepare` reads and what it is called.

    Pixels of `ignore_index` are neither learned nor measured. With `reduce_zero_label` id 0 becomes
    ignore_index and the others one less. A photograph is turned by its EXIF orientation unless
    `exif` is `ignore`, and so are those that the model will predict. A file of more than
    `max_pixels` is refused before it is decoded: a few bytes can claim billions.
    `allow_missing_classes` lets a class be without a pixel in train: nothing teaches it, and
    evaluation leaves it out unless it is predicted or labelled. `subset` takes so many images of
    each split, at equal distances, for a quick try. `store` is the URL of an object store for the
    pixels, as s3://bucket/folder, where this machine's disk is too small for them.
    """

    name: str = Field(min_length=1)
    format: SerializeAsAny[FormatParams]
    root: str = Field(min_length=1)
    classes: tuple[str, ...] = Field(min_length=2, max_length=255)
    palette: tuple[Colour, ...]
    ignore_index: Grey = 255
    reduce_zero_label: bool = False
    exif: Exif = "apply"
    max_pixels: int = Field(ge=1, le=LARGEST, default=200_000_000)
    allow_missing_classes: bool = False
    subset: Positive | None = None
    store: Annotated[str, Field(pattern=r"^[a-z][a-z0-9+.-]*://.+")] | None = None

    @property
    def num_ids(self) -> int:
        """The number of ids in the files, ignore_index aside."""
        return len(self.classes) + self.reduce_zero_label

    def reader(self) -> Reader[Any]:
        """The reader of the format."""
        reader = FORMATS[self.format.name]
        root = Path(self.root)
        return reader(
            root,
            self.classes,
            self.ignore_index,
            exif=self.exif,
            max_pixels=self.max_pixels,
            params=self.format,
        )

    @field_validator("root")
    @classmethod
    def _is_written_out(cls, root: str) -> str:
        if root.startswith("~"):
            raise InputError(f"write the whole path in place of {root!r}: DVC does not expand ~")
        return root

    @field_validator("store")
    @classmethod
    def _holds_no_password(cls, store: str | None) -> str | None:
        if store is not None and urlsplit(store).password is not None:
            raise InputError(
                "holds a password, which git would keep with params.yaml; leave it out here, and "
                "set it in the environment, as the store's own documentation says"
            )
        return store

    @field_validator("format", mode="before")
    @classmethod
    def _of_its_name(cls, given: Any) -> FormatParams:
        return choose({name: reader.Params for name, reader in FORMATS.items()}, given)

    @model_validator(mode="after")
    def _classes_agree(self) -> Self:
        first: dict[str, str] = {}
        for name in self.classes:
            if not name.strip() or name != name.strip():
                raise InputError(f"classes: {name!r} is empty, or begins or ends with a blank")
            other = first.setdefault(unicodedata.normalize("NFKC", name).casefold(), name)
            if other != name:
                raise InputError(
                    f"classes: {other!r} and {name!r} look alike, and some stores of MLflow take "
                    "them for one; give one of them another name"
                )
        if len(set(self.classes)) != len(self.classes):
            raise InputError("classes: every name must stand once")
        if len(self.palette) != len(self.classes):
            raise InputError(
                f"palette has {len(self.palette)} colours for {len(self.classes)} classes; "
                "give one [red, green, blue] a class"
            )
        if self.ignore_index < self.num_ids:
            name = self.classes[min(self.ignore_index, len(self.classes) - 1)]
            raise InputError(
                f"ignore_index {self.ignore_index} is the id of class {name!r}; use 255 or "
                f"another id from {self.num_ids} up"
            )
        self.format.check(self.classes, self.num_ids)
        return self
