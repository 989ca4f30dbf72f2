"""Faults 13 and 27 in data/prepared: damaged, truncated, lost and forged files."""

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data import audit
from pipeline.data.store import INDEX, Store
from pipeline.data.table import NAMES, RECORDS, ROW, Array
from pipeline.errors import InputError
from tests.fuzz.prepared import seal, seal_table
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


def refused_when_opened(folder: Path) -> str:
    """Why a data set can't be opened; checks that the file and the remedy are named."""
    with pytest.raises(InputError) as caught:
        Store(folder)
    text = str(caught.value)
    assert text.startswith(f"{folder}/")
    assert text.endswith("; run `dvc repro -f prepare`")
    return text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda index: index["classes"].pop(), "classes doesn't fit together"),
        (lambda index: index["pixels"].append(1), "classes doesn't fit together"),
        (lambda index: index.update(ignore_index=1), "classes doesn't fit together"),
        (lambda index: index.update(frequency="many"), "valid array"),
        (lambda index: index.update(exif="perhaps"), "'apply' or 'ignore'"),
        (lambda index: index["splits"].pop("test"), "the splits train, val and test"),
        (lambda index: index["splits"].update(train=3), "5 rows instead of those of index.json"),
        (lambda index: index["splits"].update(train=-4), "greater than or equal to 0"),
        (lambda index: index["table"].pop(NAMES), "must be records.table and names.txt"),
        (lambda index: index["shards"].update({"../x": ""}), "should match pattern"),
        (lambda index: index["shards"].update({"val-00001.bin": ""}), "the order of the shards"),
        (lambda index: index["shards"].pop("val-00000.bin"), "the order of the shards"),
        (lambda index: index.pop("content"), "Field required"),
        (lambda index: index.update(more=1), "Extra inputs"),
    ],
)
def test_an_index_that_does_not_fit_is_refused_even_with_its_md5(
    change: Callable[[dict[str, Any]], object], said: str, prepared: Path
):
    """Row 27: counts and names that don't fit each other, wrong types."""
    seal(prepared, change)
    assert said in refused_when_opened(prepared)


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("shard", 9, "not in the order of the shards"),
        ("shard", 1, "is not where the one before it ends"),
        ("offset", 0, "is not where the one before it ends"),
        ("offset", 10**12, "is not where the one before it ends"),
        ("height", 0, "has no pixel, or too many"),
        ("height", 2**32 - 1, "bytes instead of"),
        ("width", 10**9, "bytes instead of"),
        ("classes", 1, "classes that don't exist"),
        ("name", 0, "are not one after another"),
        ("name_size", 10**9, "are not one after another"),
        ("group_size", 0, "are not one after another"),
    ],
)
def test_a_row_that_does_not_fit_is_refused_even_with_its_md5(
    column: str, value: int, said: str, prepared: Path
):
    """Row 27: the second image of train has classes or a place that don't exist."""
    rows = np.fromfile(prepared / RECORDS, ROW)
    rows[column][1] = value
    rows.tofile(prepared / RECORDS)
    assert f"{RECORDS} is not as `prepare` wrote it: md5" in refused_when_opened(prepared)
    seal_table(prepared, RECORDS)
    assert said in refused_when_opened(prepared)


def no_text(names: Array) -> Array:
    names[3] = 0xFF
    return names


def half_a_letter(names: Array) -> Array:
    """Two names share a letter of two bytes: the text is right, and neither name is."""
    (end,) = np.flatnonzero(names == ord("1"))[1:2]  # of train/1, its group
    names[end : end + 2] = np.frombuffer("é".encode(), np.uint8)
    return names


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (no_text, "are no UTF-8"),
        (half_a_letter, "are no UTF-8"),
        (lambda names: names[:-1], "are not one after another"),
        (lambda names: names[:0], "empty file"),
    ],
)
def test_names_that_do_not_fit_are_refused_even_with_their_md5(
    change: Callable[[Array], Array], said: str, prepared: Path
):
    """Row 27."""
    change(np.fromfile(prepared / NAMES, np.uint8)).tofile(prepared / NAMES)
    assert f"{NAMES} is not as `prepare` wrote it: md5" in refused_when_opened(prepared)
    seal_table(prepared, NAMES)
    assert said in refused_when_opened(prepared)


@pytest.mark.parametrize("size", [0, 1, ROW.itemsize, -1])
def test_a_table_of_another_length_is_refused_even_with_its_md5(size: int, prepared: Path):
    """Row 27."""
    path = prepared / RECORDS
    path.write_bytes(path.read_bytes()[:size])
    seal_table(prepared, RECORDS)
    refused_when_opened(prepared)
    path.unlink()
    with pytest.raises(InputError, match=rf"{RECORDS} is missing; run"):
        Store(prepared)


def test_two_images_of_one_name_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """No format has them today; whatever reads a table of names relies on it."""
    write(tmp_path, "train/0", photo(0), labels())
    write(tmp_path, "val/0", photo(1), labels())
    reader = data_params(tmp_path).reader()
    records, _ = reader.records()
    monkeypatch.setattr(type(reader), "records", lambda _: ([*records, records[0]], []))
    with pytest.raises(InputError, match="image 'train/0' is there twice"):
        audit.prepare(data_params(tmp_path), tmp_path / "prepared", lambda done, total: None)
    assert not [*(tmp_path / "prepared").iterdir()]


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
