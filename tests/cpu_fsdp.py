"""FSDP2 on CPUs by way of accelerate, which on CPUs takes DDP in its place without a word; torch shards there too."""

from __future__ import annotations

import functools

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType


def shard_on_cpus() -> None:
    """From now on accelerate treats the processes of a CPU run as those of a GPU run, where FSDP is asked for."""
    init = AcceleratorState.__init__
    if hasattr(init, "__wrapped__"):
        return

    @functools.wraps(init)
    def init_with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init_with_fsdp
