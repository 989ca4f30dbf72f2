"""Stage 1: the user's images -> an audited, packed data set in data/prepared."""

import sys

from tqdm import tqdm

from pipeline.data.audit import prepare
from pipeline.data.splits import SPLITS
from pipeline.data.store import PREPARED, Store
from pipeline.params import load_params


def main() -> None:
    """Read params.yaml, audit and pack the data set."""
    params = load_params()
    with tqdm(desc="prepare", unit=" images", file=sys.stdout) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        prepare(params.data, PREPARED, show)
    store = Store(PREPARED)
    print("images:", ", ".join(f"{split} {len(store.split(split))}" for split in SPLITS))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
