"""HTML files that need nothing beside them: no network, no other file."""

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipeline.data.table import Array
from pipeline.evaluation.report import png

FOLDER = Path(__file__).parent


def render(template: str, **content: Any) -> str:
    """A page by the name of its template. All that is filled in is escaped."""
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["score"] = score
    environment.filters["percent"] = percent
    environment.filters["number"] = "{:,}".format
    return environment.get_template(template).render(content)


def score(value: float | None) -> str:
    """Four digits, or a dash for what is undefined."""
    return "-" if value is None or value != value else f"{value:.4f}"


def percent(share: float | None) -> str:
    """A share in per cent with two digits, or a dash for what is undefined."""
    return "-" if share is None or share != share else f"{100 * share:.2f}%"


def embedded(picture: Array) -> str:
    """A picture (H,W,3) as the address of an <img>."""
    return address(png(picture), "png")


def address(content: bytes, kind: str) -> str:
    """The content of an image's file, png or jpeg, as the address of an <img>."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
