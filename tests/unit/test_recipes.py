"""Recipes: whole, valid, trainable, and written into params.yaml whatever stood there."""

import json
import re
import shutil
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from dvc.utils.hydra import apply_overrides
from ruamel.yaml import YAML

from pipeline.experiment import Params, load_params
from pipeline.params import flatten, plain
from pipeline.training.loop import train_step
from pipeline.yaml12 import read_yaml
from stages import recipe
from tests.unit.sections import REPOSITORY, learner_of

NAMES = recipe.names()
# What a recipe leaves to the user and the machine; all else it sets.
LEFT = {
    *recipe.LEFT,
    *(f"train.{name}" for name in ("gpus", "parallel", "device", "workers", "timeout")),
    *(f"train.{name}" for name in ("seed", "deterministic")),
    "train.work_dir",
    "gate",
    "launcher.name",
    *(
        f"tracking.{name}"
        for name in ("uri", "experiment", "log_interval", "log_model", "registered_model")
    ),
}
# Of the default head: with another one they may not be there.
HEADS = {"model.head.channels", "model.loss.cross_entropy"}


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the repository's params.yaml, in a folder that is the current one."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "params.yaml"
    path.write_bytes((REPOSITORY / "params.yaml").read_bytes())
    return path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["recipe", *arguments])
    recipe.main()


@cache
def values(name: str) -> dict[str, Any]:
    return recipe.load_recipe(name).values


def resolved(name: str, folder: Path) -> Params:
    path = folder / "resolved.yaml"
    path.write_text(recipe.rewritten(REPOSITORY / "params.yaml", values(name)), encoding="utf-8")
    return load_params(path)


def test_no_promised_recipe_is_missing():
    promised = {
        "pspnet_r50-d8_512x512_80k_ade20k",
        "pspnet_r50-d8_512x512_160k_ade20k",
        "pspnet_r101-d8_512x512_80k_ade20k",
        "pspnet_r101-d8_512x512_160k_ade20k",
        "pspnet_r50-d8_512x1024_80k_cityscapes",
        *(f"segformer_mit-b{size}_512x512_160k_ade20k" for size in range(6)),
        *(f"pointrend_{net}_512x512_160k_ade20k" for net in ("r50", "r101")),
        *(f"pointrend_{net}_512x1024_80k_cityscapes" for net in ("r50", "r101")),
        "pointrend_r101_512x512_160k_feetarch5k",
        "eomt_dinov2-l_512x512_39k_ade20k",
        "eomt_dinov2-l_1024x1024_20k_cityscapes",
        "eomt_dinov2-s_512x512_20k_feetarch5k",
        *(f"linear_dinov3-{size}_512x512_40k_ade20k" for size in "sb"),
    }
    assert promised <= set(NAMES)
    assert {name.split("_")[0] for name in NAMES} >= {"fcn", "deeplabv3plus", "upernet"}


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_sets_all_that_is_not_left_to_the_user(name: str):
    parameters = set(flatten(read_yaml(REPOSITORY / "params.yaml")))
    assert parameters - flatten(values(name)).keys() == LEFT | HEADS - flatten(values(name)).keys()
    assert {key for key in LEFT if key.startswith(("data.", "augmentation.", "model."))} == {
        "data.root",
        "model.backbone.with_cp",
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_valid_and_is_what_its_name_says(name: str, tmp_path: Path):
    params = resolved(name, tmp_path)
    heads = {"semantic": "semantic_fpn"}
    head, *_, crop, length, data = name.split("_")
    assert params.model.head.name == heads.get(head, head)
    assert params.data.name == data
    assert list(params.augmentation.crop_size) == [int(side) for side in crop.split("x")]
    assert params.train.iterations == int(length.removesuffix("k")) * 1000
    assert params.evaluation.interval * 10 == params.train.iterations
    (encoder,) = re.findall(r"_(r\d+|mit-b\d|dinov\d-\w)", name)
    if encoder.startswith("dinov"):
        kind, size = encoder.split("-")
        sizes = {"s": "small", "b": "base", "l": "large"}
        vit = {"dinov2": "patch14_reg4_dinov2", "dinov3": "patch16_dinov3_qkvb"}
        backbone = f"vit_{sizes[size]}_{vit[kind]}"
    elif encoder.startswith("mit"):
        backbone = f"mit_{encoder[4:]}"
    else:
        backbone = f"{encoder.replace('r', 'resnet')}c"
    assert params.model.backbone.name == backbone
    assert params.model.backbone.output_stride == (8 if "-d8" in name else 32)


@pytest.mark.parametrize(
    ("name", "batch_size", "classes", "scale"),
    [
        ("pspnet_r50-d8_512x512_80k_ade20k", 16, 150, (2048, 512)),
        ("pspnet_r50-d8_512x1024_80k_cityscapes", 8, 19, (2048, 1024)),
        ("pspnet_r50-d8_512x512_20k_voc2012", 16, 21, (2048, 512)),
    ],
)
def test_a_data_set_brings_its_batch_and_its_classes(
    name: str, batch_size: int, classes: int, scale: tuple[int, int], tmp_path: Path
):
    params = resolved(name, tmp_path)
    assert params.train.batch_size == params.train.base_batch_size == batch_size
    assert len(params.data.classes) == classes
    assert params.augmentation.scale == scale
    assert params.data.reduce_zero_label is (classes == 150)


# What the configs that recipes of MMSegmentation name hold, resolved by mmengine, under our names.
REFERENCE = json.loads((REPOSITORY / "tests/unit/data/mmsegmentation_recipes.json").read_text())


def test_every_other_recipe_is_mmsegmentations():
    others = {name for name in NAMES if name.startswith(("eomt_", "linear_"))}
    assert set(NAMES) - others == set(REFERENCE)


@pytest.mark.parametrize("name", REFERENCE)
def test_a_recipe_has_mmsegmentations_numbers(name: str, tmp_path: Path):
    expected = dict(REFERENCE[name])
    params = plain(resolved(name, tmp_path))
    assert len(params["data"]["classes"]) == expected.pop("classes", 3)
    found = flatten(params)
    assert {key: found[key] for key in expected} == expected


def test_what_stood_in_the_file_leaves_no_trace(file: Path):
    clean = file.with_name("clean.yaml")
    clean.write_bytes(file.read_bytes())
    for name in (
        "segformer_mit-b0_512x512_160k_ade20k",
        "pointrend_r101_512x512_160k_feetarch5k",
        "pspnet_r18-d8_512x1024_80k_cityscapes",
        "fcn_r50-d8_512x512_80k_ade20k",
    ):
        recipe.use(name)
        assert file.read_text(encoding="utf-8") == recipe.rewritten(clean, values(name)), name


def test_what_dvc_made_of_the_file_leaves_no_trace(file: Path):
    clean = file.with_name("clean.yaml")
    clean.write_bytes(file.read_bytes())
    name = "segformer_mit-b0_512x512_160k_ade20k"
    for changes in (
        ["augmentation.crop_size=[32,32]", "augmentation.scale=null", "train.lr=1e-7"],
        ["model.std=[1,2,3]", "+model.head.dropout=0.2", "+model.backbone.freeze=true"],
        ["+data.allow_missing_classes=true", "train.clip_grad_norm=1.0"],
    ):
        apply_overrides(str(file), changes)  # dvc exp run -S
    assert "  - - 38\n" in file.read_text(encoding="utf-8")
    assert "uri:   " in file.read_text(encoding="utf-8")
    recipe.use(name)
    assert file.read_text(encoding="utf-8") == recipe.rewritten(clean, values(name))
    apply_overrides(str(file), ["model.mean=[1,2,3]", "data.root=data/bluemarble"])
    recipe.use(name)
    assert file.read_text(encoding="utf-8") == recipe.rewritten(clean, values(name))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_is_read_alike_by_dvc_and_by_us(name: str, file: Path):
    recipe.use(name)
    ours = read_yaml(file)
    assert ours == YAML(typ="safe").load(file)
    found, wanted = flatten(ours), flatten(values(name))
    assert {key: found[key] for key in wanted} == wanted
    assert {key for key in found.keys() - wanted.keys() if not key.startswith("tracking.")} <= LEFT
    text = re.sub(" #.*", "", file.read_text(encoding="utf-8"))
    assert max(map(len, text.splitlines())) <= 100
    assert not re.search(r"[ \t]$|:$\n(?! )", text, re.MULTILINE)


@pytest.mark.parametrize("name", ["pspnet_r50-d8_512x512_80k_ade20k", NAMES[-1]])
def test_comments_order_and_the_users_own_values_stay(name: str, file: Path):
    text = file.read_text(encoding="utf-8").replace("gpus: 1", "gpus: 2")
    file.write_text(text.replace("root: data/bluemarble", "root: data/ade"), encoding="utf-8")
    before = file.read_text(encoding="utf-8")
    recipe.use(name)
    after = file.read_text(encoding="utf-8")
    of_the_former_head = ["# from the coarsest stage to the finest"]
    kept = [line for line in re.findall("#.*", before) if line not in of_the_former_head]
    assert re.findall("#.*", after) == kept
    old, new = (list(flatten(YAML(typ="safe").load(text))) for text in (before, after))
    assert [key for key in new if key in old] == [key for key in old if key in new]
    assert set(old) - set(new) <= HEADS
    params = load_params(file)
    assert (params.train.gpus, params.data.root) == (2, "data/ade")


def test_show_prints_the_file_and_writes_nothing(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    before = file.read_bytes()
    run(monkeypatch, "show", NAMES[0])
    assert file.read_bytes() == before
    shown = capsys.readouterr().out
    run(monkeypatch, "use", NAMES[0])
    assert file.read_text(encoding="utf-8") == shown


def test_list_names_every_recipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    run(monkeypatch, "list")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == NAMES
    assert all(len(line.split()) > 3 for line in lines)


def test_use_tells_what_changed_and_what_comes_next(file: Path, capsys: pytest.CaptureFixture[str]):
    recipe.use("pointrend_r101_512x512_160k_feetarch5k")
    changed, rest = capsys.readouterr().out.split("Left as they were:\n")
    left, following = rest.split("Next:\n")
    assert '  data.format.name: "bluemarble" -> "pairs"\n' in changed
    assert '  data.format.splits.source: left out -> "drawn"\n' in changed
    assert "  model.head.channels: [128, 64, 48, 32, 16] -> left out\n" in changed
    assert "train.seed" not in changed
    assert '  data.root: "data/bluemarble"\n' in left
    assert following.startswith("  data.root: your folder")


def test_a_recipe_of_ones_own_starts_from_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = shutil.copytree(recipe.RECIPES, tmp_path / "recipes")
    monkeypatch.setattr(recipe, "RECIPES", folder)
    other = "pspnet_r50-d8_512x512_80k_ade20k"
    (folder / "mine.yaml").write_text(f"base: [{other}]\ntrain:\n  lr: 0.005\n", encoding="utf-8")
    mine, theirs = (flatten(recipe.load_recipe(name).values) for name in ("mine", other))
    assert mine == theirs | {"train.lr": 0.005}
    (folder / "mine.yaml").write_text("base: [_comon]\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"_comon\.yaml: there is no such piece"):
        recipe.load_recipe("mine")


def test_an_unknown_name_is_answered_with_the_nearest(file: Path):
    before = file.read_bytes()
    nearest = "did you mean segformer_mit-b0_512x512_160k_ade20k"
    with pytest.raises(ValueError, match=nearest):
        recipe.use("segformer_mit-b0_512_160k_ade20k")
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("given", "broken", "finding"),
    [
        ("gpus: 1", "gpus: 3", "batch_size 16 is the batch of all processes"),
        ("seed: 0\n  det", "sead: 0\n  det", r"train\.sead: no such parameter"),
        ("lr: 0.003", "learning_rate: 0.003", r"train\.learning_rate: no such parameter"),
        ("  experiment: instep\n", "", r"tracking\.experiment: missing"),
        ("tracking:", "tracking: [", "can't be read"),
    ],
)
def test_a_file_that_does_not_fit_stays_as_it_is(given: str, broken: str, finding: str, file: Path):
    text = file.read_text(encoding="utf-8")
    assert given in text
    file.write_text(text.replace(given, broken), encoding="utf-8")
    with pytest.raises(ValueError, match=finding):
        recipe.use("pspnet_r50-d8_512x512_80k_ade20k")
    assert file.read_text(encoding="utf-8") == text.replace(given, broken)
    assert list(file.parent.iterdir()) == [file]


def test_an_empty_file_stays_as_it_is(file: Path):
    file.write_text("# nothing\n", encoding="utf-8")
    with pytest.raises(ValueError, match="holds no parameters"):
        recipe.use(NAMES[0])
    assert file.read_text(encoding="utf-8") == "# nothing\n"


def test_values_are_replaced_whatever_their_form(tmp_path: Path):
    path = tmp_path / "some.yaml"
    path.write_text(
        "# head\n"
        "train: # a section\n"
        "  lines:      # as `dvc exp run -S` leaves a list\n"
        "  # before its items\n"
        "  - - 1\n"
        "    - 2\n"
        "  - - 3\n"
        "    - 4\n"
        "  # before none\n"
        "  none:      # as it leaves null\n"
        "  dashes:\n"
        "    - x # first\n"
        "    - y # last\n"
        "\n"
        "    # before inline\n"
        "  inline: {x: 'é # no comment', y: [1,\n"
        "    2]}   # end\n"
        "last: 1\n"
        "# foot\n",
        encoding="utf-8",
    )
    values = {
        "lines": [5, 6],
        "none": [7],
        "dashes": [],
        "inline": {"x": None, "y": 8, "z": "two words"},
        "more": {"text": "off: no # comment", "number": 1e-6, "texts": ["", "1", "true", "a, b"]},
    }
    assert recipe.rewritten(path, {"train": values}) == (
        "# head\n"
        "train: # a section\n"
        "  # before its items\n"
        "  lines: [5, 6] # as `dvc exp run -S` leaves a list\n"
        "  # before none\n"
        "  none: [7] # as it leaves null\n"
        "  dashes: []\n"
        "\n"
        "  # before inline\n"
        "  inline: {x: null, y: 8, z: two words} # end\n"
        "  more:\n"
        "    text: 'off: no # comment'\n"
        "    number: 1e-06\n"
        "    texts: ['', '1', 'true', 'a, b']\n"
        "\n"
        "last: 1\n"
        "# foot\n"
    )
    path.write_text(recipe.rewritten(path, {"train": values}), encoding="utf-8")
    assert read_yaml(path)["train"] == values == YAML(typ="safe").load(path)["train"]


def test_what_a_recipe_does_not_say_goes_with_its_own_comments_alone(tmp_path: Path):
    path = tmp_path / "some.yaml"
    path.write_text(
        "data:\n"
        "  # what it is called\n"
        "  name: a # the name\n"
        "  format:\n"
        "    name: pairs # the format\n"
        "    # folders\n"
        "    images: pictures # of photographs\n"
        "    splits:\n"
        "      val: 0.5\n"
        "      # test\n"
        "      test: 0.25\n"
        "  # where it lies\n"
        "  root: mine\n"
        "  # an option\n"
        "  allow_missing_classes: true # last\n"
        "\n"
        "# how it learns\n"
        "train: {lr: 1, seed: 2}\n",
        encoding="utf-8",
    )
    values = {
        "data": {"name": "b", "format": {"name": "pairs", "images": "x", "targets": "y"}},
        "train": {"lr": 3},
    }
    assert recipe.rewritten(path, values) == (
        "data:\n"
        "  # what it is called\n"
        "  name: b # the name\n"
        "  format:\n"
        "    name: pairs # the format\n"
        "    images: x\n"
        "    targets: y\n"
        "  # where it lies\n"
        "  root: mine\n"
        "\n"
        "# how it learns\n"
        "train: {lr: 3, seed: 2}\n"
    )


def test_a_comment_is_never_broken_as_a_long_list_is(tmp_path: Path):
    path = tmp_path / "some.yaml"
    listed = ", ".join(f"class {number}" for number in range(20))
    path.write_text(f"train:\n  short: [1, 2] # as [{listed}] # or [{listed}]\n  long: [a]\n")
    text = recipe.rewritten(path, {"train": {"long": [f"class {n}, x" for n in range(20)]}})
    assert text.splitlines()[1] == f"  short: [1, 2] # as [{listed}] # or [{listed}]"
    assert len(text.splitlines()) > 4
    path.write_text(text, encoding="utf-8")
    assert read_yaml(path)["train"]["long"] == [f"class {n}, x" for n in range(20)]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_trains_two_iterations(name: str, tmp_path: Path):
    tree = plain(resolved(name, tmp_path))
    backbone = tree["model"]["backbone"]
    backbone["pretrained"] = None
    if backbone["name"].startswith("vit_"):  # a large one takes gigabytes
        tiny = {"2": "vit_tiny_patch14_reg4_dinov2", "3": "vit_tiny_patch16_dinov3"}
        (kind,) = re.findall(r"dinov(\d)", backbone["name"])
        backbone["name"] = tiny[kind]
    tree["train"] |= {"batch_size": 2, "device": "cpu"}
    tree["train"]["schedule"]["warmup_iters"] = 0  # whose rates change no digit of a weight
    params = Params.model_validate_json(json.dumps(tree))
    classes = len(params.data.classes)
    torch.manual_seed(0)
    learner = learner_of(params, classes)
    before = [parameter.detach().clone() for parameter in learner.model.parameters()]
    frozen = {key for key, own in learner.model.named_parameters() if not own.requires_grad}
    assert bool(frozen) == name.startswith("linear_")
    for iteration in range(2):
        images = torch.randint(256, (2, 64, 64, 3), dtype=torch.uint8)
        shown = torch.randperm(classes)[:8].to(torch.uint8)  # as in a photograph, not all at once
        targets = shown[torch.randint(len(shown), (2, 64, 64))]
        batch = (images, targets, torch.arange(2) + 2 * iteration)
        terms, _ = train_step(learner, batch, params.train.accumulation)
        assert terms
        assert all(torch.isfinite(term) for term in terms.values())
    for old, (key, new) in zip(before, learner.model.named_parameters(), strict=True):
        assert torch.isfinite(new).all(), key
        assert torch.equal(old, new) == (key in frozen), key
