"""Activation checkpointing over 200 iterations: the same training in less memory."""

import json
import os
import re
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.unit.sections import REPOSITORY, params

pytestmark = pytest.mark.slow


def train(with_cp: int, iterations: int, side: int) -> dict[str, Any]:
    """PSPNet on ResNet-18: its losses, BN statistics and how much memory it took."""
    from pipeline.training.loop import train_step
    from tests.unit.sections import learner_of

    options = params(
        {
            "model.head.name": "pspnet",
            "model.head.channels": 16,
            "model.backbone.name": "resnet18",
            "model.backbone.output_stride": 8,
            "model.backbone.pretrained": None,
            "model.backbone.with_cp": bool(with_cp),
            "train.batch_size": 2,
            "train.optimizer": "sgd",
        }
    )
    torch.manual_seed(0)
    learner = learner_of(options, 3)
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (2, side, side, 3), np.uint8))
    targets = (images.sum(dim=3) // 256).to(torch.uint8).clamp(max=2)
    losses, before = [], peak_memory()
    for iteration in range(iterations):
        batch = (images, targets, torch.arange(2) + 2 * iteration)
        losses.append(sum(term.item() for term in train_step(learner, batch, 1).terms.values()))
    statistics = {
        name: zlib.crc32(value.numpy().tobytes())
        for name, value in learner.network.named_buffers()
        if "running" in name or "num_batches" in name
    }
    memory = peak_memory() - before
    return {"losses": losses, "statistics": statistics, "memory": memory}


def peak_memory() -> int:
    """KiB; getrusage would count what the process that started this one had."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])


def both(iterations: int, side: int, **environment: str) -> list[dict[str, Any]]:
    """Without activation checkpointing, and with it: two processes, side by side."""
    started, own = [], os.environ | environment
    for with_cp in (0, 1):
        arguments = map(str, (with_cp, iterations, side))
        command = [sys.executable, "-m", "tests.unit.test_with_cp", *arguments]
        started.append(subprocess.Popen(command, cwd=REPOSITORY, env=own, stdout=subprocess.PIPE))
    printed = [process.communicate()[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    return [json.loads(text) for text in printed]


def test_200_iterations_are_the_same() -> None:
    kept, recomputed = both(iterations=200, side=32)
    assert len(kept["losses"]) == 200
    assert kept["losses"][-1] < kept["losses"][0]
    assert recomputed["losses"] == kept["losses"]
    assert len(kept["statistics"]) > 60
    assert recomputed["statistics"] == kept["statistics"]


def test_the_memory_is_less() -> None:
    # Blocks of at least this many bytes go back to the system when they are freed: the peak is then
    # what is held at once, without what the allocator keeps for later, which varies by a quarter.
    kept, recomputed = both(iterations=1, side=448, MALLOC_MMAP_THRESHOLD_="65536")
    assert recomputed["memory"] < 0.9 * kept["memory"]


if __name__ == "__main__":
    print(json.dumps(train(*map(int, sys.argv[1:]))))
