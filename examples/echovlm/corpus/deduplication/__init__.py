"""Near-duplicates out of generated instances (paper: ROUGE-L above 0.7 against any prior instance, or SimHash).

    deduplicator = Deduplicator(RougeL(), against="prior")
    kept = [instance for instance, drop in deduplicator.verdicts(read_instances("instances.jsonl")) if drop is None]

docs/deduplication.md says what is compared, in which order, and what it costs.
"""

from examples.echovlm.corpus.deduplication.instances import Instance, read_instances
from examples.echovlm.corpus.deduplication.ordered import Deduplicator, Drop
from examples.echovlm.corpus.deduplication.rouge import RougeL
from examples.echovlm.corpus.deduplication.simhash import SimHash

__all__ = ["Deduplicator", "Drop", "Instance", "RougeL", "SimHash", "read_instances"]
