"""General pre-training of the vision tower: every visual token tells what its cell of a general picture shows.

A real base's tower has met millions of pictures before the first report. A tower born random would leave stages I and
II, which train it through a LoRA at most, with nothing to read.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from examples.echovlm import ranks
from examples.echovlm.config import RecipeConfig
from examples.echovlm.pictures import CELL, LABEL_CLASSES, labelled_picture
from examples.echovlm.training import use_bf16


def pretrain_vision(model: PreTrainedModel, processor: ProcessorMixin, config: RecipeConfig) -> dict[str, float]:
    """Train all but the language model with a linear head for each label; returns the last batch's accuracies.

    Learning-rate warm-up and cosine as in the other runs; the heads are thrown away.
    """
    base, side = config.base, config.image_side
    run = base.tower_pretraining
    heads = nn.Linear(model.config.get_text_config().hidden_size, sum(LABEL_CLASSES.values())).to(model.device)
    tower = [p for name, p in model.model.named_parameters() if not name.startswith("language_model.")]
    parameters = [*tower, *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, run.learning_rate, weight_decay=run.weight_decay)
    steps = base.tower_pictures // run.batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, run.learning_rate, total_steps=steps, pct_start=0.1)
    logits, labels = None, torch.empty(0)
    for step in tqdm(range(steps), desc="vision tower", leave=False, disable=not ranks.is_main()):
        indices = range(step * run.batch_size, (step + 1) * run.batch_size)
        images, cells = zip(*(labelled_picture(index, side, config.seed) for index in indices), strict=True)
        inputs = processor.image_processor(images=[list(images)], return_tensors="pt").to(model.device)
        labels = torch.cat([torch.from_numpy(grid) for grid in cells]).to(model.device)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=use_bf16(config.precision)):
            logits = heads(_tokens(model, inputs, side)).float().split(list(LABEL_CLASSES.values()), dim=-1)
        loss = sum(F.cross_entropy(part, labels[:, i]) for i, part in enumerate(logits))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    return {
        name: float((part.argmax(-1) == labels[:, i]).float().mean())
        for i, (name, part) in enumerate(zip(LABEL_CLASSES, logits or (), strict=True))
    }


def _tokens(model: PreTrainedModel, inputs: dict[str, Tensor], side: int) -> Tensor:
    """The visual tokens of one turn's pictures, a cell each (cells × D), without what a family puts between them."""
    pictures = model.get_image_features(**inputs).pooler_output
    return torch.cat([tokens[: (side // CELL) ** 2] for tokens in pictures])
