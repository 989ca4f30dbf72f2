"""Where the bytes of shards come from: a folder, or an object store by way of a bounded cache."""

import fcntl
import os
import re
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np
from filelock import FileLock

from pipeline.data.table import Array
from pipeline.disk import amount, file_md5, writing
from pipeline.errors import InputError, one_line
from pipeline.params import main_checkout

CACHE, CACHE_GB = "INSTEP_CACHE", "INSTEP_CACHE_GB"  # variables of the environment
USUAL_GB = 100
PART = ".part"
OURS = re.compile(
    rf"[0-9a-f]{{32}}(\.\d+\{PART})?"
)  # what is being fetched has its size in its name

TRIES, PAUSE = 6, 0.2  # of a request; seconds after the first, twice as many after the next
FETCHERS = 4  # threads of a process that fetch ahead
HELD = 4  # shards that a process has open, which keeps them in the cache; to open one is quick
# Seconds to wait for other processes to let go of shards in a full cache, and between two looks.
PATIENCE, POLL = 60.0, 0.02


class Shards(Protocol):
    """The shards of a data set, by name."""

    def open(self, name: str) -> Array:
        """The bytes of a shard, mapped into memory."""

    def expect(self, name: str) -> None:
        """Make ready a shard that will be opened soon."""


class LocalShards:
    """Those that lie in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._mapped: dict[str, Array] = {}

    def open(self, name: str) -> Array:
        """See Shards."""
        if name not in self._mapped:
            mapped = np.memmap(self.folder / name, np.uint8, "r")
            self._mapped[name] = np.asarray(mapped)  # whose slices cost less
        return self._mapped[name]

    def expect(self, name: str) -> None:
        """See Shards; they are there."""

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_mapped": {}}  # a worker process maps the files itself


class ObjectStore:
    """A folder of an object store, whose objects are named by their md5.

    So one that is there is never changed, and data sets may share what they have in common.

    `url` is one of fsspec's: https://filesystem-spec.readthedocs.io
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    @cached_property
    def _place(self) -> tuple[Any, str]:
        from fsspec.core import url_to_fs  # it takes a while, and most have no object store
        from fsspec.implementations.local import LocalFileSystem

        try:
            system, root = url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise InputError(f"data.store: {self.url} can't be used: {one_line(error)}") from None
        if isinstance(system, LocalFileSystem):  # others have no folders
            system.makedirs(root, exist_ok=True)
        return system, root

    def put(self, path: Path, md5: str) -> None:
        """Store a file, unless it is there.

        Raises:
            InputError: the store does not take it, after several tries.
        """
        system, root = self._place

        def attempt() -> None:
            with suppress(FileNotFoundError):
                if system.info(f"{root}/{md5}")["size"] == path.stat().st_size:
                    return
            system.put_file(str(path), f"{root}/{md5}")

        self._tried(attempt, f"{path} can't be written to")

    def get(self, md5: str, path: Path) -> None:
        """Fill an existing file with the object.

        Raises:
            InputError: it isn't there, can't be read after several tries, or is another one.
        """
        system, root = self._place

        def attempt() -> None:
            system.get_file(f"{root}/{md5}", str(path))
            if file_md5(path) != md5:
                raise OSError("its bytes have another md5")

        with writing(path):
            self._tried(attempt, f"{md5} can't be read from")

    def _tried(self, attempt: Callable[[], None], what: str) -> None:
        pause = PAUSE
        for left in reversed(range(TRIES)):
            try:
                return attempt()
            except (FileNotFoundError, PermissionError) as error:
                failure: Exception = error
                break
            except Exception as error:  # each store has exceptions of its own
                failure = error
                if left:
                    time.sleep(pause)
                    pause *= 2
        raise InputError(
            f"data.store: {what} {self.url}: {one_line(failure)}; see that it is there and that "
            "its keys are in the environment, then run the same command again"
        )


class Held(NamedTuple):
    """An open file of the cache, which stays there as long, and its bytes."""

    file: BinaryIO
    pixels: Array


class CachedShards:
    """Those of an object store, of which a folder on this machine's disk holds some.

    `files` has the md5 and the bytes of each. All processes of a machine share the folder, and all
    data sets do; it holds no more than `limit` bytes, and loses what was not used for the longest
    time. Who uses a file has it locked: https://man7.org/linux/man-pages/man2/flock.2.html
    """

    def __init__(
        self, store: ObjectStore, files: Mapping[str, tuple[str, int]], folder: Path, limit: int
    ) -> None:
        self.store, self.files, self.folder, self.limit = store, files, folder, limit
        self._start()

    def _start(self) -> None:
        self._held: dict[str, Held] = {}  # the last used is the last
        self._expected: set[str] = set()

    @cached_property
    def _fetchers(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(FETCHERS, "shards")

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("store", "files", "folder", "limit")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._start()

    def open(self, name: str) -> Array:
        """See Shards.

        Raises:
            InputError: it can't be fetched, or there is no room for it.
        """
        held = self._held.pop(name, None) or self._hold(name)
        self._held[name] = held
        if len(self._held) > HELD:
            self._held.pop(next(iter(self._held))).file.close()
        return held.pixels

    def expect(self, name: str) -> None:
        """See Shards; a thread fetches it."""
        if name in self._held or name in self._expected:
            return
        if not (self.folder / self.files[name][0]).exists():
            self._expected.add(name)
            self._fetchers.submit(self._fetch_ahead, name)

    def size(self, name: str) -> int:
        """The bytes of a shard."""
        return self.files[name][1]

    def cached(self) -> dict[Path, str]:
        """The md5 of each shard that is in the cache, by its path."""
        paths = {self.folder / md5: md5 for md5, _ in self.files.values()}
        return {path: md5 for path, md5 in paths.items() if path.exists()}

    def _fetch_ahead(self, name: str) -> None:
        try:
            self._fetch(name, ahead=True)
        except InputError:  # who opens it will say so, if it still is so then
            pass
        finally:
            self._expected.discard(name)

    def _hold(self, name: str) -> Held:
        md5, _ = self.files[name]
        while True:
            try:
                file = (self.folder / md5).open("rb")
            except FileNotFoundError:
                # Processes that wait for one another must hold nothing that another one waits for.
                while self._held:
                    self._held.popitem()[1].file.close()
                self._fetch(name)
                continue
            fcntl.flock(file, fcntl.LOCK_SH)
            if os.fstat(file.fileno()).st_nlink:  # else it was taken away in between
                break
            file.close()
        os.utime(file.fileno())
        return Held(file, np.asarray(np.memmap(file, np.uint8, "r")))

    def _fetch(self, name: str, *, ahead: bool = False) -> None:
        """Have a shard in the cache, which may lose it again until it is held."""
        md5, size = self.files[name]
        path = self.folder / md5
        part = self.folder / f"{md5}.{size}{PART}"
        self.folder.mkdir(parents=True, exist_ok=True)
        with part.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if path.exists() or not os.fstat(file.fileno()).st_nlink:
                return  # another process has fetched it meanwhile, or has given up
            try:
                self._make_room(part, ahead=ahead)
                self.store.get(md5, part)
                os.fsync(file.fileno())
                part.rename(path)
            except BaseException:
                part.unlink(missing_ok=True)
                raise

    def _make_room(self, part: Path, *, ahead: bool) -> None:
        """Until there is room for what `part` will hold.

        Raises:
            InputError: what is in use leaves none.
        """
        deadline = time.monotonic() + (0 if ahead else PATIENCE)
        while not self._has_room(part):
            if time.monotonic() >= deadline:
                raise InputError(
                    f"{CACHE_GB}: {amount(self.limit)} in {self.folder} are in use, and have no "
                    f"room for {amount(_size(part))} more; raise it"
                )
            time.sleep(POLL)

    def _has_room(self, part: Path) -> bool:
        """Whether there is room now, after what nobody uses has gone, as much as is needed."""
        with FileLock(self.folder / "lock"):
            files = [path for path in self.folder.iterdir() if OURS.fullmatch(path.name)]
            sizes = {path: _size(path) for path in sorted(files, key=_used_at)}
            excess = sum(sizes.values()) - self.limit
            for path, size in sizes.items():
                if excess > 0 and path != part and _removed(path):
                    excess -= size
        return excess <= 0


def _size(path: Path) -> int:
    """The bytes that a file of the cache has, or will have."""
    if path.suffix == PART:
        return int(path.suffixes[0][1:])
    with suppress(FileNotFoundError):
        return path.stat().st_size
    return 0


def _used_at(path: Path) -> float:
    with suppress(FileNotFoundError):
        return path.stat().st_mtime
    return 0.0


def _removed(path: Path) -> bool:
    """Remove a file of the cache unless a process uses it."""
    with suppress(FileNotFoundError), path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        path.unlink()
    return True


def shards_of(folder: Path, store: str | None, files: Mapping[str, tuple[str, int]]) -> Shards:
    """The shards of a data set in `folder`, or in an object store where `store` is its URL.

    `files` has the md5 and the bytes of each.

    Raises:
        InputError: the bound of the cache is no number.
    """
    if store is None:
        return LocalShards(folder)
    return CachedShards(ObjectStore(store), files, *cache_of_this_machine())


def cache_of_this_machine() -> tuple[Path, int]:
    """The folder of the cache, and the bytes that it may hold.

    Raises:
        InputError: the environment says no number.
    """
    folder = Path(os.environ.get(CACHE) or main_checkout() / ".dvc" / "tmp" / "instep-shards")
    given = os.environ.get(CACHE_GB, str(USUAL_GB))
    try:
        limit = int(float(given) * 1e9)
    except (ValueError, OverflowError):
        limit = 0
    if limit <= 0:
        raise InputError(f"{CACHE_GB} is {given!r} in the environment; it must be a number above 0")
    return folder, limit
