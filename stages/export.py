"""The stage of export/dvc.yaml: the trained model -> ONNX files, measured, and MLflow's model.

`dvc repro` leaves it alone, as its file is another than dvc.yaml: `dvc repro export/dvc.yaml` runs
it, after what it depends on.
"""

from pathlib import Path
from typing import Any

from pipeline import load_model
from pipeline.data.store import PREPARED, Store
from pipeline.disk import MODEL, write_json
from pipeline.experiment import Params, load_params
from pipeline.prediction.export import (
    described,
    export_onnx,
    in_one_view,
    open_session,
    quantize,
)
from pipeline.prediction.model import describe_file
from pipeline.prediction.parity import Measured, check, measure
from pipeline.provenance import dvc_tags, git_tags, read_identity
from pipeline.registry import log_version
from stages import run_main


def main() -> None:
    """Check the parameters, then export."""
    params = load_params()
    store = Store(PREPARED)
    store.require_measured(params.evaluation.split)
    run(params, store)


def run(params: Params, store: Store) -> None:
    """Export the model that is measured, compare it with torch, and have MLflow keep it."""
    work_dir = Path(params.train.work_dir)
    identity = read_identity(work_dir / "run.json")
    weights = work_dir / "checkpoints" / MODEL
    model = load_model(weights, "cpu")
    head = describe_file(weights).params.model.head.name
    predictor = in_one_view(model)
    folder = work_dir / "export"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".gitignore").write_text("*\n", encoding="utf-8")  # DVC does so for what it caches
    files = {"onnx": folder / "model.onnx", "int8": folder / "model.int8.onnx"}

    export_onnx(predictor, described(model), head, files["onnx"])
    quantize(files["onnx"], store.split("train"), predictor.scale, files["int8"])
    split = store.split(params.evaluation.split)
    measured = measure(
        predictor,
        {name: open_session(path) for name, path in files.items()},
        split,
        num_classes=len(store.classes),
        ignore_index=store.ignore_index,
    )
    scores = scores_of(measured, files, measured["onnx"].interval(split, store.classes))
    write_json(folder / "metrics.json", scores)
    check(measured["torch"], measured["onnx"])
    print(f"{params.evaluation.split}: {summary(scores)}")
    log_version(
        params.tracking,
        identity["run_id"],
        identity["run_key"],
        file=files["onnx"],
        example=split[0][0],
        scores=scores,
        tags={
            "fingerprint": identity["fingerprint"],
            "data.md5": store.md5,
            "split": params.evaluation.split,
            **git_tags(),
            **dvc_tags(),
        },
    )


def scores_of(
    measured: dict[str, Measured], files: dict[str, Path], interval: dict[str, float | None]
) -> dict[str, Any]:
    """What metrics.json holds: the file's scores, its difference from torch, the cost of int8."""
    onnx, int8 = measured["onnx"], measured["int8"]
    return {
        "mean_iou": onnx.mean_iou,
        **{f"mean_iou_{end}": value for end, value in interval.items()},
        "torch_mean_iou": measured["torch"].mean_iou,
        "differing_share": onnx.share,
        "bytes": files["onnx"].stat().st_size,
        "int8": {
            "mean_iou": int8.mean_iou,
            "mean_iou_cost": onnx.mean_iou - int8.mean_iou,
            "differing_share": int8.share,
            "bytes": files["int8"].stat().st_size,
        },
    }


def summary(scores: dict[str, Any]) -> str:
    """The result in a line."""
    int8 = scores["int8"]
    return (
        f"the ONNX file has a mean IoU of {scores['mean_iou']:.4f}, torch of "
        f"{scores['torch_mean_iou']:.4f}, and {scores['differing_share']:.2g} of the pixels "
        f"differ; "
        f"int8 has {int8['mean_iou']:.4f} in {int8['bytes'] / scores['bytes']:.0%} of the size"
    )


if __name__ == "__main__":
    run_main(main)
