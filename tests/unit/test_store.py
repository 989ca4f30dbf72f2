"""The prepared data set: what was packed is read back, under DVC's own identity."""

import json
import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from dvc.repo import Repo

from pipeline.data import audit
from pipeline.data.store import INDEX, Store
from pipeline.data.table import Entries, Entry, TableWriter
from pipeline.disk import FORMAT, file_md5
from pipeline.yaml12 import read_yaml
from tests.unit.pairs import data_params, labels, photo, write

SIZES = [(12, 16), (7, 5), (31, 2), (1, 9), (12, 16), (40, 33)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of mixed sizes; train fills more than one shard."""
    root = tmp_path_factory.mktemp("mixed")
    for number in range(audit.RECORDS_PER_SHARD + 6):
        size = SIZES[number % len(SIZES)]
        write(root, f"train/é {number:03}", photo(number, size), labels(size))
    for number, split in ((1000, "val"), (1001, "test")):
        write(root, f"{split}/x", photo(number), labels())
    audit.prepare(data_params(root), root / "prepared", lambda done, total: None)
    return root / "prepared"


def test_what_was_packed_is_read_back(folder: Path):
    store = Store(folder)
    train = store.split("train")
    assert len(train) == audit.RECORDS_PER_SHARD + 6
    assert len(store.shards) == 4
    assert [entry.name for entry in train.entries[:2]] == ["train/é 000", "train/é 001"]
    for number in [*range(len(train)), 0]:
        size = SIZES[number % len(SIZES)]
        image, target = train[number]
        assert np.array_equal(image, photo(number, size))
        assert np.array_equal(target, labels(size))
    assert np.array_equal(store.split("val")[0][0], photo(1000))
    assert np.array_equal(store.split("test")[0][0], photo(1001))


def test_a_split_travels_to_another_process_without_its_pixels(folder: Path):
    split = Store(folder).split("train")
    first = np.array(split[0][0])
    sent = pickle.dumps(split)
    assert len(sent) < 20000
    assert np.array_equal(pickle.loads(sent)[0][0], first)


def test_the_md5_is_that_of_dvc(folder: Path):
    root = folder.parent
    with Repo.init(str(root), no_scm=True) as repo:
        repo.add(str(folder))
    (out,) = read_yaml(root / "prepared.dvc")["outs"]
    assert out["nfiles"] == 8
    assert Store(folder).md5 == out["md5"]
    assert Store(folder).shards == {
        path.name: file_md5(path) for path in sorted(folder.glob("*.bin"))
    }


def test_a_folder_without_an_index_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"index\.json is missing; run `dvc repro prepare` first"):
        Store(tmp_path)


@pytest.mark.parametrize("found", [FORMAT + 1, FORMAT - 1, None])
def test_an_index_of_another_version_is_refused_with_the_way_on(
    found: int | None, folder: Path, tmp_path: Path
):
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    assert index.pop("format") == FORMAT
    other = index if found is None else index | {"format": found}
    (tmp_path / INDEX).write_text(json.dumps(other), encoding="utf-8")
    refusal = (
        f"{tmp_path}/index.json has format {found}, and this version of the tool reads format "
        f"{FORMAT}; run `dvc repro -f prepare`, or use the version that wrote it"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(refusal)}$"):
        Store(tmp_path)


def test_machines_that_prepare_together_write_the_same_files(folder: Path):
    """Three machines, of which one has nothing to do in the second round of shards."""
    params, together = data_params(folder.parent), folder.parent / "together"
    places = [audit.Part(number, 3, "first attempt") for number in range(3)]
    with ThreadPoolExecutor(3) as machines:
        found = machines.map(partial(audit.prepare, params, together, print), places)
        assert [*found] == [[], None, None]
    names = sorted(path.name for path in folder.iterdir())
    assert sorted(path.name for path in together.iterdir()) == names
    assert all(file_md5(together / name) == file_md5(folder / name) for name in names)


def test_a_table_comes_part_by_part(tmp_path: Path):
    """Three shards in parts of two records, of which the second part holds the end of a shard."""
    lengths = (3, 1, 2)
    entries = [
        Entry(
            f"{shard}/{number}",
            "ä" * shard,
            shard=f"train-{shard}.bin",
            offset=4 * number,
            height=1,
            width=1,
            classes=(shard,),
        )
        for shard, length in enumerate(lengths)
        for number in range(length)
    ]
    whole = Entries.of(entries)
    with TableWriter(tmp_path) as table:
        for start in range(0, len(entries), 2):
            table.add(whole.part(start, 2))
        table.add(whole.part(0, 0))
    assert table.shards == ["train-0.bin", "train-1.bin", "train-2.bin"]
    assert [*Entries.mapped(tmp_path, table.shards)] == entries
    last = [*whole.part(3, 3)]
    with TableWriter(tmp_path) as table:
        table.add(whole.part(3, 3))
    assert table.shards == ["train-1.bin", "train-2.bin"]
    assert [*Entries.mapped(tmp_path, table.shards)] == last
    assert table.md5s() == {path.name: file_md5(path) for path in tmp_path.iterdir()}
