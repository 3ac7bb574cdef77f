"""The paper's two training stages on a base model: stage I trains the MoE blocks, stage II LoRA and MoE together.

What of that a method leaves out, `methods.py` says.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from examples.echovlm.account import Account
from examples.echovlm.collator import Collator
from examples.echovlm.config import RecipeConfig
from examples.echovlm.methods import METHODS, choose_trained, inject, load_trained
from examples.echovlm.tasks import Example
from examples.echovlm.training import keep_masters, train
from moe_adapter import MoEAdapterError, dual_path_layers

# What transformers' vision-language models call their parts; the first that a module's name holds.
PARTS = {
    "projection": r"merger|projector|projection|connector|resampler",
    "vision encoder": r"visual|vision|image",
    "language model": "",
}


def stage1(
    model: PreTrainedModel,
    data: Sequence[Example],
    collator: Collator,
    config: RecipeConfig,
    out: Path,
    account: Account,
    fresh: Callable[[], PreTrainedModel],
) -> PreTrainedModel:
    """Parameter-isolated pre-training: inject, train the MoE blocks alone on image-report pairs, save to `out`.

    `fresh` loads the base once more, for an engine that leaves nothing of it.
    """
    inject(model, config)
    counts = choose_trained(model, 1, config)
    _tell(account, counts, data, config, "only the MoE blocks train, every original parameter is frozen")
    kept = train(model, data, collator, config.stage1, config, out, account)
    return model if kept else _anew(1, fresh, config, out)


def stage2(
    model: PreTrainedModel,
    data: Sequence[Example],
    collator: Collator,
    config: RecipeConfig,
    out: Path,
    account: Account,
    fresh: Callable[[], PreTrainedModel],
) -> nn.Module:
    """Cooperative instruction fine-tuning of stage I's model: train MoE blocks in full and LoRA, save to `out`.

    The LoRA sits on the vision encoder, the vision-to-text projection and the language model's attention. A method
    without MoE blocks trains the LoRA alone, one without a LoRA either trains all of the base.
    """
    way = METHODS[config.method]
    tuned = add_lora(model, config) if way.lora else model
    parts = ["MoE blocks in full"] * way.dual_path
    if way.lora:
        places = ", ".join(f"{count} of the {part}" for part, count in lora_places(tuned).items())
        parts.append(f"LoRA on linear maps ({places})")
    _tell(account, choose_trained(tuned, 2, config), data, config, ", ".join(parts) or "all of the base")
    kept = train(tuned, data, collator, config.stage2, config, out, account)
    return tuned if kept else _anew(2, fresh, config, out)


def finished_stage(stage: int, model: PreTrainedModel, config: RecipeConfig, folder: Path) -> nn.Module:
    """The model as a stage left it in `folder`, its masters in float32 again, on the base or the model of stage I.

    Raises: MoEAdapterError if there is no such adapter, or it is another base's.
    """
    inject(model, config)
    if stage == 2 and METHODS[config.method].lora:
        model = add_lora(model, config)
    choose_trained(model, stage, config)
    keep_masters(model)
    load_trained(model, folder)
    choose_trained(model, stage, config)  # an adapter with a LoRA comes with all of stage II learning
    return model


def _anew(stage: int, fresh: Callable[[], PreTrainedModel], config: RecipeConfig, folder: Path) -> nn.Module:
    """`finished_stage` on a fresh base, which draws no random numbers from those that the next stage starts with."""
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        return finished_stage(stage, fresh(), config, folder)


def add_lora(model: PreTrainedModel, config: RecipeConfig) -> PeftModel:
    """peft's LoRA on the modules that the preset's one regular expression names in full.

    Raises: MoEAdapterError if it names none.
    """
    lora = config.lora
    settings = LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=lora.target)
    try:
        return get_peft_model(model, settings)
    except ValueError as error:
        raise MoEAdapterError(f"lora.target of the preset fits no module of this model: {error}") from None


def lora_places(model: PeftModel) -> dict[str, int]:
    """How many modules of each part of the model the LoRA sits on, as their names tell; 0 where it left one out."""
    names = model.base_model.targeted_module_names
    parts = Counter(next(part for part, words in PARTS.items() if re.search(words, name)) for name in names)
    return {part: parts[part] for part in PARTS}


def path_weights(model: nn.Module) -> list[dict[str, float]]:
    """α and λ of each dual-path layer, in order (equation 3); only those that the layer has."""
    return [
        {name: logit.sigmoid().item() for name, logit in logits.items() if logit is not None}
        for layer in dual_path_layers(model).values()
        for logits in [{"alpha": layer.alpha_logit, "lambda": layer.lam_logit}]
    ]


def _tell(account: Account, counts: dict[str, int], data: Sequence[Example], config: RecipeConfig, what: str) -> None:
    trained, total = counts["trainable"] / 1e6, counts["total"] / 1e6
    kept = f"; {', '.join(config.frozen)} frozen" if METHODS[config.method].dual_path and config.frozen else ""
    account.say(f"{what}{kept}: {trained:.2f} M of {total:.2f} M parameters, on {len(data)} examples")
