"""A data set whose pixels lie in an object store that is far away and fails now and then."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
import torch

from tests.project import REPOSITORY, ended, make_project, metrics, stage, untrained
from tests.server import LocalServer

FAR = ("--delay", "0.2", "--failing", "4")


@pytest.fixture(scope="module")
def keys(folder: Path) -> Iterator[dict[str, str]]:
    """What leads to a store with the bucket `images`, and to the cache."""
    command = [sys.executable, "-m", "tests.slow_s3", *FAR]
    with LocalServer(command, "/moto-api/", folder, PYTHONPATH=str(REPOSITORY)) as server:
        region = "us-east-1"
        own = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing"}
        client = boto3.client("s3", region_name=region, endpoint_url=server.address, **own)
        client.create_bucket(Bucket="images")
        found = {name.upper(): value for name, value in own.items()}
        found |= {"AWS_DEFAULT_REGION": region, "AWS_ENDPOINT_URL": server.address}
        yield found | {"INSTEP_CACHE": str(folder / "cache")}


@pytest.fixture(scope="module")
def here(folder: Path) -> Path:
    """A project that has trained on the pixels of its own folder, an epoch and more."""
    changes = {"train.shuffle": "blocks", "train.batch_size": 12, "train.iterations": 14}
    changes |= {"evaluation.interval": 14}
    project = make_project(folder / "here", {"train": 150, "val": 2, "test": 4}, **changes)
    for name in ("prepare", "train", "evaluate"):
        stage(project, name)
    return project


def weights(project: Path) -> dict[str, torch.Tensor]:
    return torch.load(project / "outputs/checkpoints/last.pt", weights_only=True)["model"]


def test_a_training_is_the_same_wherever_the_pixels_are(
    here: Path, folder: Path, keys: dict[str, str]
) -> None:
    there = untrained(here, folder / "there", **{"data.store": "s3://images/feet"})
    for name in ("prepare", "train", "evaluate"):
        stage(there, name, **keys)
    assert metrics(there) == metrics(here)
    assert all(weight.equal(weights(here)[name]) for name, weight in weights(there).items())
    assert not [*(there / "data/prepared").glob("*.bin")]
    shards = sorted(path.stat().st_size for path in (here / "data/prepared").glob("*.bin"))
    cached = [path for path in Path(keys["INSTEP_CACHE"]).iterdir() if path.name != "lock"]
    assert sorted(path.stat().st_size for path in cached) == shards
    assert " 503 " in (folder / "server.log").read_text()

    small = keys | {"INSTEP_CACHE_GB": "0.001"}
    code, said = ended(there, "train", **small)
    assert code == 1
    assert re.search(
        r"error: train.batch_size: 12 needs .* of train at a time, and INSTEP_CACHE_GB allows "
        r"1.0 MB; raise it or lower train.batch_size\n",
        said,
    )
