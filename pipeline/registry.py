"""MLflow's registry of models: an exported network becomes a version, the best one has the alias.

As in `tracking/`, no failure of the store ends a stage: it is said in a line.
"""

import base64
import logging
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.data.table import Array
from pipeline.evaluation.report import png
from pipeline.tracking.store import (
    TrackingParams,
    brief_requests,
    connect,
    find_run,
    reason,
    store_uri,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger("instep")

SERVING = Path(__file__).with_name("serving.py")
# What serving.py imports beside MLflow, which adds itself: as tested, and nothing of torch.
REQUIREMENTS = ("numpy", "onnxruntime", "opencv-python", "pillow")
ALIAS = "best"
COMPARABLE = ("data.md5", "split")  # tags of versions whose scores are of the same images


def log_version(
    params: TrackingParams,
    run_id: str | None,
    key: str | None,
    file: Path,
    example: Array,
    scores: dict[str, Any],
    tags: dict[str, str],
) -> None:
    """Log an ONNX file as a model to serve, and register it if it has a name.

    It is logged on the training's run, which has this id or key.
    `example` is an image (H,W,3) that shows what the model is fed with. A version has `tags` and
    its scores; the alias moves to it where its mean IoU is higher, see `is_better`.
    """
    if not params.log_model and params.registered_model is None:
        return
    name = params.registered_model
    try:
        with brief_requests():
            client, experiment = connect(store_uri(params), params.experiment)
            run = find_run(client, experiment, run_id, key)
        if run is None:
            print(f"MLflow has no run {run_id} of the training: the model is logged nowhere")
            return
        tags = tags | {
            key: f"{scores[key]:.4f}"
            for key in ("mean_iou", "mean_iou_low", "mean_iou_high")
            if scores[key] is not None
        }
        number = _log(client, run.info, file=file, example=example, name=name, tags=tags)
        if name is None:
            return
        described = _description(scores, tags)
        client.update_model_version(name, number, described)
        if is_better(tags, best_tags(client, name)):
            client.set_registered_model_alias(name, ALIAS, number)
            print(f"MLflow's {name} has version {number}, its {ALIAS}: {described}")
        else:
            print(f"MLflow's {name} has version {number}, not its {ALIAS}: {described}")
    except Exception as error:
        print(f"warning: MLflow has not taken the model: {reason(error)}")


def best_tags(client: "MlflowClient", name: str) -> dict[str, str] | None:
    """The tags of the version that has the alias now; None where none has."""
    number = client.get_registered_model(name).aliases.get(ALIAS)
    return None if number is None else dict(client.get_model_version(name, str(number)).tags)


def is_better(tags: dict[str, str], best: dict[str, str] | None) -> bool:
    """Whether a version takes the alias from the best one: a higher mean IoU on the same images.

    Higher by any amount that its four digits show: on the same images the difference is not one of
    luck with images, and of two equally good ones either may serve. Scores of other images can't be
    compared, so there the alias stays until someone moves it.
    """
    if "mean_iou" not in tags:
        return False
    if best is None:
        return True
    alike = all(tags[key] == best.get(key) for key in COMPARABLE)
    return alike and float(tags["mean_iou"]) > float(best.get("mean_iou", "-1"))


def _description(scores: dict[str, Any], tags: dict[str, str]) -> str:
    said = f"mean IoU {tags.get('mean_iou', 'undefined')} on {tags['split']}"
    if scores["mean_iou_low"] is not None:
        said += f", with other images {tags['mean_iou_low']} to {tags['mean_iou_high']} (95%)"
    return said


def _log(
    client: "MlflowClient",
    run: Any,
    *,
    file: Path,
    example: Array,
    name: str | None,
    tags: dict[str, str],
) -> str:
    """Log the model on a run; its number as a version of `name`, empty without a name."""
    import mlflow
    import pandas as pd
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, Schema, TensorSpec
    from mlflow.types.schema import Map

    mlflow.set_tracking_uri(client.tracking_uri)
    mlflow.set_experiment(experiment_id=run.experiment_id)
    given = pd.DataFrame({"image": [base64.b64encode(png(example)).decode("ascii")]})
    answered: list[ColSpec | TensorSpec] = [
        ColSpec("string", "mask"),
        ColSpec("long", "height"),
        ColSpec("long", "width"),
        ColSpec(Map("long"), "areas"),
    ]
    logged = Model.log(
        artifact_path=None,
        name="onnx",
        flavor=mlflow.pyfunc,
        run_id=run.run_id,
        registered_model_name=name,
        tags=tags,
        python_model=str(SERVING),
        artifacts={"model": str(file)},
        signature=ModelSignature(Schema([ColSpec("string", "image")]), Schema(answered)),
        input_example=given,
        pip_requirements=[f"{one}=={version(one)}" for one in REQUIREMENTS],
    )
    return str(logged.registered_model_version or "")
