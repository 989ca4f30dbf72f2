"""params.yaml: what is read, what is refused, and in which words."""

import json
import math
from pathlib import Path

import pytest
from pydantic import ValidationError
from ruamel.yaml import YAML

from pipeline.experiment import load_params
from pipeline.params import flatten, plain
from pipeline.yaml12 import read_yaml
from tests.unit.sections import REPOSITORY, document, refusal

SCALARS = """
1e-3 1E3 1e+3 +1e3 -2E+05 12e03 1.e2 1.5e3 1. .5 -.5 +.5 1_000.5 00.5 0.0
010 0777 08 09 0o10 0o7 0o8 0x1f 0x1F 1_000 1__0 -1 +1 -0 00 0 _1
~ null Null NULL nULL true True TRUE tRue false False FALSE
off on yes No y n .inf -.inf +.inf .Inf .INF .nan .NaN .NAN -.nan
1:30 1:30:20 190:20:30.15 1,000 1e . + 1.2.3 e3 inf nan 0x 0xG .5e1 .5e+1
0b11 -0o10 +0x1F 0x1_f 0o7_7 '\"010\"' ''
"""


PAIRS, VOC = {"format.name": "pairs"}, {"format.name": "voc"}


def test_the_repositorys_own_file_loads_and_nothing_in_it_is_lost():
    path = REPOSITORY / "params.yaml"
    loaded = load_params(path)
    given, known = flatten(read_yaml(path)), flatten(plain(loaded))
    assert {name: known[name] for name in given} == given
    assert len(given) <= 80
    assert loaded.train.validation is read_yaml(path)["train"]["validate"]


@pytest.mark.parametrize("text", SCALARS.split())
def test_a_scalar_is_read_as_dvc_reads_it(text: str, tmp_path: Path):
    path = tmp_path / "one.yaml"
    path.write_text(f"value: {text}\n", encoding="utf-8")
    ours = read_yaml(path)["value"]
    theirs = YAML(typ="safe", pure=True).load(path)["value"]
    assert type(ours) is type(theirs)
    assert repr(ours) == repr(theirs)  # repr: nan is not nan


def test_yaml_is_version_1_2(tmp_path: Path):
    path = tmp_path / "some.yaml"
    path.write_text("[1e-3, off, 010, 0o10, ~, .inf, 1_000]", encoding="utf-8")
    assert read_yaml(path) == [0.001, "off", 10, 8, None, math.inf, 1000]


@pytest.mark.parametrize("head", ["pspnet", "upernet", "deeplabv3", "deeplabv3plus"])
def test_a_head_that_pools_to_one_pixel_needs_two_images(head: str, tmp_path: Path):
    text = refusal(
        tmp_path, {"model.head.name": head, "train.batch_size": 2, "train.accumulation": 2}
    )
    assert f"the 1x1 pooling of {head} leaves batch normalisation a single value" in text


@pytest.mark.parametrize(
    ("batch_size", "gpus", "accumulation", "nearest"),
    [(16, 3, 1, "use 15 or 18"), (10, 2, 2, "use 8 or 12"), (3, 4, 1, "use 4")],
)
def test_an_indivisible_batch_is_answered_with_the_nearest_sizes(
    batch_size: int, gpus: int, accumulation: int, nearest: str, tmp_path: Path
):
    sizes = {"batch_size": batch_size, "gpus": gpus, "accumulation": accumulation}
    text = refusal(tmp_path, {f"train.{name}": value for name, value in sizes.items()})
    assert text.endswith(nearest)


def test_a_pspnet_refuses_microbatches_of_one_image(tmp_path: Path):
    changes = {"model.head.name": "pspnet", "train.batch_size": 4, "train.accumulation": 4}
    assert "train.batch_size / train.accumulation is 1" in refusal(tmp_path, changes)
    (tmp_path / "params.yaml").write_text(
        json.dumps(document(changes | {"model.head.pool_scales": [2, 3]})), encoding="utf-8"
    )
    assert load_params(tmp_path / "params.yaml").model.head.pool_scales == (2, 3)


def test_what_the_file_leaves_out_has_the_published_value(tmp_path: Path):
    tree = document({"model.head.name": "pspnet"})
    del tree["model"]["loss"]
    path = tmp_path / "params.yaml"
    path.write_text(json.dumps(tree), encoding="utf-8")
    head = load_params(path).model.head
    assert (head.pool_scales, head.channels, head.dropout) == ((1, 2, 3, 6), 512, 0.1)
    assert head.aux_weight == 0.4


def test_class_weights_need_a_term_that_they_weigh(tmp_path: Path):
    loss = {"model.loss.cross_entropy": 0, "model.loss.dice": 1}
    text = refusal(tmp_path, loss | {"model.loss.class_weights": "balanced"})
    assert "class_weights weigh cross_entropy and ohem, and both are 0" in text


@pytest.mark.parametrize(("given", "read"), [("balanced",) * 2, ([1, 2.5, 3], (1.0, 2.5, 3.0))])
def test_class_weights_are_a_word_or_a_list(given: object, read: object, tmp_path: Path):
    path = tmp_path / "params.yaml"
    path.write_text(json.dumps(document({"model.loss.class_weights": given})), encoding="utf-8")
    assert load_params(path).model.loss.class_weights == read


def test_two_files_to_start_from_exclude_each_other(tmp_path: Path):
    text = refusal(tmp_path, {"train.resume_from": "a.pt", "train.load_from": "b.pt"})
    assert "resume_from and load_from exclude each other" in text


@pytest.mark.parametrize("layout", ["bluemarble", "ade20k", "cityscapes", "voc"])
@pytest.mark.parametrize("source", ["drawn", "files"])
def test_a_layout_with_splits_of_its_own_takes_no_others(layout: str, source: str, tmp_path: Path):
    given = {"data.format.name": layout, "data.format.splits.source": source}
    text = refusal(tmp_path, given)
    assert f"data.format: {layout} has no parameter splits; it belongs to pairs" in text


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        (PAIRS | {"format.splits.group_by": "("}, "splits.group_by: must be a regular expression"),
        (PAIRS | {"format.images": "../photos"}, "data.format.images: must be a folder below"),
        (PAIRS | {"format.splits.val": 0.85}, "data.format.splits: val + test is 1; it must stay"),
        (PAIRS | {"format.splits.folds": 5}, "data.format.splits: folds are drawn, and source is"),
        (
            PAIRS
            | {"format.splits.source": "drawn"}
            | {"format.splits.folds": 5, "format.splits.fold": 5},
            "data.format.splits: fold 5 of 5 folds; use at most 4",
        ),
        (PAIRS | {"format.splits.fold": 1}, "splits: fold 1 of None folds; use 0, or give the"),
        (PAIRS | {"format.splits.folds": 1}, "data.format.splits.folds: 1 should be greater than"),
        (
            PAIRS | {"format.suffixes": ["_m"]},
            "pairs has no parameter suffixes; did you mean tar",
        ),
        (VOC | {"format.target_suffixes": ["_m"]}, "target_suffixes; it belongs to pairs"),
        (VOC | {"format.color_map": [[0, 0, 0]]}, "data.format: voc has no parameter color_map"),
        (PAIRS | {"format.color_map": [[7] * 3] * 3}, "color_map: every colour must stand once"),
        (
            PAIRS | {"reduce_zero_label": True, "format.color_map": [[1] * 3, [2] * 3]},
            "color_map has 2 colours for 4 ids; give one [red, green, blue] a class, and with",
        ),
        ({"ignore_index": 2}, "data: ignore_index 2 is the id of class 'lake'"),
        (
            {"ignore_index": 3, "reduce_zero_label": True},
            "data: ignore_index 3 is the id of class 'lake'; use 255 or another id from 4 up",
        ),
    ],
)
def test_data_that_contradict_themselves_are_refused(
    changes: dict[str, object], rule: str, tmp_path: Path
):
    assert rule in refusal(tmp_path, {f"data.{name}": value for name, value in changes.items()})


def test_parameters_are_frozen():
    loaded = load_params(REPOSITORY / "params.yaml")
    with pytest.raises(ValidationError, match="frozen"):
        loaded.train.lr = 1.0
    with pytest.raises(ValidationError, match="frozen"):
        loaded.model.backbone.name = "resnet18"


def test_flattened_names_are_dotted():
    assert flatten({"a": {"b": {"c": 1}, "d": [2]}, "e": None}) == {
        "a.b.c": 1,
        "a.d": [2],
        "e": None,
    }


def test_a_root_in_the_home_folder_must_be_written_out(tmp_path: Path):
    said = refusal(tmp_path, {"data.root": "~/feet"})
    assert "data.root: write the whole path in place of '~/feet': DVC does not expand ~" in said


def test_a_gate_names_classes_of_the_data(tmp_path: Path):
    said = refusal(tmp_path, {"gate": {"baseline": "main", "classes": ["laek"]}})
    assert "gate.classes 'laek' is unknown; did you mean lake?" in said
    assert "gate.tolerance" in refusal(tmp_path, {"gate": {"baseline": "main", "tolerance": -1}})


@pytest.mark.parametrize(("iterations", "doubts"), [(0, 0), (60, 1), (61, 0)])
def test_a_warm_up_as_long_as_the_training_is_doubted(iterations: int, doubts: int, tmp_path: Path):
    path = tmp_path / "params.yaml"
    path.write_text(json.dumps(document({"train.iterations": iterations})), encoding="utf-8")
    said = load_params(path).train.doubts
    assert len(said) == doubts
    assert all("warmup_iters 60 is not below train.iterations 60" in line for line in said)
