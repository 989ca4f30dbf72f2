"""What `prepare` left: shards, table and index, also with an md5 that fits."""

import hashlib
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

from pipeline.data import audit
from pipeline.data.splits import SPLITS
from pipeline.data.store import INDEX, SEAL, Store
from pipeline.data.table import TABLE
from pipeline.disk import file_md5
from tests.fuzz.door import RIGHT, forge, main, mutated
from tests.unit.pairs import data_params, labels, photo, write

FORGED = "accepted with an md5 that fits, and every record is there"


def make(root: Path) -> Path:
    """A data set of five images, two of them in a shard."""
    for number, split in enumerate(("train", "train", "train", "val", "test")):
        size = (5, 4 + number)
        write(root, f"{split}/{number}", photo(number, size), labels(size))
    threads = ThreadPoolExecutor(2)
    pool = mock.patch.object(audit, "ProcessPoolExecutor", return_value=threads)
    with pool, mock.patch.object(audit, "RECORDS_PER_SHARD", 2):
        audit.prepare(data_params(root), root / "prepared", lambda done, total: None)
    return root / "prepared"


def content(store: Store) -> Any:
    """All that a store says and holds."""
    said = {name: value for name, value in vars(store).items() if name not in ("folder", "_splits")}
    splits = [store.split(name) for name in SPLITS]
    entries = [list(split.entries) for split in splits]
    return said, entries, [array.tobytes() for split in splits for one in split for array in one]


def seal(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the index, and give it the md5 that fits."""
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    del index["md5"]
    change(index)
    text = json.dumps(index)[:-1]
    end = SEAL.format(hashlib.md5(text.encode()).hexdigest())
    (folder / INDEX).write_text(text + end, encoding="utf-8")


def seal_table(folder: Path, name: str) -> None:
    """Give the index the md5 of a changed file of the table."""
    md5 = file_md5(folder / name)
    seal(folder, lambda index: index["table"].update({name: md5}))


def attempt(whole: Path, expected: Any, rng: Random, folder: Path) -> str:
    """Open and read a copy of the data set of which one file is mutated."""
    shutil.copytree(whole, folder, dirs_exist_ok=True)
    forged = rng.random() < 0.4
    shards = sorted(path.name for path in folder.glob("*.bin"))
    name = rng.choice((INDEX, *TABLE) if forged else (rng.choice(shards), INDEX, *TABLE))
    if forged and name == INDEX:
        seal(folder, lambda index: forge(index, rng))
    else:
        (folder / name).write_bytes(mutated((folder / name).read_bytes(), rng))
        if forged:
            seal_table(folder, name)
    store = Store(folder)
    store.verification(*SPLITS).finish()
    if not forged:
        assert content(store) == expected
        return RIGHT
    for split in map(store.split, SPLITS):
        for (image, target), entry in zip(split, split.entries, strict=True):
            assert all(one < len(store.classes) for one in entry.classes)
            assert image.shape == (entry.height, entry.width, 3)
            assert target.shape == (entry.height, entry.width)
    return FORGED


if __name__ == "__main__":
    with TemporaryDirectory() as root:
        folder = make(Path(root))
        main(partial(attempt, folder, content(Store(folder))))
