"""What the peer's sides of the rows share: its configurations as published, on the CPU.

Importing this puts a stub in the place of mmcv's compiled operators, which mmcv-lite lacks: mmcv
looks for their names when it is imported. No network of the rows calls one.
"""

import logging
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any


class Stub(ModuleType):
    """A module of which every name is a function that raises."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*_: Any, **__: Any) -> None:
            raise NotImplementedError(f"mmcv-lite has no compiled operator {name}")

        return missing


stub = Stub("mmcv._ext")
stub.__spec__ = ModuleSpec("mmcv._ext", None)  # mmengine asks whether it could be found
sys.modules.setdefault("mmcv._ext", stub)

import mmseg  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.logging import MMLogger  # noqa: E402
from mmengine.model import revert_sync_batchnorm  # noqa: E402
from mmseg.registry import DATASETS, MODELS  # noqa: E402
from mmseg.utils import register_all_modules  # noqa: E402

CONFIGS = Path(mmseg.__file__).parent / ".mim" / "configs"


def config(name: str) -> Any:
    """A published configuration by its path below configs/, without pretrained weights."""
    register_all_modules()
    MMLogger.get_instance("mmseg", logger_name="mmseg", log_level=logging.ERROR)
    loaded = Config.fromfile(CONFIGS / name)
    loaded.model.pretrained = None
    loaded.model.backbone.pop("init_cfg", None)
    return loaded


def model(loaded: Any, crop: tuple[int, int]) -> Any:
    """The network, with batch normalisation as its Runner has it in one process."""
    loaded.model.data_preprocessor.size = crop
    return revert_sync_batchnorm(MODELS.build(loaded.model))


def described(section: Any, root: Path, split: str) -> dict[str, Any]:
    """The section of a configuration's dataset, of a generated folder."""
    prefix = {"img_path": f"images/{split}", "seg_map_path": f"targets/{split}"}
    suffixes = {"img_suffix": ".jpg", "seg_map_suffix": ".png"}
    return {**section, "data_root": str(root), "data_prefix": prefix, **suffixes}


def dataset(loader: Any, root: Path, split: str, pipeline: Any) -> Any:
    """The dataset of a configuration's loader, on a generated folder."""
    return DATASETS.build({**described(loader.dataset, root, split), "pipeline": pipeline})
