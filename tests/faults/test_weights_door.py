"""Rows 22 and 23, and hostile files: at every door that takes weights, by what they hold."""

import builtins
import io
import json
import logging
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save as save_tensors
from torch import nn

from pipeline.disk import FORMAT
from pipeline.errors import InputError
from pipeline.models.backbones import BackboneParams, build_backbone
from pipeline.models.weights import Unread, read_file
from pipeline.prediction.model import load_model
from pipeline.training.checkpoint import load_checkpoint, load_weights
from tests.unit.sections import learner_of, params
from tests.unit.test_weights import MMENGINE, Tiny, saved, theirs


class Payload:
    """Pickled as a call."""

    def __init__(self, *call: object) -> None:
        self.call = call

    def __reduce__(self) -> tuple:
        return self.call[0], self.call[1:]


@pytest.mark.parametrize("zipped", [True, False])
def test_what_could_run_is_refused_by_name_and_does_not_run(zipped: bool, tmp_path: Path):
    """Row 22: the payload stays what it is."""
    trap = tmp_path / "trap"
    code = f"__import__('os').mkdir({str(trap)!r})"
    weights = theirs(Tiny())
    for call, name in (((eval, code), "eval"), ((builtins.exec, code), "exec")):
        content = {"state_dict": weights, "meta": Payload(*call)}
        path = saved(content, tmp_path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(
            ValueError, match=rf"given\.pth: .* it names {name}, .* trust"
        ) as caught:
            load_weights(Tiny(), path)
        assert "weights_only" not in str(caught.value)  # no advice to load it in another way
        assert not trap.exists()
    torch.load(path, weights_only=False)
    assert trap.exists()  # the file was dangerous indeed


def test_getattr_looks_nothing_up_and_gives_nothing_to_call(tmp_path: Path):
    """Row 22: what is let through holds nothing."""
    path = saved({"method": OrderedDict.fromkeys}, tmp_path)
    assert b"getattr" in path.read_bytes()
    assert type(read_file(path)["method"]) is Unread
    with pytest.raises(ValueError, match=r"given\.pth: .* call reduce for unrecognized function"):
        read_file(saved({"call": Payload(OrderedDict.fromkeys, "ab")}, tmp_path))


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
def test_a_truncated_file_of_mmengine_is_refused_by_name(kept: float, tmp_path: Path):
    """Row 22: a broken file is no reason to load it in another way."""
    whole = MMENGINE.read_bytes()
    (tmp_path / "part.pth").write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(ValueError, match=r"part\.pth: not a checkpoint that can be loaded safely"):
        load_weights(Tiny(), tmp_path / "part.pth")


def test_all_that_does_not_fit_is_one_error_and_nothing_is_loaded(tmp_path: Path):
    """Row 23: all of it at once."""
    model = Tiny(num_classes=4)
    before = theirs(model)
    weights = theirs(Tiny(num_classes=3, auxiliary=False))
    weights["neck.conv.weight"] = weights.pop("backbone.stem.1.running_var")
    content = {"state_dict": weights, "meta": {"dataset_meta": {"classes": ("a", "b", "c")}}}
    path = saved(content, tmp_path)
    with pytest.raises(ValueError, match="does not fit") as caught:
        load_weights(model, path, classes=("a", "b", "c", "d"))
    assert str(caught.value).splitlines() == [
        f"{path}, of 3 classes instead of 4, does not fit the model of params.yaml:",
        "  auxiliary_head.conv_seg.bias: missing",
        "  auxiliary_head.conv_seg.weight: missing",
        "  backbone.conv1.1.running_var: missing",
        "  decode_head.conv_seg.bias: (3,) in the file, (4,) in the model",
        "  decode_head.conv_seg.weight: (3, 2, 1, 1) in the file, (4, 2, 1, 1) in the model",
        "  neck.conv.weight: unknown",
        "change the model, or take what fits: train.load_from with train.load_strict: false",
    ]
    assert all(before[name].equal(weight) for name, weight in theirs(model).items())


def test_not_strict_the_rest_is_loaded_and_the_classifier_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """Row 23: only where train.load_strict says so."""
    model = Tiny(num_classes=4, auxiliary=False)
    before = model.decode_head.conv_seg.weight.detach().clone()
    weights = theirs(Tiny(num_classes=3))
    path = saved({"state_dict": weights, "meta": {"CLASSES": ("a", "b", "c")}}, tmp_path)
    load_weights(model, path, strict=False, classes=("a", "b", "x", "d"))
    assert model.decode_head.conv_seg.weight.equal(before)
    own = model.state_dict()
    assert own["backbone.conv1.0.weight"].equal(weights["backbone.stem.0.weight"])
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("instep", logging.WARNING)
    assert record.getMessage().splitlines()[1:] == [
        "  decode_head.conv_seg.bias: (3,) in the file, (4,) in the model",
        "  decode_head.conv_seg.weight: (3, 2, 1, 1) in the file, (4, 2, 1, 1) in the model",
    ]
    with pytest.raises(ValueError, match=r"has no weight of the model of params\.yaml:\n"):
        load_weights(nn.Sequential(nn.Linear(2, 2)), path, strict=False)


def pretrained(path: Path) -> Any:
    return build_backbone(BackboneParams(name="resnet18", pretrained=str(path)))


def loaded(path: Path) -> Any:
    return load_weights(Tiny(), path)


DOORS: dict[str, Callable[[Path], Any]] = {
    "pretrained": pretrained,
    "load_from": loaded,
    "resume_from": load_checkpoint,
    "load_model": load_model,
}


def zipped(parts: dict[str, bytes]) -> bytes:
    """An archive in the form of torch.save."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, part in ({"version": b"3"} | parts).items():
            archive.writestr(f"archive/{name}", part)
    return content.getvalue()


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("zipped", [True, False])
def test_no_door_runs_what_a_file_holds(door: str, zipped: bool, tmp_path: Path):
    """Row 22: load_from, resume_from, pretrained and load_model alike."""
    trap = tmp_path / "trap"
    code = f"__import__('os').mkdir({str(trap)!r})"
    path = saved({"a": Payload(eval, code)}, tmp_path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match=r"given\.pth: .* it names eval") as caught:
        DOORS[door](path)
    assert "weights_only" not in str(caught.value)
    assert not trap.exists()
    torch.load(path, weights_only=False)
    assert trap.exists()  # the file was dangerous indeed


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[1, 2]",
        b'{"state_dict": None}',
        b"PK\x03\x04 no archive",
        b"\x80\x02",  # torch raises an error without a text
        zipped({"constants.pkl": b""}),  # for torch it is one of TorchScript
        pickle.dumps([1, 2]),
        pickle.dumps({"state_dict": None}),
        [1, 2],
        {"state_dict": None},
        {"state_dict": [1]},
        {"model": None, "params": None},
        {"model": {}, "params": []},
        {"model": {"a": 1}, "params": {}},
        {"model": {"a": torch.zeros(2, device="meta")}, "params": {}},
        {"model": {"a": torch.zeros(1).expand(10**12)}, "params": {}},
        {"model": {}, "params": {}, "iteration": "x"},
        {"model": {}, "params": {}, "best": {"iteration": torch.zeros(2)}},
        {"model": {}, "params": {}, "format": torch.zeros(2)},
        {"model": {}, "params": {}, "classes": torch.zeros(2)},
        {"query.weight": torch.zeros(1), "class_predictor.weight": torch.zeros(1)}
        | {"layers.0.attention.k_proj.weight": torch.zeros(1)},
    ],
)
def test_a_file_of_another_content_is_refused_in_a_line(door: str, content: object, tmp_path: Path):
    """Row 22 and others: in our words, and without advice to load it unsafely."""
    path = tmp_path / "given.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(InputError) as caught:
        DOORS[door](path)
    said = str(caught.value)
    assert "weights_only" not in said
    assert "arbitrary" not in said
    assert not said.endswith(": ")
    assert door == "pretrained" or said.startswith(str(path))


@pytest.mark.parametrize("legacy", [False, True])
def test_an_archive_that_torch_would_not_write_is_refused(legacy: bool, tmp_path: Path):
    """Row 22: a compressed one, which may become more than memory holds, or one of ours of old."""
    content = {"model": {"a": torch.zeros(10**6)}, "params": {}}
    path = saved(content, tmp_path, _use_new_zipfile_serialization=not legacy)
    if not legacy:
        whole = zipfile.ZipFile(path)
        path = tmp_path / "small.pth"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in whole.namelist():
                archive.writestr(name, whole.read(name))
        assert path.stat().st_size < 10**5
    with pytest.raises(InputError, match=f"{path.name}: not a checkpoint that"):
        read_file(path)


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
def test_a_model_of_torchscript_is_refused_with_the_way_to_use_it(tmp_path: Path):
    """Row 22: nothing has altered it."""
    path = tmp_path / "given.pt"
    torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(path)
    with pytest.raises(InputError, match=r"given\.pt: .* compressed, .* save the state_dict"):
        read_file(path)


@pytest.mark.parametrize(
    "described",
    [b"[", b"[[]]", b"[" * 100000, b'{"model": 1, "params": 2}', b"7"],
)
def test_a_description_of_another_form_is_refused(described: bytes, tmp_path: Path):
    """Others: of safetensors, whose metadata may say anything."""
    path = tmp_path / "model.safetensors"
    whole = save_tensors({"a": torch.zeros(2)}, {"instep": "@"})
    (length,) = struct.unpack("<Q", whole[:8])
    header = whole[8 : 8 + length].replace(b'"@"', json.dumps(described.decode()).encode())
    path.write_bytes(struct.pack("<Q", len(header)) + header + whole[8 + length :])
    with pytest.raises(InputError, match=r"model\.safetensors"):
        load_model(path)


def test_a_description_nested_too_deep_for_json_is_refused(tmp_path: Path):
    """Others: of a pickle, which may nest as deep as it likes."""
    path, depth = tmp_path / "given.pt", 10**5
    content = {"model": {}, "params": {"train": {"lr": 77}}, "format": FORMAT}
    deep = b"]" * depth + b"a" * (depth - 1)  # lists, each in the one before it
    path.write_bytes(zipped({"data.pkl": pickle.dumps(content, protocol=2).replace(b"KM", deep)}))
    with pytest.raises(InputError, match=r"given\.pt: its description can't be used"):
        load_model(path)


def test_whole_numbers_are_no_weights(tmp_path: Path):
    """Row 23: a flipped bit in a header makes other numbers of the same bytes."""
    weights = theirs(Tiny())
    name = "decode_head.conv_seg.bias"
    weights[name] = weights[name].view(torch.int32)
    with pytest.raises(InputError, match=f"{name}: torch.int32 in the file, torch.float32 in the"):
        load_weights(Tiny(), saved(weights, tmp_path))


MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"state": {}, "param_groups": [{"param_names": ["x"]}]},
        {"state": {0: None}, "param_groups": [{}]},
        {"state": {99999: {}}, "param_groups": [{}]},
        {
            "state": {0: {"step": torch.ones(())} | dict.fromkeys(MOMENTS, torch.zeros(1, 2))},
            "param_groups": [{}],
        },
    ],
)
def test_a_state_of_an_optimizer_of_another_network_is_refused(state: dict[str, Any]):
    """Row 23: it would fail in the first step, or not at all."""
    tiny = {"model.head.name": "linear", "model.backbone.name": "vit_tiny_patch16_dinov3"}
    learner = learner_of(params(tiny | {"model.backbone.pretrained": None}), 3)
    if state.get("state") == {}:
        learner.restore({"optimizer": state})  # which knows nothing of any parameter
        return
    with pytest.raises(InputError, match=r"state of the optimizer that does not fit .*load_from"):
        learner.restore({"optimizer": state})
