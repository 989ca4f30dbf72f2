"""What the loop, a training step and an evaluation know of a network: the contract of them all."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pipeline.models.keyed import Keyed, key_random_layers


@dataclass(frozen=True)
class Labels:
    """What a network has to know of the labels it learns from.

    `frequency` is, for each class, its share of the labelled pixels of the training images that
    show it; a loss with balanced class weights needs it.
    """

    num_classes: int
    ignore_index: int
    frequency: Sequence[float]


class Network(nn.Module, ABC):
    """A network that knows what it learns and how it scores.

    A step computes `count` over the global batch, then, for each microbatch, the outputs and from
    them the `losses`. An evaluation asks for the outputs and their `scores`. What the outputs are
    concerns nobody but the network itself.

    A subclass has its encoder in the attribute `backbone`, and calls `key_draws` once all of its
    layers exist.
    """

    backbone: nn.Module
    keyed: list[Keyed]

    def key_draws(self) -> None:
        """Replace random layers by keyed ones, whose draws do not depend on the number of ranks.

        Raises:
            InputError: a random layer has no keyed form; the text names it.
        """
        self.keyed = key_random_layers(self)

    def forward(self, images: Tensor, keys: Tensor | None = None) -> Any:
        """Normalised images (N,3,H,W) of any size -> outputs.

        In training mode, `keys` (N,) int64 name the samples, and every random draw follows from
        them. In evaluation mode there are no keys and no draws.
        """
        for layer in self.keyed:
            layer.keys = keys
        return self.outputs(images)

    @abstractmethod
    def outputs(self, images: Tensor) -> Any:
        """Normalised images (N,3,H,W) -> what `losses`, in training mode, and `scores` read.

        Tensors, or tuples, lists and dicts of tensors, and no gradient hangs on anything else.
        """

    def advance(self, done: float) -> None:
        """Hear, before each step, which share of the training's iterations is done, 0 <= done < 1.

        A network whose function changes during training overrides this; what changes must lie in a
        buffer, so that a checkpoint holds it.
        """

    def settle(self) -> None:
        """Take for constant what evaluation would ask of buffers, before an export traces it.

        A network whose evaluation depends on the content of a buffer overrides this.
        """

    @abstractmethod
    def count(self, target: Tensor) -> Tensor:
        """The part that targets (N,H,W) uint8 have in every divisor of the losses, (K,) fp64.

        It follows from the targets alone. The sum over all microbatches and ranks is what `losses`
        gets as `divisors`.
        """

    @abstractmethod
    def losses(
        self, outputs: Any, target: Tensor, keys: Tensor, divisors: Tensor
    ) -> dict[str, Tensor]:
        """The named terms of the loss, each by its weight: their sum is what a step minimises.

        target (N,H,W) uint8, keys (N,) int64, divisors (K,) fp64 of the whole global batch, none of
        them 0. Every term is an fp64 scalar: this microbatch's part in the global batch's loss, so
        that the parts of all microbatches and ranks add up to it. The names, and their order, are
        the same in every call.
        """

    @abstractmethod
    def scores(self, outputs: Any, size: tuple[int, int], rows: slice) -> Tensor:
        """Outputs in evaluation mode -> a score of every class at every pixel of some rows.

        Of images of `size` (H,W), whose whole scores may be larger than all else: (N,C,rows,W), at
        least fp32. `rows` has a start and a stop. The highest score is the prediction; where
        windows overlap, scores are averaged.
        """

    def probabilities(self, scores: Tensor) -> Tensor:
        """Scores (N,C,H,W) -> what sums to one at every pixel, to be averaged over several views.

        Scores are taken for logits, as MMSegmentation's test-time augmentation does.
        """
        return scores.movedim(1, -1).softmax(dim=-1).movedim(-1, 1)  # side by side: resized_band
