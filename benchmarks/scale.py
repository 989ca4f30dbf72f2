"""`python -m benchmarks.scale`: what a training would take on many machines, by a small simulation.

A step of p processes is the slowest of p computations, and then a ring's all-reduce of all
gradients. What one computation takes, and what messages take, is measured here, and simulated
steps of 1, 2 and 4 processes are compared with real ones. Then it says what larger numbers would
take, with failures, and by which interval of checkpoints. docs/scale.md has the outcome.

Sources: https://doi.org/10.1016/j.jpdc.2008.09.002 (the ring), https://doi.org/10.1145/361147.361115
and https://doi.org/10.1016/j.future.2004.11.016 (the interval, by Young and by Daly)
"""

import argparse
import json
import math
import os
import statistics
import time
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import get_context
from typing import Any

import numpy as np
import timm
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.server import free_port

SIZES = (2**10, 2**20, 2**25)  # bytes
STEPS = 12  # of which the first two are left out


@dataclass(frozen=True)
class Link:
    """What a message takes: `latency` seconds, and so many `bytes_per_s`."""

    latency: float
    bytes_per_s: float

    def all_reduce(self, size: int, processes: int) -> float:
        """Seconds of a ring's sum of so many bytes: 2 (p - 1) messages of a p-th each."""
        if processes == 1:
            return 0.0
        messages = 2 * (processes - 1)
        return messages * (self.latency + size / processes / self.bytes_per_s)


@dataclass(frozen=True)
class Computation:
    """What forward and backward of one process take, in seconds: mean and standard deviation."""

    mean: float
    deviation: float


def simulated_step(
    computation: Computation, link: Link, size: int, processes: int, crowding: float = 1.0
) -> float:
    """The mean of many steps; `crowding` is how many processes share a core."""
    rng = np.random.default_rng(0)
    drawn = rng.normal(computation.mean, computation.deviation, (1000, processes)).clip(min=0)
    return float(crowding * drawn.max(axis=1).mean()) + link.all_reduce(size, processes)


def simulated_run(
    useful: float, interval: float, *, save: float, restart: float, between_failures: float
) -> float:
    """Seconds that so many `useful` ones take, with a save each `interval`, and failures.

    A failure loses what was done since the last save. Failures come at random, at a mean distance.
    """
    rng = np.random.default_rng(0)
    totals = []
    for _ in range(200):
        done = now = 0.0
        failure = rng.exponential(between_failures)
        while done < useful:
            part = min(interval, useful - done)
            if now + part + save <= failure:
                now, done = now + part + save, done + part
            else:
                now = failure + restart
                failure = now + rng.exponential(between_failures)
        totals.append(now)
    return float(np.mean(totals))


def young(save: float, between_failures: float) -> float:
    """The best interval between saves, to first order."""
    return math.sqrt(2 * save * between_failures)


def daly(save: float, between_failures: float) -> float:
    """The same to higher order, where a save is short beside the distance of failures."""
    share = save / (2 * between_failures)
    return young(save, between_failures) * (1 + math.sqrt(share) / 3 + share / 9) - save


def rank_of(rank: int, processes: int, port: int, told: Any) -> None:
    """What one of the processes measures; the first tells it."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, processes, rank == 0, timedelta(seconds=120))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=processes)
    network = timm.create_model("resnet18", num_classes=10)
    images = torch.rand(4, 3, 96, 96)
    computed, whole = [], []
    for _ in range(STEPS):
        dist.barrier()
        begin = time.perf_counter()
        loss = network(images).square().sum()
        loss.backward()
        computed.append(time.perf_counter() - begin)
        add_up([own.grad for own in network.parameters() if own.grad is not None])
        dist.barrier()
        whole.append(time.perf_counter() - begin)
        network.zero_grad()
    messages = {size: message(torch.zeros(size // 4)) for size in SIZES}
    if rank == 0:
        size = sum(4 * own.numel() for own in network.parameters())
        told.put({"computed": computed[2:], "whole": whole[2:], "messages": messages, "size": size})
    dist.barrier()
    dist.destroy_process_group()


def add_up(gradients: list[Tensor]) -> None:
    """Sum gradients over the processes, all in one message."""
    if dist.get_world_size() > 1:
        dist.all_reduce(nn.utils.parameters_to_vector(gradients))


def message(content: Tensor) -> float:
    """The median seconds of an all-reduce."""
    times = []
    for _ in range(9):
        dist.barrier()
        begin = time.perf_counter()
        dist.all_reduce(content)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def measured(processes: int) -> dict[str, Any]:
    """What so many processes of one thread each measure on this machine."""
    context = get_context("spawn")
    told, port = context.Queue(), free_port()
    ranks = [
        context.Process(target=rank_of, args=(rank, processes, port, told))
        for rank in range(processes)
    ]
    for rank in ranks:
        rank.start()
    found: dict[str, Any] = told.get(timeout=300)
    for rank in ranks:
        rank.join()
    return found


def fitted(messages: dict[int, float], processes: int) -> Link:
    """The link of which the ring's all-reduce would take what the smallest and largest took."""
    small, large = SIZES[0], SIZES[-1]
    rounds = 2 * (processes - 1)
    slope = (messages[large] - messages[small]) / (large - small)
    return Link(messages[small] / rounds, rounds / processes / slope)


def main() -> None:
    """Measure, compare, and print tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.parse_args()
    found = {processes: measured(processes) for processes in (1, 2, 4)}
    alone = found[1]["computed"]
    computation = Computation(statistics.mean(alone), statistics.stdev(alone))
    link, size = fitted(found[2]["messages"], 2), found[1]["size"]
    print(json.dumps({"computation": vars(computation), "link": vars(link), "bytes": size}))
    cores = os.cpu_count() or 1
    print(
        "\n| processes | s/step, simulated | measured | simulated of measured |\n|---|---|---|---|"
    )
    for processes, own in found.items():
        crowding = max(1.0, processes / cores)
        simulated = simulated_step(computation, link, size, processes, crowding)
        step = statistics.mean(own["whole"])
        print(f"| {processes} | {simulated:.3f} | {step:.3f} | {simulated / step:.2f} |")
    # EoMT-L's step of 8 images of 640^2 on an H100, as published, and a jitter of 3%.
    h100 = Computation(8 / 16.4, 0.03 * 8 / 16.4)
    print("\n| GPUs | efficiency at 25 Gbit/s | at 400 Gbit/s |\n|---|---|---|")
    for processes in (8, 64, 512, 4096):
        shares = [
            h100.mean / simulated_step(h100, Link(2e-5, gbits * 1e9 / 8), 1_280_000_000, processes)
            for gbits in (25, 400)
        ]
        print(f"| {processes} | {shares[0]:.2f} | {shares[1]:.2f} |")
    print("\n| GPUs | failures every | Young | Daly | best simulated | time of useful |")
    print("|---|---|---|---|---|---|")
    for gpus in (8, 64, 512, 4096):
        between = 50_000 * 3600 / gpus  # hours of a GPU: https://arxiv.org/abs/2407.21783
        costs = {"save": 5.0, "restart": 180.0, "between_failures": between}
        intervals = [daly(5.0, between) * factor for factor in (0.25, 0.5, 0.7, 1, 1.4, 2, 4)]
        totals = {one: simulated_run(86_400.0, one, **costs) for one in intervals}
        best = min(totals, key=totals.__getitem__)
        print(
            f"| {gpus} | {between / 3600:.0f} h | {young(5.0, between):.0f} s | "
            f"{daly(5.0, between):.0f} s | {best:.0f} s | {totals[best] / 86_400:.3f} |"
        )


if __name__ == "__main__":
    main()
