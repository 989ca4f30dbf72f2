"""Row 25 and issue item 8: a wrong params.yaml is a clear line each, before any stage works."""

import gc
import json
import math
import os
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from pipeline import distributed
from pipeline.data import store
from pipeline.data.formats import BlueMarble
from pipeline.errors import InputError
from pipeline.experiment import load_params
from stages import gate, prepare, report, run_main, train
from tests.unit.sections import document, refusal
from tests.unit.test_stages import workspace

LETTERS = "abcdefghijklm"
BOMB = "a: &a [x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in pairwise(LETTERS)
)
MERGES = (
    BOMB.replace("[x]", "{x: 1}")
    .replace("[*", "{<<: [*")
    .replace("*]", "*]")
    .replace("]\n", "]}\n")
)


def of_bytes(folder: Path, content: bytes) -> str:
    """In what words a file of these bytes is refused, which takes no time."""
    path = folder / "params.yaml"
    path.write_bytes(content)
    begun = time.monotonic()
    with pytest.raises(InputError) as caught:
        load_params(path)
    assert time.monotonic() - begun < 60
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (b"a: 1\nb: \xff\n", "line 2 is not UTF-8; save the file as UTF-8"),
        ("data: 1".encode("utf-16"), "line 1 is not UTF-8"),
        (b"a: " + b"[" * 5000, "line 1, column 35: nested more than 32 deep"),
        (b"{a: " * 5000, "nested more than 32 deep"),
        (BOMB.encode(), "more than 10,000 values, those of aliases counted each time"),
        (MERGES.encode(), "more than 10,000 values, those of aliases counted each time"),
        (b"a: &a [*a]", "an alias within what it stands for"),
        (b"? [1, 2]\n: 3", "line 1, column 3: a key must be a name, not a list or a section"),
        (b"? {a: 1}\n: 3", "a key must be a name"),
        (b"data: 1\ndata: 2", "line 2, column 1: the key data stands twice"),
        (b"a: 0x_", "line 1, column 4: no int that can be read: '0x_'"),
        (b"a: !!float x", "no float that can be read: 'x'"),
        (b"a: " + b"9" * 5000, "no int that can be read: '9999"),
        (b"a: 0x" + b"f" * 5000, "no int that can be read: '0xffff"),
        (b"a: !!python/object/apply:os.mkdir [x]", "could not determine a constructor"),
        (b'a: "\\U00110000"', "an escape in it is no character"),
        (b"a: \x07", "line 1: special characters are not allowed: '\\x07'"),
        (b"a: [1", "line 1, column 6: while parsing a flow sequence"),
        (b"a\n---\nb", "line 2, column 1: expected a single document"),
        (b'data: {name: "a\\0"}', "data.name: 'a\\x00' holds '\\x00', which can't be shown"),
        (b'data: {name: "\\ud800"}', "data.name: '\\ud800' holds '\\ud800', which can't be shown"),
        (b'{"a\\e[31m": 1}', "params: a name in it: 'a\\x1b[31m' holds '\\x1b'"),
        (b"data: " + b"x" * 2000, "has 2000 characters; use at most 1000"),
        (b"- 1", "must hold the sections data, augmentation"),
    ],
)
def test_a_file_that_no_reader_can_read_is_one_line(content: bytes, rule: str, tmp_path: Path):
    """Row 25: in one line, at once, with the place."""
    said = of_bytes(tmp_path, content)
    assert rule in said
    assert "\x1b" not in said


def test_a_file_with_a_byte_order_mark_is_read(tmp_path: Path):
    """Row 25: some editors begin UTF-8 with it, and DVC reads it."""
    path = tmp_path / "params.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(document({})).encode())
    assert load_params(path).train.iterations == 700


def test_of_very_many_findings_the_first_are_told(tmp_path: Path):
    """Row 25: a file of thousands of unknown names floods no screen."""
    said = of_bytes(tmp_path, b"\n".join(b"k%d: 1" % number for number in range(3000)))
    assert len(said.splitlines()) == 22
    assert said.endswith("... and 2988 more")


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("train.lr", 1e20, "train.lr: 1e+20 should be less than or equal to 1000"),
        ("train.lr", 10**400, "train.lr: 1000000000"),
        ("train.workers", 10**400, "train.workers: 1000000000"),
        ("train.gpus", 10**9, "train.gpus: 1000000000 should be less than or equal to 1024"),
        ("train.batch_size", 10**9, "train.batch_size: 1000000000 should be less than"),
        ("train.iterations", 2**63, "train.iterations: 9223372036854775808 should be less"),
        ("model.std", [1e-300] * 3, "model.std.0: 1e-300 should be greater than or equal to 0.01"),
        ("model.mean", [1e9] * 3, "model.mean.0: 1000000000.0 should be less than or equal to 255"),
        (
            "augmentation.ratio_range",
            [1e-9, 1e-9],
            "augmentation.ratio_range.0: 1e-09 should be greater than or equal to 0.01",
        ),
        ("augmentation.crop_size", [1, 1], "augmentation.crop_size.0: 1 should be greater than"),
        ("augmentation.crop_size", [10**6, 64], "augmentation.crop_size.0: 1000000 should be less"),
        ("evaluation.crop", [10**6, 64], "evaluation.crop.0: 1000000 should be less than"),
        ("evaluation.scales", [1e-9], "evaluation.scales.0: 1e-09 should be greater than"),
        ("model.head.channels", [10**6] * 5, "model.head.channels.0: 1000000 should be less"),
        ("model.loss.cross_entropy", 1e300, "model.loss.cross_entropy: 1e+300 should be less"),
        ("train.rare_class_temperature", 1e-300, "train.rare_class_temperature: 1e-300 should be"),
    ],
)
def test_an_absurd_number_is_refused_by_name(name: str, value: object, rule: str, tmp_path: Path):
    """Row 25: it would train a network of NaN, or find no memory, hours later."""
    said = refusal(tmp_path, {name: value})
    assert rule in said
    assert all(len(line) < 200 for line in said.splitlines())


@pytest.mark.parametrize(
    "uri", ["http://me:secret@host:5000", "https://secret@host", "postgresql://me:se@cret@host/db"]
)
def test_a_password_in_the_store_s_address_is_refused_and_not_shown(uri: str, tmp_path: Path):
    """Row 25: git and MLflow keep params.yaml."""
    said = refusal(tmp_path, {"tracking.uri": uri})
    assert "tracking.uri: holds a user or password" in said
    assert "MLFLOW_TRACKING_PASSWORD" in said
    assert "cret" not in said


def test_a_password_in_the_address_of_the_pixels_is_refused_and_not_shown(tmp_path: Path):
    said = refusal(tmp_path, {"data.store": "sftp://anna:geheim@files.example.org/feet"})
    assert "data.store: holds a password, which git would keep with params.yaml" in said
    assert "geheim" not in said
    assert "data.store" in refusal(tmp_path, {"data.store": "a folder"})


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"head.name": "smp.Unett"}, "head.name 'smp.Unett' is unknown; did you mean smp.Unet?"),
        ({"backbone.name": "resnet3"}, "backbone.name 'resnet3' is unknown; did you mean resnet34"),
        ({"backbone.name": "tu-resnet1"}, "timm has no resnet1; did you mean tu-resnet"),
        ({"backbone.name": "tu-resnet18.x"}, "Invalid pretrained tag (x) for resnet18"),
        ({"backbone.pretrained": "x.pt"}, "no weights 'x.pt' of resnet18; use imagenet or"),
        ({"backbone.name": "resnext101_32x4d", "backbone.pretrained": "imagenet"}, "use ssl or"),
        ({"head.name": "smp.Linknet", "backbone.name": "mit_b0"}, "`mit_b0` is not supported for"),
        ({"head.name": "smp.PAN", "backbone.name": "vgg11"}, "do not support dilated mode"),
    ],
)
def test_what_the_library_has_not_is_refused(changes: dict[str, object], rule: str, tmp_path: Path):
    """Row 25: with the nearest name, and not only when the training builds the network."""
    whole = {"head.name": "smp.Unet", "backbone.name": "resnet18", "backbone.pretrained": None}
    named = {f"model.{name}": value for name, value in (whole | changes).items()}
    assert rule in refusal(tmp_path, named)


@pytest.mark.parametrize(
    ("classes", "rule"),
    [
        (["a", "", "c"], "data: classes: '' is empty, or begins or ends with a blank"),
        (["a", "b ", "c"], "data: classes: 'b ' is empty, or begins or ends with a blank"),
        (["Wall", "wall", "c"], "data: classes: 'Wall' and 'wall' look alike"),
        (["a\nb", "b", "c"], "data.classes.0: 'a\\nb' holds '\\n', which can't be shown"),
        (["a", "\u202eb", "c"], "data.classes.1: '\\u202eb' holds '\\u202e', which can't be shown"),
    ],
)
def test_a_class_that_nothing_can_show_is_refused(classes: list[str], rule: str, tmp_path: Path):
    """Row 25: two classes must never share a metric, nor one look like another."""
    assert rule in refusal(tmp_path, {"data.classes": classes})


@pytest.mark.parametrize("stage", [prepare.main, lambda: train.main([]), report.main, gate.main])
def test_every_stage_says_that_it_runs_elsewhere(
    stage: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Others: another working directory was a FileNotFoundError."""
    monkeypatch.chdir(tmp_path)
    rule = f"there is no params.yaml in {tmp_path}; run this in the repository's root"
    with pytest.raises(InputError, match=rule):
        stage()


@pytest.mark.parametrize("stage", [report.main, gate.main])
def test_a_stage_that_reads_few_parameters_names_what_is_wrong_with_them(
    stage: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Row 25: a missing section was a KeyError."""
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text("train: {work_dir: 3}\ngate: null\nevaluation: {split: x}")
    with pytest.raises(InputError, match=r"train\.work_dir: 3 should be a valid string"):
        stage()


def test_prepare_does_nothing_before_the_whole_file_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Row 25: a misspelt parameter of the training is told before the data are read."""
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(json.dumps(document({"train.iteratons": 5})))
    with pytest.raises(InputError, match=r"did you mean train\.iterations\?"):
        prepare.main()
    assert [path.name for path in tmp_path.iterdir()] == ["params.yaml"]


def test_more_processes_than_gpus_are_refused_with_both_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Row 10: by the stage itself, before any process starts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "hand_over", lambda *_, **__: pytest.fail("processes started"))
    monkeypatch.setattr(distributed.torch.cuda, "device_count", lambda: 0)
    changes = {"train.gpus": 8, "train.device": "cuda"}
    workspace(tmp_path, changes, {"train": 1, "val": 1, "test": 1})
    with pytest.raises(InputError, match=r"cuda and train\.gpus: 8, but this machine shows 0 GPUs"):
        train.main([])
    monkeypatch.setattr(distributed.torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match=r"gpus: 8, but this machine shows 1; use at most 1"):
        train.main([])


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes nobody for a moment, as root alone may")
def test_a_read_only_checkout_is_told_with_the_folder(monkeypatch: pytest.MonkeyPatch):
    """Others: it was a FileExistsError of data/prepared."""
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / store.PREPARED
        prepared.mkdir(parents=True)
        (prepared / "index.json").touch()
        (Path(folder) / "params.yaml").write_text(json.dumps(document({})))
        Path(folder).chmod(0o755)
        monkeypatch.chdir(folder)
        monkeypatch.setattr(BlueMarble, "records", lambda self: ([], []))
        os.seteuid(65534)
        try:
            with pytest.raises(SystemExit, match="error: data/prepared: permission is denied"):
                run_main(prepare.main)
        finally:
            os.seteuid(0)
            gc.unfreeze()


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


def test_a_file_without_sections_is_refused(tmp_path: Path):
    (tmp_path / "params.yaml").write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match="must hold the sections data, augmentation, model"):
        load_params(tmp_path / "params.yaml")
