"""Shards of an object store, by way of a cache that all processes of a machine share."""

import hashlib
import random
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from pipeline.data import audit, shards
from pipeline.data.shards import CachedShards, LocalShards, ObjectStore, cache_of_this_machine
from pipeline.data.store import Store
from pipeline.errors import InputError
from tests.unit.pairs import data_params, labels, photo, write

SIZE = 1000  # bytes of a shard


class Faulty(LocalFileSystem):
    """A folder that fails as an object store does, and counts what it is asked for."""

    protocol = "faulty"
    failures: ClassVar[list[Exception]] = []
    asked: ClassVar[Counter[str]] = Counter()

    def get_file(self, rpath: str, lpath: str, **more: Any) -> None:
        Faulty.asked[Path(rpath).name] += 1
        if Faulty.failures:
            raise Faulty.failures.pop(0)
        super().get_file(rpath, lpath, **more)


fsspec.register_implementation("faulty", Faulty)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "PAUSE", 0.001)
    Faulty.failures, Faulty.asked = [], Counter()


def content(number: int) -> bytes:
    return bytes([number]) * SIZE


def stored(folder: Path, count: int, protocol: str = "file") -> tuple[ObjectStore, dict[str, Any]]:
    """A store with so many shards, and what CachedShards knows of them."""
    store = ObjectStore(f"{protocol}://{folder}/objects/")
    files = {}
    for number in range(count):
        path = folder / f"train-{number:05}.bin"
        path.write_bytes(content(number))
        md5 = hashlib.md5(content(number)).hexdigest()
        store.put(path, md5)
        files[path.name] = md5, SIZE
        path.unlink()
    return store, files


def used(folder: Path) -> int:
    """The bytes that lie in a cache."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.name != "lock")


def test_shards_are_fetched_once_and_kept_within_the_bound(tmp_path: Path):
    store, files = stored(tmp_path, 5, "faulty")
    cache = tmp_path / "cache"
    cached = CachedShards(store, files, cache, 3 * SIZE)
    names = [*files]
    for number in (0, 1, 0, 2, 1):
        assert cached.open(names[number]).tobytes() == content(number)
    assert Faulty.asked.total() == 3
    for number in (3, 4, 0):  # of which each takes the place of what was not used for longest
        assert cached.open(names[number]).tobytes() == content(number)
        assert used(cache) <= 3 * SIZE
    assert Faulty.asked.total() == 6
    fresh = CachedShards(store, files, cache, 3 * SIZE)
    assert {names[n] for n in (0, 3, 4)} == {n for n in names if files[n][0] in listed(cache)}
    assert fresh.open(names[3]).tobytes() == content(3)
    assert Faulty.asked.total() == 6


def listed(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir()} - {"lock"}


def test_what_is_expected_is_there_when_it_is_opened(tmp_path: Path):
    store, files = stored(tmp_path, 3, "faulty")
    cache = tmp_path / "cache"
    cached = CachedShards(store, files, cache, 10 * SIZE)
    for name in (*files, *files):
        cached.expect(name)
    wait_until(lambda: len(listed(cache)) == 3 and not any("part" in n for n in listed(cache)))
    asked = Faulty.asked.total()
    for number, name in enumerate(files):
        assert cached.open(name).tobytes() == content(number)
    assert Faulty.asked.total() == asked == 3


def wait_until(reached: Any) -> None:
    deadline = time.monotonic() + 60
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_request_that_fails_is_repeated_and_bytes_that_are_others_are_not_taken(tmp_path: Path):
    store, files = stored(tmp_path, 2, "faulty")
    cached = CachedShards(store, files, tmp_path / "cache", 10 * SIZE)
    (first, (md5, _)), (second, (other, _)) = files.items()
    Faulty.failures = [OSError("reset"), TimeoutError("slow"), RuntimeError("a client's own")]
    assert cached.open(first).tobytes() == content(0)
    assert Faulty.asked[md5] == 4
    (tmp_path / "objects" / other).write_bytes(content(7))
    with pytest.raises(
        InputError, match=f"{other} can't be read from .*its bytes have another md5"
    ):
        cached.open(second)
    assert Faulty.asked[other] == shards.TRIES
    (tmp_path / "objects" / other).unlink()
    with pytest.raises(InputError, match=r"can't be read from .*; see that it is there and that"):
        cached.open(second)
    assert Faulty.asked[other] == shards.TRIES + 1  # what isn't there does not come by waiting
    assert listed(tmp_path / "cache") == {md5}


def test_a_cache_that_is_too_small_for_what_is_used_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(shards, "PATIENCE", 0.05)
    store, files = stored(tmp_path, 2)
    cache = tmp_path / "cache"
    one, other = (CachedShards(store, files, cache, SIZE) for _ in range(2))
    first, second = files
    one.open(first)
    one.open(second)  # one process needs not hold two
    with pytest.raises(
        InputError, match=r"INSTEP_CACHE_GB: 1\.0 kB in .* in use, and have no room"
    ):
        other.open(first)
    assert one.open(second).tobytes() == content(1)


def test_files_of_others_in_the_folder_and_fetches_that_were_killed(tmp_path: Path):
    store, files = stored(tmp_path, 2)
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "thesis.txt").write_bytes(bytes(9 * SIZE))
    (cache / f"{'0' * 32}.{SIZE}.part").write_bytes(b"half")  # of a process that is no more
    cached = CachedShards(store, files, cache, 2 * SIZE)
    for number, name in enumerate(files):
        assert cached.open(name).tobytes() == content(number)
    assert listed(cache) == {"thesis.txt", *(md5 for md5, _ in files.values())}


def read_all(cached: CachedShards, seed: int) -> int:
    """Read in a random order, as the loader does; the bytes that the cache had at most."""
    rng = random.Random(seed)
    order = [rng.randrange(len(cached.files)) for _ in range(150)]
    names, most = [*cached.files], 0
    for number, later in zip(order, [*order[5:], *order[:5]], strict=True):
        cached.expect(names[later])
        assert cached.open(names[number]).tobytes() == content(number)
        most = max(most, sum(size_of(path) for path in cached.folder.iterdir()))
    return most


def size_of(path: Path) -> int:
    with suppress(FileNotFoundError):
        return 0 if path.name == "lock" else path.stat().st_size
    return 0


@pytest.mark.slow
def test_processes_share_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store, files = stored(tmp_path, 12)
    cached = CachedShards(store, files, tmp_path / "cache", 8 * SIZE)
    with ProcessPoolExecutor(3, get_context("spawn")) as pool:
        found = [*pool.map(read_all, [cached] * 3, range(3))]
    assert max(found) <= 8 * SIZE


@pytest.mark.parametrize("given", ["0", "-1", "much", "nan", "inf"])
def test_a_bound_that_is_none_is_refused(given: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("INSTEP_CACHE_GB", given)
    with pytest.raises(InputError, match=f"INSTEP_CACHE_GB is '{given}' in the environment"):
        cache_of_this_machine()


@pytest.mark.parametrize(
    ("url", "said"),
    [("gopher://x/y", "can't be used: Protocol not known: gopher"), ("adl://x", "can't be used")],
)
def test_a_store_that_can_t_be_used_is_refused(url: str, said: str, tmp_path: Path):
    (tmp_path / "one").touch()
    with pytest.raises(InputError, match=f"data.store: {url} {said}"):
        ObjectStore(url).put(tmp_path / "one", "md5")


def test_a_data_set_in_a_store_is_the_one_in_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The folder has no shard then; one of the cache that has changed is fetched again."""
    monkeypatch.setenv("INSTEP_CACHE", str(tmp_path / "cache"))
    for number, split in enumerate(("train", "train", "val", "test")):
        write(tmp_path, f"{split}/{number}", photo(number), labels())
    found = {}
    for name in ("here", "there"):
        params = data_params(
            tmp_path, store=f"file://{tmp_path}/objects" if name == "there" else None
        )
        audit.prepare(params, tmp_path / name, lambda done, total: None)
        store = Store(tmp_path / name)
        store.verification("train", "val").finish()
        split = store.split("train")
        found[name] = (
            store.content,
            [(image.tobytes(), target.tobytes()) for image, target in split],
        )
    assert found["here"] == found["there"]
    assert not [*(tmp_path / "there").glob("*.bin")]
    (path,) = (tmp_path / "cache").glob("[0-9a-f]*")
    damaged = bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]
    path.write_bytes(damaged)
    store.verification("train", "val").finish()
    assert not path.exists()
    image, target = Store(tmp_path / "there").split("train")[0]
    assert (image.tobytes(), target.tobytes()) == found["here"][1][0]


def test_what_lies_in_a_folder_is_mapped(tmp_path: Path):
    (tmp_path / "a.bin").write_bytes(content(3))
    local = LocalShards(tmp_path)
    local.expect("a.bin")
    assert local.open("a.bin").tobytes() == content(3)
    assert local.open("a.bin") is local.open("a.bin")
