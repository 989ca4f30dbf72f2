"""One training step is followed through five files, as README.md says: this imports no other.

A learner is made by tests/unit/sections.py, since making one is no part of a step.
"""

import ast
import copy
import re
import sys
from pathlib import Path
from types import FrameType

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.models.losses import cross_entropy_sum
from pipeline.models.network import Network
from pipeline.models.segmenter import Output
from pipeline.training.loop import train_step
from pipeline.training.optimization import Learner
from tests.unit.sections import REPOSITORY, learner_of, params

SECTION = (REPOSITORY / "README.md").read_text(encoding="utf-8").split("\n## The code\n")[1]
SENTENCES = re.search(r"^One training step (.+?\.)\s(What else .+?\.)\n\n", SECTION, re.M | re.S)
FILES, HELPERS = (set(re.findall(r"`(pipeline/[\w/]+\.py)`", text)) for text in SENTENCES.groups())

PSPNET = {
    "model.head.name": "pspnet",
    "model.head.channels": 8,
    "model.backbone.name": "resnet18",
}
RANDOM = {"model.backbone.pretrained": None}


def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, 64, 64, 3), generator=generator, dtype=torch.uint8)
    targets = torch.randint(0, 3, (4, 64, 64), generator=generator, dtype=torch.uint8)
    targets[0, :40] = 255  # the parts of the batch have unequally many pixels to learn from
    return images, targets, torch.arange(4)


def by_hand(network: Network, learner: Learner, lr: float, weight_decay: float) -> list[float]:
    """The same step, spelt out; returns the terms."""
    images, targets, keys = batch()
    pixels = int((targets != 255).sum())
    terms = [0.0, 0.0]
    for part in (slice(0, 2), slice(2, 4)):
        outputs: list[Output] = network(learner.normalize(images[part]), keys[part])
        losses = []
        for output, weight in zip(outputs, (1.0, 0.4), strict=True):
            logits = F.interpolate(output.logits, (64, 64), mode="bilinear")
            losses.append(weight * cross_entropy_sum(logits, targets[part], 255) / pixels)
        sum(losses).backward()
        terms = [total + loss.item() for total, loss in zip(terms, losses, strict=True)]
    with torch.no_grad():
        for weights in network.parameters():
            weights -= lr * (weights.grad + weight_decay * weights)
    return terms


def test_the_readme_names_five_files_and_this_test_imports_them():
    tree = ast.parse(Path(__file__).read_text(encoding="utf-8"))
    modules = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    own = [module.replace(".", "/") + ".py" for module in modules if module.startswith("pipeline")]
    assert set(own) == FILES
    assert len(FILES) <= 5


def test_a_step_of_a_pspnet_is_what_one_writes_by_hand():
    torch.manual_seed(0)
    sgd = {"train.optimizer": "sgd", "train.lr": 0.1, "train.weight_decay": 0.01}
    fp64 = {"train.precision": "fp64", "train.accumulation": 2}
    learner = learner_of(params(PSPNET | RANDOM | sgd | fp64), 3)
    network = copy.deepcopy(learner.network)
    before = network.decode_head.conv_seg.weight.detach().clone()
    terms, finite = train_step(learner, batch(), accumulation=2)
    assert finite
    assert [*terms] == ["cross_entropy", "auxiliary_cross_entropy"]
    expected = by_hand(network, learner, lr=0.1, weight_decay=0.01)
    assert [term.item() for term in terms.values()] == pytest.approx(expected, rel=1e-12)
    for name, expected_weights in network.named_parameters():
        weights = learner.network.get_parameter(name)
        torch.testing.assert_close(weights, expected_weights, rtol=1e-9, atol=1e-12)
    assert (learner.network.decode_head.conv_seg.weight - before).abs().max() > 1e-4


@pytest.mark.parametrize("network", [PSPNET, {}], ids=["pspnet", "unet"])  # {}: the default run's
def test_a_step_runs_in_these_files_the_head_s_and_the_helpers(network: dict[str, object]):
    everything = {"train.clip_grad_norm": 1.0, "train.ema_decay": 0.9, "train.accumulation": 2}
    given = params(network | RANDOM | everything)
    learner = learner_of(given, 3)
    ran: set[str] = set()

    def note(frame: FrameType, event: str, argument: object) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(REPOSITORY / "pipeline"):
            ran.add(path.relative_to(REPOSITORY).as_posix())

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        train_step(learner, batch(), accumulation=2)
    finally:
        sys.setprofile(before)
    assert ran == FILES | HELPERS | {f"pipeline/models/{given.model.head.name}.py"}
