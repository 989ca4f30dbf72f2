"""What `prepare` left: shards and index.json, also one with an md5 that fits."""

import hashlib
import json
import shutil
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
    said = {name: value for name, value in vars(store).items() if name != "folder"}
    splits = [store.split(name) for name in SPLITS]
    return said, [array.tobytes() for split in splits for record in split for array in record]


def attempt(whole: Path, expected: Any, rng: Random, folder: Path) -> str:
    """Open and read a copy of the data set of which one file is mutated."""
    shutil.copytree(whole, folder, dirs_exist_ok=True)
    path = rng.choice([rng.choice(sorted(folder.glob("*.bin"))), folder / INDEX, folder / INDEX])
    forged = path.name == INDEX and rng.random() < 0.5
    if forged:
        index = json.loads(path.read_text(encoding="utf-8"))
        del index["md5"]
        forge(index, rng)
        text = json.dumps(index)[:-1]
        path.write_text(text + SEAL.format(hashlib.md5(text.encode()).hexdigest()))
    else:
        path.write_bytes(mutated(path.read_bytes(), rng))
    store = Store(folder)
    store.verification(*SPLITS).finish()
    if not forged:
        assert content(store) == expected
        return RIGHT
    for split in map(store.split, SPLITS):
        for (image, target), entry in zip(split, split.entries, strict=True):
            assert image.shape == (entry.height, entry.width, 3)
            assert target.shape == (entry.height, entry.width)
    return FORGED


if __name__ == "__main__":
    with TemporaryDirectory() as root:
        folder = make(Path(root))
        main(partial(attempt, folder, content(Store(folder))))
