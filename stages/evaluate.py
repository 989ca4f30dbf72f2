"""Stage 3: the best checkpoint -> metrics.json, plots and pictures, added to the training's run."""

import json
from pathlib import Path
from typing import Any

import torch

from pipeline import distributed
from pipeline.data.store import PREPARED, Store
from pipeline.disk import check_format
from pipeline.evaluation.baseline import colour_rule
from pipeline.evaluation.inference import Predictor, evaluate
from pipeline.evaluation.metrics import summarize
from pipeline.evaluation.report import choose, write_overlays, write_plots
from pipeline.experiment import Params, load_params
from pipeline.models import ModelParams, build_model
from pipeline.models.network import Labels
from pipeline.models.weights import averaged
from pipeline.params import flatten, plain
from pipeline.precision import PRECISIONS, Normalization
from pipeline.tracking import dvc_tags, git_tags, open_evaluation_run
from pipeline.training.checkpoint import Checkpoint, fill, load_checkpoint
from pipeline.training.state import Identity, State, evaluation_fingerprint
from stages import run_main

METRICS = Path("metrics.json")


def main() -> None:
    """Check the parameters, then evaluate here or hand over to torchrun."""
    params = load_params()
    Store(PREPARED).require_measured(params.evaluation.split)
    device = params.train.device
    processes = distributed.processes_here(device, params.train.gpus)  # any machine can evaluate
    if not distributed.hand_over("stages.evaluate", device, processes):
        with distributed.process_group(device) as own:
            run(params, own)


def run(params: Params, device: torch.device) -> None:
    """Measure the best checkpoint, or the last where the training was not validated."""
    work_dir = Path(params.train.work_dir)
    identity: Identity = json.loads((work_dir / "run.json").read_text(encoding="utf-8"))
    check_format(identity, work_dir / "run.json", "run `dvc repro -f train`")
    if distributed.rank() == 0:
        State(identity["fingerprint"]).finish()  # DVC has the training's outputs by now
    store = Store(PREPARED)
    split = store.split(params.evaluation.split)
    best, last = (work_dir / "checkpoints" / name for name in ("best.pt", "last.pt"))
    checkpoint = load_checkpoint(best if best.is_file() else last)
    predictor = load_predictor(params, checkpoint, device)

    num_classes, ignore_index = len(store.classes), store.ignore_index
    confusion, boundary, image_scores = evaluate(
        predictor,
        split,
        num_classes=num_classes,
        ignore_index=ignore_index,
        boundaries=True,
    )
    if distributed.rank() != 0:
        return
    scores = summarize(confusion, store.classes, boundary)
    summary = f"{params.evaluation.split}: mean IoU {scores['mean_iou']:.4f}"
    if params.evaluation.baseline is not None:
        colour = colour_rule(store.split("train"), split, num_classes, ignore_index)
        rule = summarize(colour, store.classes)
        scores["baseline"] = {name: rule[name] for name in ("mean_iou", "pixel_accuracy", "iou")}
        summary += f" (the colour rule: {rule['mean_iou']:.4f})"
    METRICS.write_text(json.dumps(scores, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    folder = work_dir / "evaluation"
    write_plots(folder, scores, confusion, store)
    write_overlays(
        folder / "overlays", predictor, split=split, chosen=choose(image_scores), store=store
    )
    record(params, store, identity=identity, scores=scores, folder=folder)
    print(summary)


def load_predictor(params: Params, checkpoint: Checkpoint, device: torch.device) -> Predictor:
    """The checkpoint's network with its own preprocessing, under the `evaluation` section."""
    trained = checkpoint["params"]
    backbone = trained["model"]["backbone"] | {"pretrained": None, "with_cp": False}
    described = json.dumps(trained["model"] | {"backbone": backbone})
    section = ModelParams.model_validate_json(described)
    distributed.seed_everything(trained["train"]["seed"], trained["train"]["deterministic"])
    classes = len(checkpoint["classes"])
    labels = Labels(classes, checkpoint["ignore_index"], checkpoint["frequency"])
    precision = PRECISIONS[trained["train"]["precision"]]
    network = build_model(section, labels)
    network.to(device, precision.weights).to(memory_format=torch.channels_last)
    fill(network, averaged(dict(checkpoint)), "the checkpoint")
    return Predictor(
        network,
        Normalization(section.mean, section.std, precision=precision, device=device),
        precision=precision,
        scale=trained["augmentation"]["scale"],
        window=params.evaluation.window,
        scales=params.evaluation.scales,
        flip=params.evaluation.flip,
        batch_size=params.evaluation.batch_size,
    )


def record(
    params: Params,
    store: Store,
    *,
    identity: Identity,
    scores: dict[str, Any],
    folder: Path,
) -> None:
    """Add settings, scores and pictures to the MLflow run of this result."""
    sections = plain(params)
    logged = {name: sections[name] for name in sections if name != "tracking"}
    fingerprint = evaluation_fingerprint(params.evaluation, store.md5, identity["fingerprint"])
    tags = {
        "fingerprint": identity["fingerprint"],
        "data.md5": store.md5,
        **git_tags(),
        **dvc_tags(),
    }
    tracker = open_evaluation_run(
        params.tracking,
        identity["run_id"],
        fingerprint=fingerprint,
        name=f"evaluation-{fingerprint[:8]}",
        parameters=flatten(logged),
        tags=tags,
        dataset=(store.name, store.md5, str(PREPARED)),
    )
    # Not under the split's name: val/ holds the training's validation, at one scale, unflipped.
    # At step 0 always: MLflow draws one step that is equal in all runs as bars.
    named = {f"evaluation/{name}": score for name, score in flatten(scores).items()}
    tracker.log({"iteration": 0, **named})
    tracker.log_artifacts([*sorted(folder.glob("*.tsv")), METRICS], "evaluation")
    tracker.log_artifacts([folder / "overlays"], "evaluation/overlays")
    tracker.finish("FINISHED")


if __name__ == "__main__":
    run_main(main)
