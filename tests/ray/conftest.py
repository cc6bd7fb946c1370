"""A Ray cluster of two nodes on this machine, for all tests of this folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.huggingface.sessions.tools import TOKENIZER
from tests.huggingface.tools import make_model

OBJECT_STORE_BYTES = 80 * 2**20


@pytest.fixture(scope="session")
def cluster() -> Iterator[Any]:
    """Started once; every test finds it as it was."""
    pytest.importorskip("ray", reason="needs the extra ray")
    # Workers import the package and the tests as this process does.
    places = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(places)
    # Beside the other tests, and not behind them.
    os.environ.update(RAY_worker_niceness="0")
    from memorizing.ray.cluster import NAMESPACE, import_ray

    ray = import_ray()
    from ray.cluster_utils import Cluster

    options = {"num_cpus": 2, "object_store_memory": OBJECT_STORE_BYTES}
    made = Cluster(initialize_head=True, head_node_args={**options, "include_dashboard": False})
    made.add_node(**options)
    ray.init(made.address, namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and its tokenizer, as every machine loads them."""
    path = tmp_path_factory.mktemp("model")
    make_model().save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return path
