"""moe-adapter: any dense transformer becomes a dual-path mixture of experts, in place, in one call."""

from moe_adapter.config import DualPathConfig
from moe_adapter.errors import MoEAdapterError
from moe_adapter.files import load_adapter, save_adapter
from moe_adapter.layer import DualPathMoE
from moe_adapter.objective import balance_loss, dual_path_layers
from moe_adapter.plan import plan_injection
from moe_adapter.stages import set_stage
from moe_adapter.surgery import eject_dual_path_moe, inject_dual_path_moe, static_only

__all__ = [
    "DualPathConfig",
    "DualPathMoE",
    "MoEAdapterError",
    "balance_loss",
    "dual_path_layers",
    "eject_dual_path_moe",
    "inject_dual_path_moe",
    "load_adapter",
    "plan_injection",
    "save_adapter",
    "set_stage",
    "static_only",
]
