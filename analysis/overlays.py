"""Which expert each patch of a case's frames chose, laid over the frames."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from moe_adapter.analysis import style
from moe_adapter.analysis.figures import letter, panel_grid
from moe_adapter.analysis.reader import RoutingRecord
from moe_adapter.errors import MoEAdapterError

Grid = tuple[int, int]


def patch_experts(record: RoutingRecord, case: str, grids: Sequence[Grid], *, layer: int) -> list[np.ndarray]:
    """The strongest expert of each image token of a case, (rows, columns) for each frame, in the frames' order.

    Args:
        grids: (rows, columns) of image tokens of each frame: in Qwen2-VL's processor output `image_grid_thw[:, 1:]`
            divided by the merge size, 2.

    Raises:
        MoEAdapterError: the record has no image tokens of that case and layer, or not as many as the grids have.
    """
    return patch_experts_by_layer(record, case, grids, where=pc.field("layer") == layer)[layer]


def patch_experts_by_layer(
    record: RoutingRecord, case: str, grids: Sequence[Grid], *, where: pc.Expression | None = None
) -> dict[int, list[np.ndarray]]:
    """`patch_experts` of each layer that passes the filter, in one pass over the record.

    Raises:
        MoEAdapterError: as `patch_experts`.
    """
    image = (pc.field("case") == case) & (pc.field("modality") == "image")
    chosen: dict[int, list[np.ndarray]] = {}
    for block in record.tokens(image if where is None else image & where):
        for layer, expert_TK, _ in block.by_layer():
            chosen.setdefault(layer, []).append(expert_TK[:, 0])
    experts = {layer: np.concatenate(parts) for layer, parts in chosen.items()}
    sizes = [rows * columns for rows, columns in grids]
    found = {len(expert_T) for expert_T in experts.values()}
    if found != {sum(sizes)}:
        raise MoEAdapterError(
            f"case {case!r} has {max(found, default=0)} image tokens in {record.name}, and the grids {list(grids)} "
            f"have {sum(sizes)}: name a recorded case and layer, and the grids of its frames after merging."
        )
    splits = np.cumsum(sizes)[:-1]
    return {
        layer: [frame.reshape(grid) for frame, grid in zip(np.split(expert_T, splits), grids, strict=True)]
        for layer, expert_T in experts.items()
    }


def expert_map(
    record: RoutingRecord,
    case: str,
    frames: Sequence[Any],
    grids: Sequence[Grid],
    *,
    layer: int,
    width_mm: float = style.DOUBLE_COLUMN_MM,
) -> Figure:
    """The frames of a case, each beside itself under its patches' first experts.

    Args:
        frames: images, as PIL's or as arrays (height, width) or (height, width, 3).
        grids: as for `patch_experts`.

    Raises:
        MoEAdapterError: as `patch_experts`, or the numbers of frames and grids differ.
    """
    if len(frames) != len(grids):
        raise MoEAdapterError(f"got {len(frames)} frames and {len(grids)} grids, expected one grid for each frame.")
    maps = patch_experts(record, case, grids, layer=layer)
    experts = record.facts.layers[layer].num_experts
    looks = style.expert_looks(experts)
    colours = ListedColormap([look["facecolor"] for look in looks])
    with style.style([case]):
        figure, axes = panel_grid(2 * len(frames), width_mm, sharey=False)
        for number, (frame, chosen) in enumerate(zip(frames, maps, strict=True)):
            for ax, overlaid in zip(axes[2 * number : 2 * number + 2], (False, True), strict=True):
                image = np.asarray(frame)
                height, width = image.shape[:2]
                ax.imshow(image, cmap="gray", extent=(0, width, height, 0))
                if overlaid:
                    scale = dict(cmap=colours, vmin=-0.5, vmax=experts - 0.5, alpha=0.55, interpolation="nearest")
                    ax.imshow(chosen, extent=(0, width, height, 0), **scale)
                ax.set_title(f"({letter(2 * number + overlaid)}) frame {number + 1}{', experts' if overlaid else ''}")
                ax.set_axis_off()
        if experts <= style.MOST_COLOURS:
            handles = [Patch(label=str(expert), **look) for expert, look in enumerate(looks)]
            figure.legend(handles=handles, loc="outside upper right", ncols=experts, title=f"expert, layer {layer}")
    return figure
