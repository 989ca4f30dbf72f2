"""How fast a training is, what it waits for, how much memory it takes: no part of its result."""

import sys
import time

import torch


class Stopwatch:
    """Times the iterations since the last reading.

    A GPU works behind the program that feeds it: what it waits for is measured between two events
    in its own queue, the end of a step and the arrival of the next batch, and a reading waits until
    its work is done.
    """

    def __init__(self, device: torch.device, batch_size: int) -> None:
        self._device = device
        self._batch_size = batch_size
        self._restart()
        self.waiting()

    def waiting(self) -> None:
        """A step is done, and its successor's data are asked for."""
        self._asked = self._now()

    def fetched(self) -> None:
        """The data are there."""
        self._waits.append((self._asked, self._now()))

    def pause(self) -> None:
        """Something other than training begins, such as a validation."""
        self._synchronize()
        self._paused = time.perf_counter()

    def go_on(self) -> None:
        """It has ended, and its time does not count."""
        self._synchronize()
        self._began += time.perf_counter() - self._paused

    def read(self) -> dict[str, float]:
        """The figures of the iterations since the last reading, by their names in the history."""
        self._synchronize()
        elapsed = time.perf_counter() - self._began
        waited = sum(_seconds(asked, there) for asked, there in self._waits)
        images = len(self._waits) * self._batch_size
        self._restart()
        speed = {
            "time/images_per_second": images / elapsed,
            "time/data_wait_share": waited / elapsed,
        }
        return (speed if images else {}) | {"time/memory_gib": _memory_gib(self._device)}

    def _restart(self) -> None:
        self._waits: list[tuple[float | torch.cuda.Event, float | torch.cuda.Event]] = []
        self._began = time.perf_counter()

    def _now(self) -> float | torch.cuda.Event:
        if self._device.type != "cuda":
            return time.perf_counter()
        event: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _seconds(begin: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    if isinstance(begin, float) and isinstance(end, float):
        return end - begin
    assert isinstance(begin, torch.cuda.Event)
    assert isinstance(end, torch.cuda.Event)
    return float(begin.elapsed_time(end)) / 1000


def _memory_gib(device: torch.device) -> float:
    """Peak memory of this process: of the GPU, or resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
