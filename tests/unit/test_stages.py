"""What a stage refuses before it does any work."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.data import audit, store
from pipeline.data.table import Entries, Entry
from pipeline.disk import FORMAT
from pipeline.errors import one_line, shown
from stages import evaluate, prepare, run_main, train
from tests.unit.pairs import photo
from tests.unit.sections import document


def test_a_device_without_memory_for_an_evaluation_is_told_what_may_fit() -> None:
    def main() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has")

    with pytest.raises(SystemExit) as ended:
        run_main(main)
    assert str(ended.value).startswith("error: the device has too little memory: CUDA out of mem")
    assert "lower evaluation.batch_size" in str(ended.value)
    assert "\n" not in str(ended.value)


def workspace(folder: Path, changes: dict[str, object], images: dict[str, int]) -> None:
    """params.yaml, and a prepared data set with as many images in each split."""
    (folder / "params.yaml").write_text(json.dumps(document(changes)), encoding="utf-8")
    prepared = folder / store.PREPARED
    prepared.mkdir(parents=True)
    names = [f"{split}/{number}" for split in images for number in range(images[split])]
    entries = [
        Entry(name, name, shard="train-0.bin", offset=4 * place, height=1, width=1)
        for place, name in enumerate(names)
    ]
    (prepared / "train-0.bin").write_bytes(bytes(4 * len(entries)))
    index = store.Index(
        format=FORMAT,
        name="x",
        classes=("a",),
        palette=((0, 0, 0),),
        ignore_index=255,
        exif="apply",
        content="",
        fold=None,
        pixels=[1],
        frequency=[1.0],
        shards={"train-0.bin": ""},
        table=Entries.of(entries).write(prepared),
        splits=images,
        store=None,
    )
    store.write_index(prepared, index)


def test_training_without_a_val_image_to_validate_on_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    workspace(tmp_path, {}, {"train": 1, "val": 0, "test": 1})
    with pytest.raises(ValueError, match=r"no labelled val image; use train.validate: false"):
        train.main([])


@pytest.mark.parametrize(("asked", "other"), [("val", "test"), ("test", "val")])
def test_measuring_an_empty_split_is_refused_with_the_other_one(
    asked: str, other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    workspace(tmp_path, {"evaluation.split": asked}, {"train": 1, asked: 0, other: 1})
    with pytest.raises(ValueError, match=f"labelled {asked} image; use evaluation.split: {other}"):
        evaluate.main()


@pytest.mark.parametrize(
    ("names", "warned"),
    [
        (["patient-1", "patient-2", "patient-3", "patient-4"], ""),
        (
            ["patient-1 left", "patient-1 right", "Patient-2 left", "patient-3 x", "patient-4 x"],
            "warning: data.format.splits.group_by 'patient-[0-9]+' matches nothing in 1 of 5 "
            "names, each of which is a group of its own: Patient-2 left\n",
        ),
    ],
)
def test_a_name_without_a_group_is_warned_of(
    names: list[str],
    warned: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(audit, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
    splits = {"source": "drawn", "val": 0.25, "test": 0.25, "group_by": "patient-[0-9]+"}
    changes = {"data.root": "feet", "data.format": {"name": "pairs", "splits": splits}}
    (tmp_path / "params.yaml").write_text(json.dumps(document(changes)), encoding="utf-8")
    draw(tmp_path / "feet", names)
    prepare.main()
    assert "".join(re.findall("warning: .*group.*\n", capsys.readouterr().out)) == warned


def draw(root: Path, names: list[str]) -> None:
    """An image of noise, and a target with every class, of each name."""
    for folder in ("images", "targets"):
        (root / folder).mkdir(parents=True)
    for seed, name in enumerate(names):
        Image.fromarray(photo(seed, (2, 3))).save(root / f"images/{name}.png")
        Image.fromarray(np.array([[0, 1, 2], [2, 1, 0]], np.uint8)).save(
            root / f"targets/{name}.png"
        )


def test_a_text_in_a_message_is_a_line_that_a_terminal_only_shows():
    assert shown("b\u00e9\n\x1b[31m\ud800\u202e") == "b\u00e9\\n\\x1b[31m\\ud800\\u202e"
    assert shown(5 * "x", longest=5) == "xxxxx"
    assert shown(6 * "x", longest=5) == "xxxxx\u2026"
    assert one_line(ValueError(" a\n  b\x1b ")) == "a b\\x1b"
    assert one_line(KeyError()) == "KeyError"
    assert one_line(ValueError(5000 * "x")) == 300 * "x" + "\u2026"
