"""Activation checkpointing over 200 iterations: the same training in less memory."""

import json
import resource
import subprocess
import sys
import zlib
from typing import Any

import numpy as np
import torch

from tests.unit.sections import REPOSITORY, params

ITERATIONS = 200


def train(with_cp: bool) -> dict[str, Any]:
    """PSPNet on ResNet-18: its losses, BN statistics and the peak memory of this process."""
    from pipeline.models import build_model
    from pipeline.training.loop import train_step

    options = params(
        {
            "model.name": "pspnet",
            "model.backbone.name": "resnet18",
            "model.backbone.output_stride": 8,
            "model.backbone.pretrained": None,
            "model.backbone.with_cp": with_cp,
            "model.dropout": 0.1,
            "model.aux_weight": 0.4,
            "model.pspnet.channels": 16,
            "train.batch_size": 12,
        }
    )
    torch.manual_seed(0)
    model = build_model(options.model, 3).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (12, 3, 48, 48), np.uint8))
    targets = (images.sum(dim=1) // 256).to(torch.uint8).clamp(max=2)
    losses = []
    for iteration in range(ITERATIONS):
        batch = (images, targets, torch.arange(12) + 12 * iteration)
        losses.append(train_step(model, optimizer, batch, options, 255, torch.device("cpu")).item())
    statistics = {
        name: zlib.crc32(value.numpy().tobytes())
        for name, value in model.named_buffers()
        if "running" in name or "num_batches" in name
    }
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"losses": losses, "statistics": statistics, "memory": memory}


def test_200_iterations_are_the_same_in_less_memory() -> None:
    results = []
    for with_cp in ("", "yes"):
        command = [sys.executable, "-m", "tests.unit.test_with_cp", with_cp]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
        results.append(json.loads(done.stdout))
    kept, recomputed = results
    assert len(kept["losses"]) == ITERATIONS
    assert kept["losses"][-1] < kept["losses"][0]
    assert recomputed["losses"] == kept["losses"]
    assert len(kept["statistics"]) > 60
    assert recomputed["statistics"] == kept["statistics"]
    assert recomputed["memory"] < 0.97 * kept["memory"]


if __name__ == "__main__":
    print(json.dumps(train(bool(sys.argv[1]))))
