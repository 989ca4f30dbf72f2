"""Stage 3: the best checkpoint -> metrics.json, plots and pictures, added to the training's run."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pipeline import distributed
from pipeline.data.store import PREPARED, Store
from pipeline.data.transforms import DTYPES
from pipeline.evaluation.baseline import colour_rule
from pipeline.evaluation.inference import Predictor, build_predictor, evaluate
from pipeline.evaluation.metrics import summarize
from pipeline.evaluation.report import choose, write_overlays, write_plots
from pipeline.models import build_model
from pipeline.params import ModelParams, Params, flatten, load_params, plain
from pipeline.tracking import dvc_tags, git_tags, open_evaluation_run
from pipeline.training.checkpoint import Checkpoint, averaged, fill, load_checkpoint
from pipeline.training.state import State, evaluation_fingerprint

METRICS = Path("metrics.json")


def main() -> None:
    """Check the parameters, then evaluate here or hand over to torchrun."""
    params = load_params()
    Store(PREPARED).require_measured(params.evaluation.split)
    device, gpus = params.train.device, params.train.gpus
    processes = min(gpus, torch.cuda.device_count() or gpus)  # any machine can evaluate
    if not distributed.hand_over("stages.evaluate", device, processes):
        with distributed.process_group(device) as own:
            run(params, own)


def run(params: Params, device: torch.device) -> None:
    """Measure the best checkpoint, or the last where the training was not validated."""
    work_dir = Path(params.train.work_dir)
    identity = json.loads((work_dir / "run.json").read_text(encoding="utf-8"))
    if distributed.rank() == 0:
        State(identity["fingerprint"]).forget()  # DVC has the training's outputs by now
    store = Store(PREPARED)
    split = store.split(params.evaluation.split)
    best, last = (work_dir / "checkpoints" / name for name in ("best.pt", "last.pt"))
    checkpoint = load_checkpoint(best if best.is_file() else last)
    predictor = load_predictor(params, checkpoint, device)

    num_classes, ignore_index = len(store.classes), store.ignore_index
    confusion, boundary, image_scores = evaluate(
        predictor, split, num_classes, ignore_index, params.evaluation.batch_size, boundaries=True
    )
    if distributed.rank() != 0:
        return
    scores = summarize(confusion, store.classes, boundary)
    colour = colour_rule(store.split("train"), split, num_classes, ignore_index)
    rule = summarize(colour, store.classes)
    scores["baseline"] = {name: rule[name] for name in ("mean_iou", "pixel_accuracy", "iou")}
    METRICS.write_text(json.dumps(scores, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    folder = work_dir / "evaluation"
    write_plots(folder, scores, confusion, store)
    write_overlays(folder / "overlays", predictor, split, choose(image_scores), store)
    record(params, store, identity, scores, folder)
    ours, theirs = scores["mean_iou"], scores["baseline"]["mean_iou"]
    print(f"{params.evaluation.split}: mean IoU {ours:.4f} (the colour rule: {theirs:.4f})")


def load_predictor(params: Params, checkpoint: Checkpoint, device: torch.device) -> Predictor:
    """The checkpoint's model with its own preprocessing, under the `evaluation` section."""
    trained = checkpoint["params"]
    backbone = trained["model"]["backbone"] | {"pretrained": None, "with_cp": False}
    described = json.dumps(trained["model"] | {"backbone": backbone})
    model_params = ModelParams.model_validate_json(described)
    precision, deterministic = (trained["train"][name] for name in ("precision", "deterministic"))
    distributed.seed_everything(trained["train"]["seed"], deterministic)
    model = build_model(model_params, len(checkpoint["classes"]))
    model.to(device, DTYPES[precision]).to(memory_format=torch.channels_last)
    fill(model, averaged(checkpoint), "the checkpoint")
    scale = trained["augmentation"]["scale"]
    predictor = build_predictor(model, device, precision, model_params, scale, params.evaluation)
    return replace(predictor, scales=params.evaluation.scales, flip=params.evaluation.flip)


def record(
    params: Params,
    store: Store,
    identity: dict[str, Any],
    scores: dict[str, Any],
    folder: Path,
) -> None:
    """Add settings, scores and pictures to the MLflow run of this result."""
    sections = plain(params)
    logged = {name: sections[name] for name in sections if name != "tracking"}
    fingerprint = evaluation_fingerprint(params, store.md5, identity["fingerprint"])
    tags = {
        "fingerprint": identity["fingerprint"],
        "data.md5": store.md5,
        **git_tags(),
        **dvc_tags(),
    }
    tracker = open_evaluation_run(
        params.tracking,
        identity["run_id"],
        fingerprint,
        f"evaluation-{fingerprint[:8]}",
        flatten(logged),
        tags,
        (store.name, store.md5, str(PREPARED)),
    )
    # Not under the split's name: val/ holds the training's validation, at one scale, unflipped.
    # At step 0 always: MLflow draws one step that is equal in all runs as bars.
    named = {f"evaluation/{name}": score for name, score in flatten(scores).items()}
    tracker.log({"iteration": 0, **named})
    tracker.log_artifacts([*sorted(folder.glob("*.tsv")), METRICS], "evaluation")
    tracker.log_artifacts([folder / "overlays"], "evaluation/overlays")
    tracker.finish("FINISHED")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
