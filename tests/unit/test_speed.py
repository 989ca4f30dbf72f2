"""Times of a training: on a GPU by its own clock, and read when its work is done."""

import time

import pytest
import torch

from pipeline.training.speed import Stopwatch


def test_on_the_cpu_the_wait_for_data_is_that_of_the_program(monkeypatch: pytest.MonkeyPatch):
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    watch = Stopwatch(torch.device("cpu"), batch_size=8)
    for _ in range(2):
        now += 0.75
        watch.fetched()
        now += 0.25
        watch.waiting()
    watch.pause()
    now += 8  # a validation
    watch.go_on()
    figures = watch.read()
    assert figures["time/data_wait_share"] == pytest.approx(0.75)
    assert figures["time/images_per_second"] == pytest.approx(8)
    assert 0 < figures["time/memory_gib"] < 24
    now += 1
    assert watch.read().keys() == {"time/memory_gib"}  # without a step there is no speed


class Gpu:
    """A GPU that is a second behind the program, and whose queue was empty for a quarter of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        self.waits_for = 0.0
        self.events = 0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 2**31)
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(self))

    def synchronize(self, device: torch.device) -> None:
        self.now += self.waits_for
        self.waits_for = 0.0


class Event(torch.Event):
    def __new__(cls, gpu: Gpu) -> "Event":
        return super().__new__(cls, "cpu")

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu

    def record(self, stream: object) -> None:
        self.gpu.events += 1

    def elapsed_time(self, other: "Event") -> float:
        assert self.gpu.waits_for == 0, "read before the GPU was done"
        return 250.0


def test_on_a_gpu_a_reading_waits_for_its_work(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pipeline.training.speed._seconds", lambda a, b: a.elapsed_time(b) / 1000)
    gpu = Gpu(monkeypatch)
    watch = Stopwatch(torch.device("cuda", 0), batch_size=8)
    watch.fetched()
    gpu.waits_for = 1.0  # what the step has put into the queue
    figures = watch.read()
    assert figures == {
        "time/images_per_second": 8.0,
        "time/data_wait_share": 0.25,
        "time/memory_gib": 2.0,
    }
    assert gpu.events == 2
