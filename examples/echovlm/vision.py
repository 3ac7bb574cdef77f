"""General pre-training of the vision tower: every visual token tells what its cell of a general picture shows.

A real base's tower has met millions of pictures before the first report. A tower born random would leave stages I and
II, which train it through a LoRA at most, with nothing to read.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm
from transformers import ProcessorMixin

from examples.echovlm import ranks
from examples.echovlm.config import TrainingConfig
from examples.echovlm.pictures import LABEL_CLASSES, labelled_picture
from examples.echovlm.training import use_bf16


def pretrain_vision(
    tower: nn.Module,
    processor: ProcessorMixin,
    side: int,
    pictures: int,
    run: TrainingConfig,
    seed: int,
    precision: str,
) -> dict[str, float]:
    """Train the tower (a Qwen2-VL `visual`) with a linear head for each label; returns the last batch's accuracies.

    Learning-rate warm-up and cosine as in the other runs; the heads are thrown away.
    """
    heads = nn.Linear(tower.config.hidden_size, sum(LABEL_CLASSES.values())).to(tower.device)
    parameters = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, run.learning_rate, weight_decay=run.weight_decay)
    steps = pictures // run.batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, run.learning_rate, total_steps=steps, pct_start=0.1)
    logits, labels = None, torch.empty(0)
    for step in tqdm(range(steps), desc="vision tower", leave=False, disable=not ranks.is_main()):
        indices = range(step * run.batch_size, (step + 1) * run.batch_size)
        images, cells = zip(*(labelled_picture(index, side, seed) for index in indices), strict=True)
        inputs = processor.image_processor(images=list(images), return_tensors="pt").to(tower.device)
        labels = torch.cat([torch.from_numpy(grid) for grid in cells]).to(tower.device)
        with torch.autocast(tower.device.type, torch.bfloat16, enabled=use_bf16(precision)):
            tokens = tower(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output
            logits = heads(tokens).float().split(list(LABEL_CLASSES.values()), dim=-1)
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
