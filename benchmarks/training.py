"""Whole trainings: the loader, steps at 256 pixels, the curves; no validations, no checkpoints.

Ours is `python -m stages.train`, which also tracks in MLflow; theirs a Runner of the published
configuration, with its hooks. Both load with two processes, crop 256 pixels out of images of
683x512, train at batch 2 and report every second iteration. Start-up and the first iterations are
left out. Ours in bf16 stands against theirs in fp32: its AmpOptimWrapper refuses to work without a
GPU.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.loader import files
from benchmarks.protocol import REPOSITORY, Case, Metrics, Round
from benchmarks.step import BATCH, NETWORKS

TRAINED = ("pspnet_r50", "segformer_b0")
CASES = [
    Case(f"{network} {precision}", threads=2, rounds=3, warm=False)
    for network in TRAINED
    for precision in ("fp32", "bf16")
]
SIDE, WORKERS, INTERVAL = 256, 2, 2
FIRST = 2  # this iteration's end begins a round
COUNTED = {"pspnet_r50": 6, "segformer_b0": 24}


def ours(case: str) -> Round:
    """A folder with the code, the parameters and the packed images of the row `loader`."""
    from benchmarks import ours
    from pipeline.params import plain

    network, precision = case.split()
    last = FIRST + COUNTED[network]
    changes = {
        "augmentation.crop_size": [SIDE, SIDE],
        "train.batch_size": BATCH,
        "train.workers": WORKERS,
        "train.precision": precision,
        "train.iterations": last,
        "train.validate": False,
        "tracking.log_interval": INTERVAL,
    }
    store = ours.prepared(files("ade20k"), NETWORKS[network][0])
    place = tempfile.TemporaryDirectory(prefix="instep-bench-")
    folder = Path(place.name)
    for name in ("pipeline", "stages", "dvc.yaml"):
        (folder / name).symlink_to(REPOSITORY / name)
    (folder / "data").mkdir()
    (folder / "data" / "prepared").symlink_to(store.folder)
    tree = plain(ours.params(NETWORKS[network][0], changes))  # JSON is YAML
    (folder / "params.yaml").write_text(json.dumps(tree), encoding="utf-8")

    def measure() -> tuple[Metrics, None]:
        assert place  # the folder lives as long as this function
        shutil.rmtree(folder / ".dvc", ignore_errors=True)
        options: dict[str, Any] = {"text": True, "stdout": subprocess.PIPE, "env": os.environ}
        command = [sys.executable, "-m", "stages.train"]
        times = {}
        with subprocess.Popen(command, cwd=folder, **options) as training:
            for line in training.stdout or ():
                if found := re.match(r"iteration (\d+) ", line):
                    times[int(found[1])] = time.perf_counter()
        if training.returncode:
            raise RuntimeError(f"the training ended with {training.returncode}")
        return speed(times, last), None

    return measure


def speed(times: dict[int, float], last: int) -> Metrics:
    """By the times at which iterations ended."""
    return {"images/s": BATCH * (last - FIRST) / (times[last] - times[FIRST])}


def theirs(case: str) -> Round:
    """The configuration with the same images, crops, batch, workers and iterations."""
    from mmengine.hooks import Hook
    from mmengine.runner import Runner

    from benchmarks import theirs

    network, _ = case.split()
    last = FIRST + COUNTED[network]
    config = theirs.config(NETWORKS[network][1])
    place = tempfile.TemporaryDirectory(prefix="instep-bench-")
    loader = config.train_dataloader
    for step in loader.dataset.pipeline:
        if step["type"] == "RandomCrop":
            step["crop_size"] = (SIDE, SIDE)
    loader.update(batch_size=BATCH, num_workers=WORKERS, persistent_workers=True)
    loader.dataset = theirs.described(loader.dataset, files("ade20k"), "train")
    config.model.data_preprocessor.size = (SIDE, SIDE)
    config.train_cfg = {"type": "IterBasedTrainLoop", "max_iters": last, "val_interval": last + 1}
    for part in ("val", "test"):
        for name in ("dataloader", "evaluator", "cfg"):
            config[f"{part}_{name}"] = None
    config.default_hooks.logger.interval = INTERVAL
    config.default_hooks.checkpoint = None
    config.work_dir = place.name
    runs = 0

    class Clock(Hook):  # type: ignore[misc] # mmengine has no types
        def __init__(self) -> None:
            self.times: dict[int, float] = {}

        def after_train_iter(self, runner: Any, batch_idx: int, *_: Any, **__: Any) -> None:
            self.times[batch_idx + 1] = time.perf_counter()

    def measure() -> tuple[Metrics, None]:
        nonlocal runs
        runs += 1
        config.experiment_name = f"bench_{os.getpid()}_{runs}"
        clock = Clock()
        runner = Runner.from_cfg(config)
        runner.register_hook(clock, "LOWEST")
        runner.train()
        assert place  # the folder lives as long as this function
        return speed(clock.times, last), None

    return measure
