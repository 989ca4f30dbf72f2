"""Ours alone: what has no counterpart in the peer, or is a bound of its own.

- start-up: `python -m stages.train` of a tiny project until its first iteration is reported, and
  `dvc repro` with nothing to do.
- waiting for data: steps of PSPNet R18 at 256 with two workers, as a share of those without any
  loading, on one batch that is there already.
- processes: the same steps by two processes of one thread, and by one process of two.
- growth: opening the index of so many generated records, and drawing the first sample's number.
- prepare: of 1,024 images of 683x512, beside decoding them and their targets by as many processes.
- memory: the peak of a small training of 2,000 iterations and ten validations, and how many times
  that is what it was after the first.
- tracking: steps of a small training beside an MLflow server that accepts and never answers, as a
  share of those beside a store that works.
- checkpoint: for how long saving PointRend R101 holds up the loop, and when it is written.
"""

import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.protocol import Case, Metrics, Round

OURS = ("ours",)
RECORDS = (1_000, 10_000, 100_000)
CASES = [
    Case("start-up", threads=2, warm=False, sides=OURS),
    Case("waiting for data", threads=2, sides=OURS),
    Case("processes", threads=2, sides=OURS),
    *(Case(f"growth {records}", sides=OURS) for records in RECORDS),
    Case("prepare", threads=2, rounds=3, sides=OURS),
    Case("memory", threads=2, rounds=1, warm=False, sides=OURS),
    Case("tracking", threads=2, warm=False, sides=OURS),
    Case("checkpoint", threads=2, sides=OURS),
]
RECIPE, SIDE, BATCH, STEPS = "pspnet_r18-d8_512x1024_80k_cityscapes", 256, 2, 6


def ours(case: str) -> Round:
    """The case's round."""
    name, _, number = case.partition(" ")
    if name == "growth":
        return growth(int(number))
    measure = {
        "start-up": start_up,
        "waiting for data": waiting,
        "processes": processes,
        "prepare": preparing,
        "memory": memory,
        "tracking": tracking,
        "checkpoint": checkpoint,
    }
    return measure[case]()


def start_up() -> Round:
    """A project as the tests make it."""
    from tests import project

    place = tempfile.TemporaryDirectory(prefix="instep-bench-")
    made = project.make_project(Path(place.name), {"train": 4, "val": 2, "test": 2})
    project.dvc(made, "repro")
    state = made / ".dvc" / "tmp" / "instep"

    def measure() -> tuple[Metrics, None]:
        assert place  # the folder lives as long as this function
        subprocess.run(["rm", "-rf", state], check=True)
        begin = time.perf_counter()
        command = [sys.executable, "-m", "stages.train"]
        options: dict[str, Any] = {"text": True, "stdout": subprocess.PIPE, "env": os.environ}
        with subprocess.Popen(command, cwd=made, **options) as training:
            next(line for line in training.stdout or () if "iteration 1" in line)
            first = time.perf_counter() - begin
            (training.stdout or sys.stdin).read()
        project.dvc(made, "checkout", "--force")
        begin = time.perf_counter()
        project.dvc(made, "repro")
        return {"s to iteration 1": first, "s of nothing": time.perf_counter() - begin}, None

    return measure


def learner(recipe: str = RECIPE) -> tuple[Any, Any]:
    """What a recipe trains, for 19 classes, and its parameters."""
    from benchmarks import ours

    changes = {"augmentation.crop_size": [SIDE, SIDE], "train.batch_size": BATCH}
    given = ours.params(recipe, changes)
    return ours.learner_of(given, 19), given


def batches(given: Any, workers: int) -> Iterator[Any]:
    """Without end, from the packed images of the row `loader`."""
    from benchmarks import loader, ours
    from pipeline.data.loader import RankBatches, Samples, build_loader
    from pipeline.data.transforms import fill_of

    store = ours.prepared(loader.files("cityscapes"), RECIPE)
    fill, train = fill_of(given.model.mean), store.split("train")
    samples = Samples(train, given.augmentation, fill=fill, ignore_index=255, seed=0)
    numbers = RankBatches((BATCH, 1), (0, 10**6), 0, 1)
    return iter(build_loader(samples, numbers, workers, pin_memory=False))


def waiting() -> Round:
    """The workers live on; what they have loaded ahead while nothing was measured is taken out."""
    from pipeline.training.loop import train_step

    one, given = learner()
    real = batches(given, 2)
    still = next(real)

    def speed(source: Any) -> float:
        begin = time.perf_counter()
        for batch in source:
            train_step(one, batch, 1)
        return STEPS * BATCH / (time.perf_counter() - begin)

    def measure() -> tuple[Metrics, None]:
        alone = speed([still] * STEPS)
        for batch in islice(real, 4):
            train_step(one, batch, 1)
        loaded = speed(islice(real, STEPS))
        return {
            "images/s": loaded,
            "without loading, images/s": alone,
            "share": loaded / alone,
        }, None

    return measure


def processes() -> Round:
    """Both are started anew each round, as they meet in a group; that is not timed."""

    def speed(count: int) -> float:
        own = {"OMP_NUM_THREADS": str(2 // count), "GLOO_SOCKET_IFNAME": "lo"}
        options = ["--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={count}"]
        command = [sys.executable, "-m", "torch.distributed.run", *options]
        done = subprocess.run(
            [*command, "-m", "benchmarks.alone"],
            env=os.environ | own,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        return float(done.stdout.split()[-1])

    def measure() -> tuple[Metrics, None]:
        two, one = speed(2), speed(1)
        return {"two, images/s": two, "one, images/s": one, "two of one": two / one}, None

    return measure


def rank() -> None:
    """What each process of `processes` does: its part of the same batches."""
    import torch

    from pipeline import distributed
    from pipeline.training.loop import train_step

    with distributed.process_group("cpu"):
        one, _ = learner()
        share = BATCH // distributed.world_size()
        images = torch.randint(0, 256, (share, SIDE, SIDE, 3), dtype=torch.uint8)
        batch = (images, torch.randint(0, 19, (share, SIDE, SIDE), dtype=torch.uint8))
        for step in range(STEPS + 1):
            train_step(one, (*batch, torch.arange(share) + BATCH * step), 1)
            if step == 0:
                begin = time.perf_counter()
        if distributed.rank() == 0:
            print(STEPS * BATCH / (time.perf_counter() - begin))


def growth(records: int) -> Round:
    """An index of images, and their shards as holes, which opening does not read."""
    from benchmarks import ours
    from pipeline.data.loader import Samples
    from pipeline.data.store import Index, Store, write_index
    from pipeline.data.table import Entries, Entry
    from pipeline.disk import FORMAT

    place = tempfile.TemporaryDirectory(prefix="instep-bench-")
    folder = Path(place.name)
    size, shown = {"height": 512, "width": 683}, (0, 3, 12, 40, 77, 149)
    entries, lengths = [], dict[str, int]()
    for number in range(records):
        shard = f"train-{number // 128:05}.bin"
        one = f"image_{number:08}"
        offset = lengths.get(shard, 0)
        entry = Entry(one, one, shard=shard, offset=offset, classes=shown, **size)
        entries.append(entry)
        lengths[shard] = offset + entry.size
    for shard, length in lengths.items():
        (folder / shard).touch()
        os.truncate(folder / shard, length)
    index = Index(
        format=FORMAT,
        name="many",
        classes=tuple(str(one) for one in range(150)),
        palette=((0, 0, 0),) * 150,
        ignore_index=255,
        exif="apply",
        content="",
        fold=None,
        pixels=[1] * 150,
        frequency=[0.1] * 150,
        shards=dict.fromkeys(lengths, ""),
        table=Entries.of(entries).write(folder),
        splits={"train": records - 1, "val": 1, "test": 0},
    )
    write_index(folder, index)
    given = ours.params(RECIPE, {})

    def measure() -> tuple[Metrics, None]:
        assert place  # the folder lives as long as this function
        begin = time.perf_counter()
        split = Store(folder).split("train")
        samples = Samples(split, given.augmentation, fill=(0, 0, 0), ignore_index=255, seed=0)
        samples.order[0]
        return {"s": time.perf_counter() - begin}, None

    return measure


def preparing() -> Round:
    """16 links to each file of the row `loader`: they are read one by one."""
    from benchmarks import loader, ours
    from pipeline.data.audit import prepare

    place = tempfile.TemporaryDirectory(prefix="instep-bench-", dir=ours.WORK)
    root, source = Path(place.name) / "set", loader.files("ade20k")
    for file in sorted(source.glob("*/*/*")):
        split = file.parent.name
        folder = root / file.parent.relative_to(source)
        folder.mkdir(parents=True, exist_ok=True)
        for copy in range(16 if split == "train" else 1):
            os.link(file, folder / f"{file.stem}-{copy:02}{file.suffix}")
    given = ours.data_params(root, loader.SETS["ade20k"][0])
    files = [sorted(root.glob(f"{kind}/*/*")) for kind in ("images", "targets")]

    def measure() -> tuple[Metrics, None]:
        begin = time.perf_counter()
        prepare(given, Path(place.name) / "prepared", lambda done, total: None)
        ours_s = time.perf_counter() - begin
        begin = time.perf_counter()
        with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
            list(pool.map(decode, *files, chunksize=128))
        alone = time.perf_counter() - begin
        return {"s": ours_s, "s of decoding": alone, "of decoding": ours_s / alone}, None

    return measure


def decode(image: Path, target: Path) -> None:
    """Read both, and nothing else."""
    import cv2

    from pipeline.data.files import read_ids, read_image

    cv2.setNumThreads(1)
    read_image(image)
    read_ids(target)


def memory() -> Round:
    """The peak as the training's own curves have it."""
    from tests import project

    place = tempfile.TemporaryDirectory(prefix="instep-bench-")
    changes = {
        "train.iterations": 2000,
        "evaluation.interval": 200,
        "tracking.log_interval": 100,
        "train.checkpoint.interval": 200,
    }
    made = project.make_project(Path(place.name), {"train": 8, "val": 4, "test": 2}, **changes)
    project.stage(made, "prepare")

    def measure() -> tuple[Metrics, None]:
        assert place  # the folder lives as long as this function
        said = project.run([sys.executable, "-m", "stages.train"], made).stdout
        peaks = [float(one) for one in re.findall(r"memory_gib ([\d.]+)", said)]
        first, last = peaks[2], peaks[-1]  # of iteration 300, which a validation went before
        return {"GiB": last, "GiB after the first": first, "growth": last / first}, None

    return measure


def tracking() -> Round:
    """The medians of 400 steps; the first 20, with the start in them, are left out."""
    from tests import project

    place = tempfile.TemporaryDirectory(prefix="instep-bench-")
    changes = {"train.iterations": 400, "train.validate": False, "tracking.log_interval": 20}
    made = project.make_project(Path(place.name), {"train": 8, "val": 2, "test": 2}, **changes)
    project.stage(made, "prepare")
    mute = socket.create_server(("127.0.0.1", 0))

    def speed(**store: str) -> float:
        subprocess.run(["rm", "-rf", made / ".dvc" / "tmp"], check=True)
        said = project.run([sys.executable, "-m", "stages.train"], made, **store).stdout
        speeds = re.findall(r"images_per_second ([\d.]+)", said)
        return statistics.median(map(float, speeds[1:]))

    def measure() -> tuple[Metrics, None]:
        assert place  # the folder lives as long as this function
        beside = speed(MLFLOW_TRACKING_URI=f"http://127.0.0.1:{mute.getsockname()[1]}")
        well = speed()
        return {"mute, images/s": beside, "images/s": well, "share": beside / well}, None

    return measure


def checkpoint() -> Round:
    """`save_progress` of a training that has made a step, and that has just been its best."""
    import torch

    from pipeline.training.checkpoint import Description
    from pipeline.training.loop import Progress, save_progress, train_step
    from pipeline.training.state import State, Writer

    one, _ = learner("pointrend_r101_512x512_160k_ade20k")
    place = tempfile.TemporaryDirectory(prefix="instep-bench-")
    os.environ["DVC_ROOT"] = place.name  # where the state lies
    state = State("0" * 32)
    state.folder.mkdir(parents=True)
    images = torch.randint(0, 256, (BATCH, SIDE, SIDE, 3), dtype=torch.uint8)
    targets = torch.randint(0, 19, (BATCH, SIDE, SIDE), dtype=torch.uint8)
    train_step(one, (images, targets, torch.arange(BATCH)), 1)
    told = Description(classes=["a"], palette=[[0] * 3], ignore_index=255, frequency=[1], params={})
    progress = Progress(1, {"iteration": 1, "mean_iou": 0.5})

    def measure() -> tuple[Metrics, None]:
        assert place  # the folder lives as long as this function
        figures = {}
        for name, improved in (("", False), (" of the best", True)):
            begin = time.perf_counter()
            with Writer() as writer:
                save_progress(one, progress, state, told, writer=writer, improved=improved)
                figures[f"s{name}"] = time.perf_counter() - begin
            figures[f"s{name} until written"] = time.perf_counter() - begin
        size = (state.folder / "state.pt").stat().st_size
        return {**figures, "MB of state.pt": size / 1e6}, None

    return measure


if __name__ == "__main__":
    rank()
