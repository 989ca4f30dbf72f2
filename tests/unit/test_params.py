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
from tests.unit.sections import REPOSITORY, document

SCALARS = """
1e-3 1E3 1e+3 +1e3 -2E+05 12e03 1.e2 1.5e3 1. .5 -.5 +.5 1_000.5 00.5 0.0
010 0777 08 09 0o10 0o7 0o8 0x1f 0x1F 1_000 1__0 -1 +1 -0 00 0 _1
~ null Null NULL nULL true True TRUE tRue false False FALSE
off on yes No y n .inf -.inf +.inf .Inf .INF .nan .NaN .NAN -.nan
1:30 1:30:20 190:20:30.15 1,000 1e . + 1.2.3 e3 inf nan 0x 0xG .5e1 .5e+1
0b11 -0o10 +0x1F 0x1_f 0o7_7 '\"010\"' ''
"""


PAIRS, VOC = {"format.name": "pairs"}, {"format.name": "voc"}


def refusal(folder: Path, changes: dict[str, object]) -> str:
    path = folder / "params.yaml"
    text = json.dumps(document(changes)).replace("Infinity", ".inf")
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="can't be used") as caught:
        load_params(path)
    return str(caught.value)


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


@pytest.mark.parametrize(
    ("unknown", "nearest"),
    [
        ("train.gpuz", "train.gpus"),
        ("train.validation", "train.validate"),
        ("model.backbone.outputstride", "model.backbone.output_stride"),
        ("evaluatoin", "evaluation"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest_valid_one(
    unknown: str, nearest: str, tmp_path: Path
):
    line = f"{unknown}: no such parameter; did you mean {nearest}?"
    assert line in refusal(tmp_path, {unknown: 2})


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("train.gpus", "two", 'train.gpus: "two" should be a valid integer'),
        ("train.gpus", 1.0, "train.gpus: 1.0 should be a valid integer"),
        ("train.deterministic", 1, "train.deterministic: 1 should be a valid boolean"),
        ("train.lr", "1e-3", 'train.lr: "1e-3" should be a valid number'),
        ("train.lr", 0, "train.lr: 0 should be greater than 0"),
        ("train.momentum", 1.0, "train.momentum: 1.0 should be less than 1"),
        ("train.iterations", -1, "train.iterations: -1 should be greater than or equal to 0"),
        ("evaluation.scales", [1.0, 0], "evaluation.scales.1: 0 should be greater than or equal"),
        ("evaluation.scales", [], "evaluation.scales: [] "),
        ("train.rare_class_temperature", 0, "train.rare_class_temperature: 0 should be greater"),
        ("train.workers", -1, "train.workers: -1 should be greater than or equal to 0"),
        ("train.lr", math.inf, "train.lr: Infinity should be a finite number"),
        ("augmentation.flip.vertical", 1.5, "augmentation.flip.vertical: 1.5 should be less"),
        (
            "augmentation.crop_size",
            [64],
            "augmentation.crop_size.1: missing; the list is too short",
        ),
        ("augmentation.crop_size", [64, 0], "augmentation.crop_size.1: 0 should be greater"),
        ("augmentation.ratio_range", [2.0, 0.5], "augmentation.ratio_range: must be [low, high]"),
        ("model.head.name", "segnet", "model.head: name 'segnet' is unknown; did you mean"),
        ("model.head", "unet", "model.head: must be a section with a name: one of deeplabv3,"),
        ("model.backbone.name", "resnet50", "'resnet50' is unknown; did you mean resnet50c?"),
        (
            "model.backbone.name",
            "mit_b0",
            "backbone.name mit_b0 has 4 maps of features, and unet with head.aux_weight 0 needs 5",
        ),
        ("model.backbone.output_stride", 4, "model.backbone.output_stride: 4 should be 8, 16 or"),
        ("train", None, "train: null should be"),
        ("data.palette", [[1, 2, 3]], "data: palette has 1 colours for 3 classes"),
        ("data.classes", ["a", "b", "a"], "data: classes: every name must stand once"),
        ("data.ignore_index", 1, "data: ignore_index 1 is the id of class 'land'"),
        ("train.ema_decay", 1.0, "train.ema_decay: 1.0 should be less than 1"),
        ("train.clip_grad_norm", 0, "train.clip_grad_norm: 0 should be greater than 0"),
        ("train.head_lr_mult", 0, "train.head_lr_mult: 0 should be greater than 0"),
        ("train.schedule.policy", "step", "train.schedule.policy: \"step\" should be 'poly' or"),
        ("model.loss.cross_entropy", 0, "model.loss: every term has weight 0"),
        ("model.loss.dice", -1, "model.loss.dice: -1 should be greater than or equal to 0"),
        (
            "model.loss.class_weights",
            "even",
            "model.loss.class_weights: must be null, balanced, or",
        ),
        (
            "model.loss.class_weights",
            [1, 0, 1],
            "model.loss.class_weights: must be null, balanced,",
        ),
        ("model.loss.class_weights", [1, 1], "model.loss.class_weights has 2 numbers for the 3"),
        ("train.work_dir", "/tmp/out", "train.work_dir: must be a folder inside the repository"),
        ("train.work_dir", "../out", "train.work_dir: must be a folder inside the repository"),
        ("train.work_dir", ".", "train.work_dir: must be a folder inside the repository"),
        ("evaluation.stride", [129, 85], "evaluation: stride [129, 85] leaves pixels between"),
    ],
)
def test_a_wrong_value_is_refused_by_name_with_the_rule(
    name: str, value: object, rule: str, tmp_path: Path
):
    assert rule in refusal(tmp_path, {name: value})


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"model.head.dropout": 0.1}, "model.head: smp.Unet has no parameter dropout"),
        ({"model.backbone.output_stride": 8}, "model: backbone.output_stride: a network of smp.*"),
        (
            {"augmentation.crop_size": [96, 100]},
            "smp.Unet is trained on sides that 32 divides; use [96, 96]",
        ),
    ],
)
def test_a_network_of_the_library_has_rules_of_its_own(
    changes: dict[str, object], rule: str, tmp_path: Path
):
    of_library = {"model.head.name": "smp.Unet", "model.backbone.name": "resnet18"}
    assert rule in refusal(tmp_path, of_library | changes)


@pytest.mark.parametrize("head", ["pspnet", "upernet", "deeplabv3", "deeplabv3plus"])
def test_a_head_that_pools_to_one_pixel_needs_two_images(head: str, tmp_path: Path):
    text = refusal(
        tmp_path, {"model.head.name": head, "train.batch_size": 2, "train.accumulation": 2}
    )
    assert f"the 1x1 pooling of {head} leaves batch normalisation a single value" in text


def test_all_findings_are_told_at_once(tmp_path: Path):
    wrong = {
        "train.gpuz": 1,
        "train.lr": "fast",
        "model.head.dropout": 2,
        "evaluation.split": "train",
    }
    text = refusal(tmp_path, wrong)
    assert len(text.splitlines()) == 1 + len(wrong)
    for name in wrong:
        assert f"  {name}: " in text


def test_a_missing_parameter_is_named(tmp_path: Path):
    tree = document({})
    del tree["train"]["lr"]
    (tmp_path / "params.yaml").write_text(json.dumps(tree), encoding="utf-8")
    with pytest.raises(ValueError, match=r"train\.lr: missing"):
        load_params(tmp_path / "params.yaml")


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


@pytest.mark.parametrize(
    ("key", "finding"),
    [
        ("pool_scales", "unet has no parameter pool_scales; it belongs to pspnet, upernet"),
        ("train_points", "unet has no parameter train_points; it belongs to eomt, pointrend"),
        ("chanels", "unet has no parameter chanels; did you mean channels?"),
    ],
)
def test_a_key_of_another_head_is_refused_with_the_heads_that_it_belongs_to(
    key: str, finding: str, tmp_path: Path
):
    assert f"model.head: {finding}" in refusal(tmp_path, {f"model.head.{key}": [1]})


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


def test_a_file_without_sections_is_refused(tmp_path: Path):
    (tmp_path / "params.yaml").write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match="must hold the sections data, augmentation, model"):
        load_params(tmp_path / "params.yaml")


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
