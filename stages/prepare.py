"""Stage 1: the user's images -> an audited, packed data set in data/prepared."""

import re
import shutil
import sys

from tqdm import tqdm

from pipeline.data.audit import Part, prepare
from pipeline.data.files import some
from pipeline.data.splits import SPLITS
from pipeline.data.store import PREPARED, SUMMARY, Store
from pipeline.disk import writing
from stages import run_main

MOST = 20  # warnings on the screen


def main() -> None:
    """Read params.yaml, audit and pack the data set."""
    # Here, because the processes that pack import this module, and would import torch with it.
    from pipeline.experiment import load_params
    from pipeline.launchers.slurm import run_as_job

    params = load_params()
    if job := params.launcher.job("prepare"):
        run_as_job("stages.prepare", (), job)
        return
    with tqdm(desc="prepare", unit=" images", file=sys.stdout) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        with writing(PREPARED):
            try:
                part = Part(*params.launcher.place())
                warnings = prepare(params.data, PREPARED, show, part)
            except OSError:
                shutil.rmtree(PREPARED, ignore_errors=True)  # a part of it is of no use
                raise
    if warnings is None:
        return  # the first machine says it
    store = Store(PREPARED)
    splits = {name: store.split(name) for name in SPLITS}
    print("images:", ", ".join(f"{name} {len(split)}" for name, split in splits.items()))
    pattern = params.data.format.group_by
    if pattern:
        names = [entry.name for split in splits.values() for entry in split.entries]
        if alone := [name for name in names if not re.search(pattern, name)]:
            print(
                f"warning: data.format.splits.group_by {pattern!r} matches nothing in {len(alone)} "
                f"of {len(names)} names, each of which is a group of its own: {some(alone)}"
            )
    for line in warnings[:MOST]:
        print("warning:", line)
    if len(warnings) > MOST:
        print(f"warning: ... {len(warnings)} in all, which {PREPARED / SUMMARY} lists")
    missing = [name for name, pixels in zip(store.classes, store.pixels) if not pixels]
    if missing:
        print("warning: train has no pixel of", ", ".join(missing))


if __name__ == "__main__":
    run_main(main)
