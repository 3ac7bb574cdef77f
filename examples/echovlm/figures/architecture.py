"""Figure 4: one dual-path layer of a model with its real widths and weights, and what of the model trains."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.ticker import FuncFormatter, MaxNLocator

from examples.echovlm.figures import figure, save
from examples.echovlm.figures.runs import ACCOUNT, Run
from moe_adapter.analysis.style import BLUE, ORANGE
from moe_adapter.errors import MoEAdapterError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import nn

    from moe_adapter import DualPathMoE

WIDE, HIGH = 100.0, 46.0  # of the drawing, in its own units
FROZEN: dict[str, Any] = {"facecolor": "0.9", "edgecolor": "0.4", "linewidth": 0.5}
TRAINED: dict[str, Any] = {"facecolor": "#8CC4EA", "edgecolor": "#003A5C", "linewidth": 1.2}
ROUTERS = "routers, α and λ"
ORDER = (
    "vision encoder",
    "projection",
    "language model",
    "static experts",
    "shared experts",
    "routed experts",
    ROUTERS,
    "LoRA",
)


def add(subparsers: Any) -> None:
    examples = [
        "architecture runs/tiny -o figure4.pdf",
        "architecture Qwen2-VL-7B-Instruct --preset paper -o figure4.pdf   # config.json is enough",
    ]
    parser = figure(subparsers, "architecture", run, help="Figure 4: the dual-path layer of a model", examples=examples)
    parser.add_argument("model", type=Path, metavar="MODEL", help="a run's folder, or a checkpoint's with --preset")
    parser.add_argument("--preset", help="of a checkpoint: what is injected, and what stage II trains")
    parser.add_argument("--layer", type=int, default=0, metavar="N", help="which dual-path layer, from 0 (default: 0)")


def run(options: argparse.Namespace) -> list[Path]:
    if options.preset:
        model = planned(options.model, options.preset)
    elif (options.model / ACCOUNT).is_file():
        model = Run(options.model).load()[0]
    else:
        raise MoEAdapterError(f"{options.model}: got no run's folder; of a checkpoint, name a --preset such as paper")
    return save(architecture(model, layer=options.layer), options.output)


def planned(checkpoint: Path, preset: str) -> nn.Module:
    """The model of a checkpoint's config as stage II would train it, on the meta device: sizes without weights."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from examples.echovlm.config import load_preset
    from examples.echovlm.methods import METHODS, choose_trained, inject
    from examples.echovlm.stages import add_lora

    config = load_preset(preset)
    try:
        described = AutoConfig.from_pretrained(checkpoint, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(described)
    except (OSError, ValueError) as error:
        raise MoEAdapterError(
            f"{checkpoint}: got no vision-language model's config.json ({str(error).splitlines()[0]})"
        ) from None
    inject(model, config)
    if METHODS[config.method].lora:
        model = add_lora(model, config)
    choose_trained(model, METHODS[config.method].stages[-1], config)
    return model


def architecture(model: nn.Module, *, layer: int = 0) -> Figure:
    """The layer as equation (3) has it, the model's parameters by part, frozen and trained, and α and λ by layer.

    α and λ are the config's start values where the model is on the meta device.
    Raises: MoEAdapterError if the model has no dual-path layer of that number.
    """
    from matplotlib.figure import Figure

    from moe_adapter import dual_path_layers
    from moe_adapter.analysis import style

    layers = list(dual_path_layers(model).items())
    if not 0 <= layer < len(layers):
        raise MoEAdapterError(f"--layer {layer}: the model has {len(layers)} dual-path layers; give one from 0 on")
    name, shown = layers[layer]
    with style.style([name]):
        drawn = Figure(figsize=(style.DOUBLE_COLUMN_MM * style.MM, 128 * style.MM), layout="constrained")
        above, below = drawn.subfigures(2, 1, height_ratios=(HIGH, 24))
        ax = above.subplots()
        _draw_layer(ax, shown)
        ax.set_title(f"(a) {name.removeprefix('base_model.model.')}, one of {len(layers)} dual-path layers")
        parts, weights = below.subplots(1, 2, width_ratios=(3, 2))
        _draw_parts(parts, parameters_by_part(model))
        _draw_weights(weights, [each for _, each in layers])
        drawn.legend(handles=_legend(), loc="outside upper right", ncols=2)
    return drawn


def parameters_by_part(model: nn.Module) -> dict[str, tuple[int, int]]:
    """part → its frozen and its trained parameters, by `requires_grad`; every parameter once."""
    from moe_adapter import dual_path_layers
    from moe_adapter.lora import lora_parameters

    new = {id(p): path for each in dual_path_layers(model).values() for path, p in each.new_parameters().items()}
    lora = {id(parameter) for parameter in lora_parameters(model).values()}
    counts: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        part = _part(name, new.get(id(parameter)), id(parameter) in lora)
        counts.setdefault(part, [0, 0])[parameter.requires_grad] += parameter.numel()
    return {part: (counts[part][0], counts[part][1]) for part in sorted(counts, key=ORDER.index)}


def _part(name: str, new: str | None, lora: bool) -> str:
    from examples.echovlm.stages import PARTS

    if lora:
        return "LoRA"
    if new is not None:
        kinds = {"experts.": "routed experts", "shared_expert.": "shared experts"}
        return next((part for start, part in kinds.items() if new.startswith(start)), ROUTERS)
    if ".static_expert." in name:
        return "static experts"
    return next(part for part, words in PARTS.items() if re.search(words, name))


def _draw_layer(ax: Axes, layer: DualPathMoE) -> None:
    """X on the left, the paths of equation (3) from top to bottom, Y on the right."""
    hidden, width, config = layer.ffn.hidden, layer.ffn.intermediate, layer.config
    ax.set(xlim=(0, WIDE), ylim=(0, HIGH))
    ax.set_axis_off()
    _box(ax, (0, 19, 8, 8), f"X\nT × {hidden}")
    _box(ax, (92, 19, 8, 8), f"Y\nT × {hidden}")
    static = f"static expert: the model's own FFN\n{hidden} → {width} → {hidden}"
    _box(ax, (20, 35, 42, 10), static, layer.static_expert)
    _arrow(ax, (8, 25), (20, 40))
    _arrow(ax, (62, 40), (87.2, 24.4), _static_weight(layer))
    _node(ax, (88, 23))
    _arrow(ax, (89.2, 23), (92, 23))
    _node(ax, (74, 15))
    _arrow(ax, (75.2, 15.4), (86.8, 22.2), "1 − α" if layer.alpha_logit is not None else "$c_0$(x)", below=True)
    if layer.shared_expert is not None:
        narrow = layer.shared_expert.down_proj.weight.shape[1]  # pyright: ignore
        _box(
            ax,
            (20, 20, 42, 10),
            f"shared expert: sees every token\n{hidden} → {narrow} → {hidden}",
            layer.shared_expert,
        )
        _arrow(ax, (8, 23), (20, 25))
        _arrow(ax, (62, 25), (73.2, 16.2), _shared_weight(layer))
    if layer.router is not None:
        experts, _, narrow = layer.experts.down_proj.shape  # pyright: ignore
        _box(ax, (20, 3, 17, 11), f"router, float32\n{hidden} → {experts}, top-{config.top_k}", layer.router)
        for back in (1.6, 0.8):
            _box(ax, (40 + back, 3 + back, 22 - 1.6, 11), "", layer.experts, counted=False)
        each = f"{experts} routed experts\n{hidden} → {narrow} → {hidden} each"
        _box(ax, (40, 3, 22 - 1.6, 11), each, layer.experts)
        _arrow(ax, (8, 21), (20, 8.5))
        _arrow(ax, (37, 8.5), (40, 8.5))
        softmax = f"$\\Sigma\\, g_i E_i$, softmax over {'the ' if config.router_softmax == 'selected' else ''}"
        _arrow(ax, (62, 8.5), (73.2, 14), softmax + config.router_softmax, below=True)


def _static_weight(layer: DualPathMoE) -> str:
    if layer.alpha_logit is None:
        return "$c_1$(x), a weight of each token's own"
    scale = "" if layer.static_scale == 1 else f", times the constant {layer.static_scale:g}"
    return f"α = {_scalar(layer, 'alpha'):.3f}{scale}"


def _shared_weight(layer: DualPathMoE) -> str:
    return "sigmoid(gate(x))" if layer.lam_logit is None else f"λ = {_scalar(layer, 'lam'):.3f}"


def _scalar(layer: DualPathMoE, name: str) -> float:
    value = getattr(layer, name)
    return getattr(layer.config, f"{name}_init") if value.is_meta else value.item()


def _box(
    ax: Axes,
    place: tuple[float, float, float, float],
    text: str,
    part: nn.Module | None = None,
    *,
    counted: bool = True,
) -> None:
    """A box (left, bottom, width, height); of a part of the layer, with its parameters and whether they train."""
    from matplotlib.patches import FancyBboxPatch

    left, bottom, width, height = place
    look: dict[str, Any] = {"facecolor": "w", "edgecolor": "0.2"}
    if part is not None:
        parameters = list(part.parameters())
        trained = any(parameter.requires_grad for parameter in parameters)
        look = TRAINED if trained else FROZEN
        if counted:
            number = sum(parameter.numel() for parameter in parameters)
            text += f"\n{_short(number)} parameters\n{'trained' if trained else 'frozen'}"
    ax.add_patch(FancyBboxPatch((left, bottom), width, height, boxstyle="round,pad=0,rounding_size=1", **look))
    ax.text(left + width / 2, bottom + height / 2, text, ha="center", va="center", linespacing=1.3)


def _arrow(
    ax: Axes, start: tuple[float, float], end: tuple[float, float], text: str = "", *, below: bool = False
) -> None:
    ax.annotate(
        "", end, start, arrowprops={"arrowstyle": "-|>", "linewidth": 0.7, "color": "0.2", "shrinkA": 0, "shrinkB": 0}
    )
    middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2)
    ax.annotate(text, middle, (3, -3 if below else 3), textcoords="offset points", va="top" if below else "bottom")


def _node(ax: Axes, centre: tuple[float, float]) -> None:
    ax.plot(*centre, "o", markersize=9, markerfacecolor="w", markeredgecolor="0.2", markeredgewidth=0.7)
    ax.text(*centre, "+", ha="center", va="center_baseline")


def _draw_parts(ax: Axes, parts: Mapping[str, tuple[int, int]]) -> None:
    """Bars of parameters by part, frozen and trained, and their sum."""
    totals = [frozen + trained for frozen, trained in parts.values()]
    for row, (frozen, trained) in enumerate(parts.values()):
        for left, count, look in ((0, frozen, FROZEN), (frozen, trained, TRAINED)):
            if count:
                ax.barh(row, count, 0.7, left=left, **look)
        ax.annotate(_short(frozen + trained), (frozen + trained, row), (3, 0), textcoords="offset points", va="center")
    ax.set_yticks(range(len(parts)), list(parts))
    ax.invert_yaxis()
    ax.set(xlim=(0, 1.2 * max(totals)), xlabel="parameters")
    ax.xaxis.set_major_formatter(FuncFormatter(lambda number, _: _short(number)))
    trained = sum(trained for _, trained in parts.values())
    ax.set_title(f"(b) {_short(trained)} of {_short(sum(totals))} parameters train")


def _draw_weights(ax: Axes, layers: Sequence[DualPathMoE]) -> None:
    looks = {
        "lam": {"markersize": 5.5, "markerfacecolor": "w", "linewidth": 2},
        "alpha": {"markersize": 3, "linewidth": 0.6},
    }
    for symbol, name, marker, colour in (("λ", "lam", "s", ORANGE), ("α", "alpha", "o", BLUE)):
        rows = [
            (row, _scalar(each, name)) for row, each in enumerate(layers) if getattr(each, f"{name}_logit") is not None
        ]
        if rows:
            ax.plot(*zip(*rows, strict=True), color=colour, marker=marker, label=symbol, **looks[name])
    start = ", at the start" if next(layers[0].parameters()).is_meta else ""
    ax.set(xlabel="layer", ylim=(0, 1), title=f"(c) weights by layer{start}")
    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    if ax.lines:
        ax.legend(ncols=2)
    else:
        ax.text(0.5, 0.5, "each token has its own", ha="center", transform=ax.transAxes)


def _legend() -> list[Any]:
    from matplotlib.patches import Patch

    return [Patch(label="frozen", **FROZEN), Patch(label="trained", **TRAINED)]


def _short(number: float) -> str:
    """1234567 as 1.23 M."""
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:g}"
