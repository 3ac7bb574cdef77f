"""Which parts of a case's frames spoke for a token or phrase of the answer: Grad-CAM on Qwen2-VL's patch grid.

Own code, because captum's LayerGradCam and pytorch-grad-cam want one call of a layer with channels second, in a graph
that gradients flow through already; here the channels come last, all may be frozen, and a video is a second call.

Shape letters: N rows of a layer's output, one for each patch or token, D its width, P prompt tokens, A answer tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import nn

from moe_adapter.analysis import style
from moe_adapter.analysis.effects import evaluating
from moe_adapter.analysis.figures import letter, panel_grid
from moe_adapter.analysis.lines import wrapped
from moe_adapter.errors import MoEAdapterError
from moe_adapter.find import nearest
from moe_adapter.language import inside

Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels of the frame

LETTER_MM = 1.6  # of the figures' text, amply
HEAT = "plasma"  # even in lightness, and no shade of it is grey as the frames are
BOX_LOOKS: tuple[dict[str, Any], ...] = (
    {"edgecolor": "#E8000B"},
    {"edgecolor": "#4D9DFF", "linestyle": (0, (3, 1.5))},  # dashes tell it apart in grey
)


@torch.inference_mode(False)
@torch.enable_grad()
def grad_cam(
    model: nn.Module,
    inputs: Mapping[str, Any],
    answer_ids: Sequence[int] | torch.Tensor,
    positions: Sequence[int] | None = None,
    *,
    layer: str | int = "merger",
) -> list[np.ndarray]:
    """How much each patch speaks for chosen tokens of an answer: a map (rows, columns), ≥ 0, for each frame.

    relu(Σ_D A·w), where A (N, D) is the layer's output on one frame, and w (D,) the mean over the frame's patches of
    the gradient of the chosen tokens' summed logits, each read one position earlier, where the model predicts it.
    Maps of images come first, then those of videos, one for each temporal patch (two frames). The model may be
    injected, wrapped by peft, frozen, in bfloat16; it runs in eval mode, and no gradient is left in it.

    Args:
        inputs: the processor's output for the prompt of one case, on the model's device.
        answer_ids: the answer (A,), as `model.generate` gave it after the prompt, or as it should have been.
        positions: tokens of the answer, from 0, as `find_phrase` gives them; None is all.
        layer: "merger"; "vision.K", block K of the vision tower, "vision.-1" its last; a number, that block of the
            language model; or the name of any module that keeps a vector for each patch or token. Maps are on the
            patch grid (h, w) inside the vision tower, and on the merged grid (h/2, w/2) from the merger on.

    Source: Grad-CAM, Selvaraju et al., arXiv 1610.02391, equations 1 and 2.

    Raises:
        MoEAdapterError: no images in the inputs, or more than one case; no such layer or position; a layer whose
            output isn't on the patch grid, or doesn't reach the answer.
    """
    prompt, answer = _checked_prompt(inputs), torch.as_tensor(answer_ids).flatten()
    chosen, name = _checked_positions(positions, len(answer)), _layer_name(model, layer)
    full = _with_answer(inputs, answer.to(prompt.device))
    seen_at = torch.tensor(chosen, device=prompt.device) + prompt.shape[1] - 1
    force_eager = torch.compiler.set_stance("force_eager")  # compiled code skips hooks
    with evaluating(model), force_eager, _outputs_as_leaves(model.get_submodule(name)) as leaves:
        logits = model(**full, use_cache=False, logits_to_keep=seen_at).logits[0]
        score = logits.gather(1, full["input_ids"][0, seen_at + 1, None]).float().sum()
        reached = bool(leaves) and score.requires_grad
        gradients = torch.autograd.grad(score, leaves, materialize_grads=True) if reached else ()
    acts_ND, grads_ND = (_visual_rows(model, full, name, tensors) for tensors in (leaves, gradients))
    grids = [grid for kind in ("image", "video") for grid in _grids(inputs, kind)]
    merge = int(_vision_tower(model)[1].spatial_merge_size)  # pyright: ignore
    patches = sum(t * h * w for t, h, w in grids)
    if len(acts_ND) not in (patches, patches // merge**2):
        raise MoEAdapterError(
            f"{name} gave {len(acts_ND)} vectors for {patches} patches, which make {patches // merge**2} tokens; name "
            "a module that the model calls and that keeps one for each patch or token."
        )
    if not grads_ND.any():
        raise MoEAdapterError(
            f"nothing of the image after {name} reaches the chosen tokens: name an earlier layer, such as the merger. "
            "The language model's last block hands on only the answer's own tokens."
        )
    return _maps(acts_ND, grads_ND, grids, 1 if len(acts_ND) == patches else merge, merge)


def find_phrase(tokenizer: Any, answer_ids: Sequence[int] | torch.Tensor, phrase: str) -> list[int]:
    """Positions in the answer of the tokens that spell the first occurrence of `phrase`, in any script.

    A token that holds a part of the phrase counts whole.

    Raises:
        MoEAdapterError: the answer has no such phrase.
    """
    ids = torch.as_tensor(answer_ids).flatten().tolist()

    def spells(start: int, end: int) -> bool:
        return phrase in tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False)

    end = next((end for end in range(1, len(ids) + 1) if phrase and spells(0, end)), None)
    if end is None:
        raise MoEAdapterError(
            f"the answer has no phrase {phrase!r}; give it as it is written there: "
            f"{tokenizer.decode(ids, clean_up_tokenization_spaces=False)!r}"
        )
    start = next(start for start in reversed(range(end)) if spells(start, end))
    return list(range(start, end))


def gradcam_figure(
    frames: Sequence[Any],
    maps: Sequence[np.ndarray],
    *,
    phrase: str = "",
    boxes: Mapping[str, Sequence[Sequence[Box]]] | None = None,
    width_mm: float = style.DOUBLE_COLUMN_MM,
) -> Figure:
    """Each frame beside itself under its map, with boxes: Figure 6 of the EchoVLM paper (arXiv 2509.14977).

    One scale serves all frames, from 0 to the largest value of all, so that frames compare.

    Args:
        frames: images, as PIL's or as arrays (height, width) or (height, width, 3).
        maps: what `grad_cam` gave; of a video, give one frame of each temporal patch.
        phrase: the tokens' text, written under the panels.
        boxes: one or two labels, drawn red and dashed blue, each with a list of boxes for every frame.

    Raises:
        MoEAdapterError: the numbers of frames, maps and lists of boxes differ, or there are more than two labels.
    """
    boxes = boxes or {}
    if any(len(frames) != len(of_frames) for of_frames in (maps, *boxes.values())) or not len(frames):
        counts = [f"{len(of_frames)} lists of boxes {label!r}" for label, of_frames in boxes.items()]
        got = ", ".join([f"{len(frames)} frames", f"{len(maps)} maps", *counts])
        raise MoEAdapterError(f"got {got}; give as many of each, an empty list for a frame without boxes.")
    if len(boxes) > len(BOX_LOOKS):
        raise MoEAdapterError(f"got boxes of {len(boxes)} kinds, {', '.join(boxes)}; give two at most, red and blue.")
    peak = max(float(heat.max()) for heat in maps) or 1.0
    scale = dict(cmap=HEAT, vmin=0, vmax=1, alpha=0.5)
    with style.style([phrase, *boxes]):
        figure, axes = panel_grid(2 * len(frames), width_mm, sharey=False)
        for number, ax in enumerate(axes):
            index, overlaid = divmod(number, 2)
            _draw_frame(ax, frames[index], {label: of_frames[index] for label, of_frames in boxes.items()})
            if overlaid:
                ax.imshow(maps[index] / peak, extent=ax.images[0].get_extent(), interpolation="bilinear", **scale)
            ax.set_title(f"({letter(number)}) frame {index + 1}{', Grad-CAM' if overlaid else ''}")
        shade = ScalarMappable(cmap=HEAT)
        figure.colorbar(shade, ax=axes, label="Grad-CAM, of the largest", ticks=[0, 0.5, 1], shrink=0.8, aspect=30)
        handles = [
            Rectangle((0, 0), 1, 1, fill=False, label=label, **look)
            for label, look in zip(boxes, BOX_LOOKS, strict=False)
        ]
        if handles:
            figure.legend(handles=handles, loc="outside upper right", ncols=len(handles))
        if phrase:
            figure.supxlabel("\n".join(wrapped(f"for “{phrase}”", round(width_mm / LETTER_MM))), fontsize="medium")
    return figure


def _draw_frame(ax: Axes, frame: Any, boxes: Mapping[str, Sequence[Box]]) -> None:
    image = np.asarray(frame)
    height, width = image.shape[:2]
    ax.imshow(image, cmap="gray", extent=(0, width, height, 0))
    for kind, look in zip(boxes.values(), BOX_LOOKS, strict=False):
        for left, top, right, bottom in kind:
            ax.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, zorder=3, **look))
    ax.set_axis_off()


def _checked_prompt(inputs: Mapping[str, Any]) -> torch.Tensor:
    """The prompt's ids (1, P)."""
    if all(inputs.get(name) is None for name in ("image_grid_thw", "video_grid_thw")):
        raise MoEAdapterError(
            f"the inputs have no image: got {', '.join(inputs)}, expected image_grid_thw or video_grid_thw too, as "
            "Qwen2-VL's processor gives them for a prompt with images or videos."
        )
    ids = inputs["input_ids"]
    if len(ids) != 1:
        raise MoEAdapterError(f"got a batch of {len(ids)} cases; give one at a time.")
    return ids


def _checked_positions(positions: Sequence[int] | None, length: int) -> list[int]:
    chosen = list(range(length)) if positions is None else [int(position) for position in positions]
    if not chosen or not all(0 <= position < length for position in chosen):
        raise MoEAdapterError(f"got positions {chosen} of an answer of {length} tokens; give some from 0 on.")
    return chosen


def _with_answer(inputs: Mapping[str, Any], answer: torch.Tensor) -> dict[str, Any]:
    """The prompt's inputs with the answer (A,) after the prompt."""
    tail = {
        "input_ids": answer,
        "attention_mask": torch.ones_like(answer),
        "mm_token_type_ids": torch.zeros_like(answer),
    }
    grown = {
        name: torch.cat([inputs[name], more[None].to(inputs[name])], dim=1)
        for name, more in tail.items()
        if inputs.get(name) is not None
    }
    return {**inputs, **grown}


@contextmanager
def _outputs_as_leaves(module: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Cuts the graph at each output of `module`, so that gradients begin there whatever is frozen."""
    leaves: list[torch.Tensor] = []

    def cut(module: nn.Module, args: Any, output: Any) -> Any:
        first, *rest = output if isinstance(output, tuple) else (output,)
        if not isinstance(first, torch.Tensor):
            raise MoEAdapterError(f"{type(module).__name__} gives no tensor; name a module inside it.")
        leaves.append(first.detach().requires_grad_())
        return (leaves[-1], *rest) if isinstance(output, tuple) else leaves[-1]

    handle = module.register_forward_hook(cut)
    try:
        yield leaves
    finally:
        handle.remove()


def _vision_tower(model: nn.Module) -> tuple[str, nn.Module]:
    for name, module in model.named_modules():
        if hasattr(module, "blocks") and hasattr(module, "merger"):
            return name, module
    raise MoEAdapterError(
        f"{type(model).__name__} has no vision tower with blocks and a merger; give a model of Qwen2-VL's kind."
    )


def _layer_name(model: nn.Module, layer: str | int) -> str:
    """The name of the module that `layer` means."""
    modules, (tower_name, tower) = dict(model.named_modules()), _vision_tower(model)
    if isinstance(layer, int):
        return _block(model, model.get_decoder().layers, layer, "language model")  # pyright: ignore
    if vision := re.fullmatch(r"vision\.(-?\d+)", layer):
        name = _block(model, tower.blocks, int(vision[1]), "vision tower")  # pyright: ignore
    elif layer == "merger":
        name = f"{tower_name}.merger"
    else:
        names = [name for name in modules if name == layer or name.endswith("." + layer)]
        if len(names) != 1:
            found = f"{len(names)} modules, {', '.join(names[:3])}, …: name one" if names else "no module"
            raise MoEAdapterError(f"layer {layer!r} is {found}{'' if names else nearest(layer, modules)}.")
        name = names[0]
    if inside(name, tower_name) and hasattr(tower, "window_size"):  # Qwen2.5-VL
        raise MoEAdapterError(
            f"the vision tower of {type(model).__name__} sorts patches by window, so {name} has them in no grid's "
            "order; name a block of the language model, as layer=0."
        )
    return name


def _block(model: nn.Module, blocks: nn.ModuleList, index: int, part: str) -> str:
    if not -len(blocks) <= index < len(blocks):
        raise MoEAdapterError(f"the {part} has blocks 0 to {len(blocks) - 1}, not block {index}.")
    return next(name for name, module in model.named_modules() if module is blocks[index])


def _grids(inputs: Mapping[str, Any], kind: str) -> list[list[int]]:
    """(t, h, w) in patches of each image or video."""
    grid = inputs.get(f"{kind}_grid_thw")
    return [] if grid is None else grid.tolist()


def _visual_rows(model: nn.Module, full: Mapping[str, Any], name: str, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """What a layer gave for patches or visual tokens (N, D), images before videos; of no tensor, nothing (0, 0)."""
    if not tensors:
        return torch.empty(0, 0)
    rows_ND = torch.cat([tensor.detach().reshape(-1, tensor.shape[-1]).float() for tensor in tensors])
    ids = full["input_ids"][0]
    if inside(name, _vision_tower(model)[0]) or len(rows_ND) != len(ids):
        return rows_ND
    config: Any = model.config
    kinds = (config.image_token_id, config.video_token_id)
    return rows_ND[torch.cat([(ids == kind).nonzero()[:, 0] for kind in kinds]).to(rows_ND.device)]


def _maps(
    acts_ND: torch.Tensor, grads_ND: torch.Tensor, grids: list[list[int]], cell: int, merge: int
) -> list[np.ndarray]:
    """A map for each frame of the grids (t, h, w), whose rows are cells of `cell` × `cell` patches."""
    sizes = [(h // cell, w // cell) for t, h, w in grids for _ in range(t)]
    counts = [rows * columns for rows, columns in sizes]
    maps = []
    for size, act_ND, grad_ND in zip(sizes, acts_ND.split(counts), grads_ND.split(counts), strict=True):
        cam_N = (act_ND * grad_ND.mean(0)).sum(-1).relu()
        maps.append(_on_grid(cam_N, size, merge // cell).cpu().numpy())
    return maps


def _on_grid(cam_N: torch.Tensor, size: tuple[int, int], block: int) -> torch.Tensor:
    """(rows, columns) of what the processor orders by the blocks of `block` × `block` that the merger joins."""
    rows, columns = size
    return cam_N.reshape(rows // block, columns // block, block, block).transpose(1, 2).reshape(size)
