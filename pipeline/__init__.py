"""Instep as a library: `load_model` is all that one needs to use what was trained."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.prediction.model import load_model

__all__ = ["load_model"]


def __getattr__(name: str) -> Any:
    """Import torch and the networks when they are asked for, not with every module below."""
    if name == "load_model":
        from pipeline.prediction.model import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
