"""A Ray cluster's cores find what one process finds."""

from __future__ import annotations

import pytest

from benchmarks.instances import generated_instances
from examples.echovlm.corpus.deduplication import Deduplicator, RougeL, SimHash, ordered


@pytest.mark.slow
def test_ray_gives_the_same_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    from examples.echovlm.corpus.deduplication.cluster import RayIndex

    monkeypatch.setattr(ordered, "CHUNK", 100)
    instances = generated_instances(1500)
    try:
        for measure in (RougeL, SimHash):
            for against in ("prior", "kept"):
                alone = list(Deduplicator(measure(), against=against).verdicts(instances))
                index = RayIndex()
                spread = list(Deduplicator(measure(), against=against, index=index).verdicts(instances))
                assert spread == alone
                assert len(index.blocks) > int(ray.cluster_resources()["CPU"]) > 0
    finally:
        ray.shutdown()
