"""The paper's two training stages on a base model: stage I trains the MoE blocks, stage II LoRA and MoE together."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from examples.echovlm.account import Account
from examples.echovlm.collator import Collator
from examples.echovlm.config import RecipeConfig
from examples.echovlm.tasks import Example
from examples.echovlm.training import train
from moe_adapter import MoEAdapterError, dual_path_layers, inject_dual_path_moe, save_adapter, set_stage

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
) -> PreTrainedModel:
    """Parameter-isolated pre-training: inject, train the MoE blocks alone on image-report pairs, save to `out`."""
    inject_dual_path_moe(model, **config.moe)
    _tell(account, set_stage(model, 1), data, "only the MoE blocks train, every original parameter is frozen")
    train(model, data, collator, config.stage1, config, out, account)
    save_adapter(model, out)
    return model


def stage2(
    model: PreTrainedModel,
    data: Sequence[Example],
    collator: Collator,
    config: RecipeConfig,
    out: Path,
    account: Account,
) -> PeftModel:
    """Cooperative instruction fine-tuning of stage I's model: train MoE blocks in full and LoRA, save to `out`.

    The LoRA sits on the vision encoder, the vision-to-text projection and the language model's attention.
    """
    tuned = add_lora(model, config)
    places = ", ".join(f"{count} of the {part}" for part, count in lora_places(tuned).items())
    _tell(account, set_stage(tuned, 2), data, f"MoE blocks in full, LoRA on linear maps ({places})")
    train(tuned, data, collator, config.stage2, config, out, account)
    save_adapter(tuned, out)
    return tuned


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


def _tell(account: Account, counts: dict[str, int], data: Sequence[Example], what: str) -> None:
    trained, total = counts["trainable"] / 1e6, counts["total"] / 1e6
    account.say(f"{what}: {trained:.2f} M of {total:.2f} M parameters, on {len(data)} examples")
