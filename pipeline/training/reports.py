"""What the ranks tell each other of every step: its loss, and why they should end."""

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline import distributed


class Report(NamedTuple):
    """What all ranks have found in the step that ends an iteration.

    `terms` are those of the whole batch's loss. `finite`: on every rank the loss was, and so was
    the gradient. `asked`: a signal has asked one of them to end.
    """

    iteration: int
    terms: dict[str, float]
    finite: bool
    asked: bool


class Reports:
    """Adds up reports of all ranks, and reads them a step later, so that no GPU is waited for.

    All ranks read the same report at the same place of the program, and so act alike.
    """

    def __init__(self) -> None:
        self._sent: deque[tuple[int, list[str], Tensor, torch.cuda.Event | None]] = deque()

    def send(self, iteration: int, terms: dict[str, Tensor], finite: Tensor, asked: bool) -> None:
        """This rank's share of the terms, fp64 (), whether they are finite, boolean ()."""
        told = torch.stack([~finite, torch.full_like(finite, asked)]).double()
        if terms:
            told = torch.cat([told, torch.stack([*terms.values()])])
        told, event = distributed.sum_over_ranks(told), None
        if told.device.type == "cuda":
            told = torch.empty(told.shape, dtype=told.dtype, pin_memory=True).copy_(
                told, non_blocking=True
            )
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        self._sent.append((iteration, [*terms], told, event))

    def read(self, wait: bool) -> Iterator[Report]:
        """The reports that have not been read yet: on a GPU all but the last, or all by waiting."""
        while self._sent and (wait or self._sent[0][-1] is None or len(self._sent) > 1):
            iteration, names, told, event = self._sent.popleft()
            if event is not None:
                event.synchronize()
            not_finite, asked, *terms = told.tolist()
            named = dict(zip(names, terms, strict=True))
            yield Report(iteration, named, finite=not not_finite, asked=bool(asked))
