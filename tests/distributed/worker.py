"""The train stage with one of the product's guarantees taken away; started by the tests."""

import sys

import torch

from pipeline import distributed
from pipeline.models.keyed import KeyedDropout
from stages import train


def local_batch_norm() -> None:
    """Every rank normalises by its own share."""
    distributed.synchronize_batch_norm = lambda model: model


def unkeyed_dropout() -> None:
    """Masks are drawn from torch's own generator."""
    KeyedDropout.forward = lambda self, x: torch.nn.functional.dropout2d(x, self.p, self.training)


if __name__ == "__main__":
    {"local_batch_norm": local_batch_norm, "unkeyed_dropout": unkeyed_dropout}[sys.argv[1]]()
    train.main([])
