"""The index on a Ray cluster: its blocks in the object store, each core searching a stretch of them."""

from __future__ import annotations

from examples.echovlm.corpus.deduplication.blocks import Block
from examples.echovlm.corpus.deduplication.errors import DeduplicationError
from examples.echovlm.corpus.deduplication.ordered import Index, Match, Rule, first_matches


class RayIndex(Index):
    """Finds what `Index` finds, on the cluster at `address`, or on this machine's cores ("local").

    Raises: DeduplicationError if Ray is not installed.
    """

    def __init__(self, address: str = "local") -> None:
        super().__init__()
        try:
            import ray
        except ImportError as error:
            raise DeduplicationError('Ray is not installed; run pip install "moe-adapter[ray]"') from error
        if not ray.is_initialized():
            ray.init(address=address, include_dashboard=False, log_to_driver=False, configure_logging=False)
        self._ray = ray
        self._task = ray.remote(_search)
        self._stored: list[object] = []

    def add(self, block: Block) -> None:
        super().add(block)
        del self._stored[len(self.blocks) - 1 :]
        self._stored.append(self._ray.put(self.blocks[-1]))

    def search(self, rule: Rule, queries: Block) -> dict[int, Match]:
        """The same matches: of two stretches that both have a duplicate, the first has the earlier one."""
        if not self._stored:
            return {}
        cores = int(self._ray.cluster_resources()["CPU"])
        stretch = -(-len(self._stored) // cores)
        shared = self._ray.put(queries)
        tasks = [
            self._task.remote(rule, shared, *self._stored[start : start + stretch])
            for start in range(0, len(self._stored), stretch)
        ]
        found: dict[int, Match] = {}
        for matches in self._ray.get(tasks):
            found = matches | found
        return found


def _search(rule: Rule, queries: Block, *blocks: Block) -> dict[int, Match]:
    return first_matches(rule, queries, blocks)
