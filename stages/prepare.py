"""Stage 1: the user's images -> an audited, packed data set in data/prepared."""

import sys

from tqdm import tqdm

from pipeline.data.audit import prepare
from pipeline.data.splits import SPLITS
from pipeline.data.store import PREPARED, SUMMARY, Store
from stages import run_main

MOST = 20  # warnings on the screen


def main() -> None:
    """Read params.yaml, audit and pack the data set."""
    # Here, because the processes that pack import this module, and would import torch with it.
    from pipeline.experiment import load_params

    params = load_params()
    with tqdm(desc="prepare", unit=" images", file=sys.stdout) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        warnings = prepare(params.data, PREPARED, show)
    store = Store(PREPARED)
    splits = {name: store.split(name) for name in SPLITS}
    print("images:", ", ".join(f"{name} {len(split)}" for name, split in splits.items()))
    pattern = params.data.format.group_by
    entries = [entry for split in splits.values() for entry in split.entries]
    if pattern and all(entry.group == entry.name for entry in entries):
        print(f"warning: every image is a group of its own: group_by {pattern!r} matches no name")
    for line in warnings[:MOST]:
        print("warning:", line)
    if len(warnings) > MOST:
        print(f"warning: ... {len(warnings)} in all, which {PREPARED / SUMMARY} lists")
    missing = [name for name, pixels in zip(store.classes, store.pixels) if not pixels]
    if missing:
        print("warning: train has no pixel of", ", ".join(missing))


if __name__ == "__main__":
    run_main(main)
