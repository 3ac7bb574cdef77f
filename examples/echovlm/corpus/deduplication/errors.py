"""What deduplication refuses."""

from moe_adapter.errors import MoEAdapterError


class DeduplicationError(MoEAdapterError):
    """Instances, settings or a saved state that cannot be used."""
