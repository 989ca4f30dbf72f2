"""Faults 13 and 27 in data/prepared: damaged, truncated, lost and forged files."""

import hashlib
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from pipeline.data import audit
from pipeline.data.store import INDEX, SEAL, Index, Store
from pipeline.errors import InputError
from tests.project import SMALL, ended, make_project, set_params, stage
from tests.unit.pairs import data_params, labels, photo, write


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of two images of train in each of two shards, and one of val."""
    root = tmp_path_factory.mktemp("whole")
    for number in range(4):
        write(root, f"train/{number}", photo(number, (5, 4 + number)), labels((5, 4 + number)))
    write(root, "val/x", photo(9), labels())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(audit, "ProcessPoolExecutor", lambda _, __: ThreadPoolExecutor(2))
        patch.setattr(audit, "RECORDS_PER_SHARD", 2)
        audit.prepare(data_params(root), root / "prepared", lambda done, total: None)
    return root / "prepared"


@pytest.fixture
def prepared(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "prepared")
    return tmp_path / "prepared"


def refused(folder: Path, name: str) -> str:
    """Why an opened data set is refused; checks that the file and the remedy are named."""
    with pytest.raises(InputError) as caught:
        Store(folder).verification("train", "val").finish()
    text = str(caught.value)
    assert text.startswith(f"{folder / name} ")
    assert text.endswith("; run `dvc repro -f prepare`")
    return text


def test_a_whole_data_set_is_opened(prepared: Path):
    store = Store(prepared)
    store.verification("train", "val", "test").finish()
    assert len(store.shards) == 3
    assert np.array_equal(store.split("train")[3][0], photo(3, (5, 7)))


def test_a_flipped_bit_of_a_shard_is_found_by_the_run_that_opens_it(prepared: Path):
    """Row 13: any bit; only the splits that are read are looked at."""
    path = prepared / "train-00001.bin"
    good = path.read_bytes()
    for place in (0, len(good) // 2, len(good) - 1):
        content = bytearray(good)
        content[place] ^= 4
        path.write_bytes(content)
        assert "md5" in refused(prepared, path.name)
        Store(prepared).verification("val").finish()
    (prepared / "val-00000.bin").write_bytes(bytes(4 * 12 * 16))
    assert ", and 1 other; run" in refused(prepared, path.name)


def test_a_shard_that_goes_while_it_is_read_is_named(prepared: Path):
    """Row 13."""
    store = Store(prepared)
    (prepared / "train-00000.bin").unlink()
    with pytest.raises(InputError, match="No such file"):
        store.verification("train").finish()


@pytest.mark.parametrize("size", [-1, 1, -(10**9)])
def test_a_shard_of_another_length_is_refused_at_once(size: int, prepared: Path):
    """Row 13: truncated, empty or longer."""
    path = prepared / "train-00001.bin"
    whole = path.stat().st_size
    content = (path.read_bytes() + b"x")[: max(0, whole + size)]
    path.write_bytes(content)
    assert f"{len(content)} bytes instead of {whole}" in refused(prepared, path.name)


def test_a_lost_shard_is_named(prepared: Path):
    """Row 13."""
    (prepared / "val-00000.bin").unlink()
    assert "is missing" in refused(prepared, "val-00000.bin")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b"[1]", b"null", b"[" * 100_000, b'{"a":' * 100_000]
)
def test_an_index_that_is_none_is_refused(content: bytes, prepared: Path):
    """Row 27."""
    (prepared / INDEX).write_bytes(content)
    with pytest.raises(InputError, match=r"index\.json .*; run `dvc repro -f prepare`"):
        Store(prepared)


def test_every_changed_byte_of_an_index_is_found(prepared: Path):
    """Row 27: one byte in seven, each to another letter or digit."""
    path = prepared / INDEX
    good = path.read_bytes()
    for place in range(0, len(good) - 1, 7):
        content = bytearray(good)
        content[place] = ord("7") if content[place] != ord("7") else ord("3")
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"index\.json"):
            Store(prepared)


def entry(place: int, value: Any) -> Callable[[dict[str, Any]], None]:
    """Changes a value of the second image of train."""

    def change(index: dict[str, Any]) -> None:
        own = list(index["splits"]["train"][1])
        own[place] = value
        index["splits"]["train"][1] = own

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (entry(0, "train/0"), "image 'train/0' is there twice"),
        (entry(2, "train-00009.bin"), "is not where the one before it ends"),
        (entry(2, "../../etc/passwd"), "is not where the one before it ends"),
        (entry(3, 0), "is not where the one before it ends"),
        (entry(3, -80), "greater than or equal to 0"),
        (entry(3, 10**12), "is not where the one before it ends"),
        (entry(3, "80"), "valid integer"),
        (entry(4, 0), "greater than or equal to 1"),
        (entry(5, 10**9), "bytes instead of"),
        (entry(6, [77]), "classes that don't exist"),
        (entry(6, [-1]), "classes that don't exist"),
        (lambda index: index["classes"].pop(), "classes doesn't fit together"),
        (lambda index: index["pixels"].append(1), "classes doesn't fit together"),
        (lambda index: index.update(ignore_index=1), "classes doesn't fit together"),
        (lambda index: index.update(frequency="many"), "valid array"),
        (lambda index: index.update(exif="perhaps"), "'apply' or 'ignore'"),
        (lambda index: index["splits"].pop("test"), "the splits train, val and test"),
        (lambda index: index["shards"].update({"../x": ""}), "should match pattern"),
        (lambda index: index.pop("content"), "Field required"),
        (lambda index: index.update(more=1), "Extra inputs"),
    ],
)
def test_an_index_that_does_not_fit_is_refused_even_with_its_md5(
    change: Callable[[dict[str, Any]], None], said: str, prepared: Path
):
    """Row 27: ids outside the classes, offsets outside the file, names twice, wrong types."""
    content = json.loads((prepared / INDEX).read_text(encoding="utf-8"))
    del content["md5"]
    change(content)
    text = json.dumps(content)[:-1]
    seal = SEAL.format(hashlib.md5(text.encode()).hexdigest())
    (prepared / INDEX).write_text(text + seal, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        Store(prepared)
    assert said in str(caught.value)
    assert str(caught.value).startswith(f"{prepared}/")
    assert str(caught.value).endswith("; run `dvc repro -f prepare`")


def test_prepare_writes_no_index_that_does_not_fit(whole: Path):
    """What it can't read it doesn't write: an index is checked when it is made."""
    content = json.loads((whole / INDEX).read_text(encoding="utf-8"))
    del content["md5"]
    Index.model_validate_json(json.dumps(content))
    content["splits"]["val"].append(content["splits"]["val"][0])
    with pytest.raises(ValidationError, match="is there twice"):
        Index.model_validate_json(json.dumps(content))


@pytest.mark.slow
def test_stages_refuse_a_flipped_shard_before_they_use_it(tmp_path: Path):
    """Row 13: an id of 77 in a target; neither train nor evaluate shows torch's IndexError."""
    project = make_project(tmp_path, {"train": 6, "val": 2, "test": 2}, **{"train.iterations": 1})
    for name in ("prepare", "train"):
        stage(project, name)
    for split, name in (("train", "train"), ("test", "evaluate")):
        path = project / f"data/prepared/{split}-00000.bin"
        good = path.read_bytes()
        path.write_bytes(good[:-1] + bytes([77]))
        set_params(project, {"train.seed": 1} if name == "train" else {})
        code, said = ended(project, name)
        assert code == 1
        assert f"error: data/prepared/{path.name} is not as `prepare` wrote it: md5" in said
        assert "Traceback" not in said
        path.write_bytes(good)
        set_params(project, SMALL | {"train.iterations": 1})
