"""Stage 3: the best checkpoint -> predictions, scores and pictures, added to the training's run."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline import distributed
from pipeline.data.store import PREPARED, Store
from pipeline.data.table import Array
from pipeline.disk import MODEL, write_json
from pipeline.evaluation.baseline import colour_rule
from pipeline.evaluation.inference import Predictor, evaluate_images
from pipeline.evaluation.metrics import iou_of, mean_of, summarize
from pipeline.evaluation.per_image import PER_IMAGE, Origin, PerImage
from pipeline.evaluation.reliability import CALIBRATION, Reliability, calibration_of
from pipeline.evaluation.report import Masks, choose, write_overlays, write_plots
from pipeline.evaluation.uncertainty import intervals
from pipeline.experiment import Params, load_params
from pipeline.launchers.slurm import run_as_job
from pipeline.launchers.torchrun import hand_over
from pipeline.params import flatten, plain
from pipeline.prediction.calibration import calibrated
from pipeline.prediction.model import build_predictor, describe, describe_file
from pipeline.provenance import Identity, dvc_tags, git_tags, read_identity, rebuild_commands
from pipeline.tracking.store import INTERVAL_TAG
from pipeline.tracking.tracker import open_evaluation_run
from pipeline.training.checkpoint import Checkpoint, load_checkpoint
from pipeline.training.state import State, evaluation_code, evaluation_fingerprint
from stages import keep_freed_memory, run_main

METRICS = Path("metrics.json")
# Of `evaluation`, what a result follows from that the training knows nothing of.
MEASURED = ("mode", "crop", "stride", "split", "scales", "flip")
HEADLINE = ("mean_iou", "pixel_accuracy", "mean_dice", "mean_boundary_iou")


def main() -> None:
    """Check the parameters, then evaluate here or hand over to torchrun."""
    distributed.die_with_parent()
    keep_freed_memory()
    params = load_params()
    store = Store(PREPARED)
    store.require_measured(params.evaluation.split)
    if job := params.launcher.job("evaluate"):
        run_as_job("stages.evaluate", (), job)
        return
    device = params.train.device
    processes = distributed.processes_here(device, params.train.gpus)  # any machine can evaluate
    if not hand_over("stages.evaluate", processes):
        with distributed.process_group(device, params.train.timeout) as own:
            run(params, store, own)


def run(params: Params, store: Store, device: torch.device) -> None:
    """Measure the best checkpoint, or the last where the training was not validated."""
    work_dir = Path(params.train.work_dir)
    identity = read_identity(work_dir / "run.json")
    if distributed.rank() == 0:
        State(identity["fingerprint"]).finish()  # DVC has the training's outputs by now
    split = store.split(params.evaluation.split)
    needed = [params.evaluation.split, *(["train"] if params.evaluation.baseline else [])]
    verification = store.verification(
        *(needed if distributed.rank() == 0 else ()), alive=distributed.alive
    )
    best, last = (work_dir / "checkpoints" / name for name in ("best.pt", "last.pt"))
    path = best if best.is_file() else last
    checkpoint = load_checkpoint(path)
    predictor = predictor_of(params, checkpoint, path, device)

    num_classes, ignore_index = len(store.classes), store.ignore_index
    folder = work_dir / "evaluation"
    masks = Masks(work_dir, split, store.palette)
    if distributed.rank() == 0:
        masks.clear()
    distributed.barrier()
    sureness = Sureness(num_classes, work_dir / "checkpoints" / MODEL)
    verification.finish()
    found = evaluate_images(
        predictor,
        split,
        num_classes=num_classes,
        ignore_index=ignore_index,
        keep=masks.write,
        look=sureness.add,
    )
    sureness.share(device)
    if distributed.rank() != 0:
        return
    names, groups = zip(*((entry.name, entry.group) for entry in split.entries), strict=True)
    per_image = PerImage.of(origin(params, store, checkpoint, identity), names, groups, found)
    confusion = per_image.confusion()
    areas = per_image.areas()
    scores = summarize(confusion, store.classes, per_image.boundary.sum(axis=0))
    scores["interval"] = intervals(areas, per_image.groups, store.classes)
    if params.evaluation.baseline is not None:
        colour = colour_rule(store.split("train"), split, num_classes, ignore_index)
        rule = summarize(colour, store.classes)
        scores["baseline"] = {name: rule[name] for name in ("mean_iou", "pixel_accuracy", "iou")}
    per_image.save(work_dir / PER_IMAGE)
    write_json(folder / "scores.json", scores)
    write_json(METRICS, headline(scores))
    told = calibration_of(sureness.tables, sureness.temperature, store.classes)
    write_json(work_dir / CALIBRATION, told)
    write_plots(folder, scores, confusion, store)
    chosen = choose(mean_of(iou_of(areas)).tolist())
    write_overlays(folder / "overlays", masks, split=split, chosen=chosen, store=store)
    record(params, store, identity=identity, scores=scores, folder=folder)
    print(f"{params.evaluation.split}: {summary(scores)}")


class Sureness:
    """How sure the network is of its predictions, and how often it is right then.

    `tables` has them `raw` and, where the exported model at `path` has a temperature, `calibrated`.
    """

    def __init__(self, num_classes: int, path: Path) -> None:
        self.temperature = describe_file(path).temperature
        names = ("raw", "calibrated") if self.temperature else ("raw",)
        self.tables = {name: Reliability.empty(num_classes) for name in names}

    def add(self, probabilities: Tensor, labels: Array) -> None:
        """Count pixels by their probabilities (P,C) and labels (P,)."""
        given = {"raw": probabilities, "calibrated": calibrated(probabilities, self.temperature)}
        for name, table in self.tables.items():
            table.add(given[name].cpu().numpy(), labels)

    def share(self, device: torch.device) -> None:
        """Add up what all processes have counted."""
        distributed.at("the sum of how sure the network was")
        for table in self.tables.values():
            counts = torch.from_numpy(table.counts).to(device)
            table.counts = distributed.sum_over_ranks(counts).cpu().numpy()


def origin(params: Params, store: Store, checkpoint: Checkpoint, identity: Identity) -> Origin:
    """What was measured here, and by what."""
    trained, settings = checkpoint["params"], plain(params.evaluation)
    asked = {name: settings[name] for name in MEASURED}
    return Origin(
        classes=store.classes,
        params=trained | {"evaluation": trained["evaluation"] | asked},
        code=evaluation_code(identity["code"]),
        data=store.content,
        fold=store.fold,
    )


def headline(scores: dict[str, Any]) -> dict[str, float | None]:
    """What metrics.json holds, and so the table of experiments: scores.json holds them all."""
    chosen = {name: scores[name] for name in HEADLINE}
    chosen |= {f"mean_iou_{end}": value for end, value in scores["interval"]["mean_iou"].items()}
    if "baseline" in scores:
        chosen["baseline_mean_iou"] = scores["baseline"]["mean_iou"]
    return chosen


def summary(scores: dict[str, Any]) -> str:
    """The result in a line."""
    low, high = scores["interval"]["mean_iou"].values()
    said = f"mean IoU {scores['mean_iou']:.4f}"
    if low is not None:
        said += f", with other images {low:.4f} to {high:.4f} (95%)"
    if "baseline" in scores:
        said += f"; the colour rule: {scores['baseline']['mean_iou']:.4f}"
    return said


def predictor_of(
    params: Params, checkpoint: Checkpoint, path: Path, device: torch.device
) -> Predictor:
    """The checkpoint's network with its own preprocessing, under the `evaluation` section."""
    trained = checkpoint["params"]["train"]
    distributed.seed_everything(trained["seed"], trained["deterministic"])
    described = describe(checkpoint, path)
    return replace(
        build_predictor(described, checkpoint, device),
        window=params.evaluation.window,
        scales=params.evaluation.scales,
        flip=params.evaluation.flip,
        batch_size=params.evaluation.batch_size,
    )


def tags_of_result(scores: dict[str, Any]) -> dict[str, str]:
    """What stands beside the scores in MLflow, and needs no chart."""
    tags = {}
    low, high = scores["interval"]["mean_iou"].values()
    if low is not None:
        tags[INTERVAL_TAG] = f"{low:.4f} to {high:.4f}"
    if "baseline" in scores:
        tags["baseline.mean_iou"] = f"{scores['baseline']['mean_iou']:.4f}"
    return tags


def description(params: Params, store: Store, scores: dict[str, Any], tags: dict[str, str]) -> str:
    """What MLflow's page of the run says first, in Markdown."""
    split = params.evaluation.split
    commands = "\n".join(f"    {line}" for line in rebuild_commands(tags))
    return (
        f"**{split}: {summary(scores)}**, on {len(store.split(split))} {split} images of "
        f"{store.name}\n\n"
        f"{params.model.head.name} on {params.model.backbone.name}, trained on "
        f"{len(store.split('train'))} images\n\nThe same result again, in a clone:\n\n{commands}"
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
    logged = {name: sections[name] for name in sections if name not in ("tracking", "launcher")}
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
        identity["run_key"],
        fingerprint=fingerprint,
        name=f"evaluation-{fingerprint[:8]}",
        parameters=flatten(logged),
        tags=tags,
        dataset=(store.name, store.md5, str(PREPARED)),
    )
    # val/ holds the training's validations, at one scale, unflipped. At step 0 always: MLflow draws
    # one step that is equal in all runs as bars.
    split = params.evaluation.split
    section = "val_final" if split == "val" else split
    named = {f"{section}/{name}": scores[name] for name in HEADLINE}
    tracker.log({"iteration": 0, **named})
    tracker.log_table(folder / "classes.tsv", "evaluation")
    result = tags_of_result(scores)
    tracker.log_result(scores["mean_iou"], result, description(params, store, scores, tags))
    files = (
        *sorted(folder.glob("*.tsv")),
        folder / "scores.json",
        folder / PER_IMAGE.name,
        folder / CALIBRATION.name,
        METRICS,
    )
    tracker.log_artifacts(files, "evaluation")
    tracker.log_artifacts([folder / "overlays"], "evaluation/overlays")
    tracker.finish("FINISHED")


if __name__ == "__main__":
    run_main(main)
