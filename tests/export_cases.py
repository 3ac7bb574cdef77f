"""The models that the export is tested on: every family of the zoo, split FFNs, an encoder-decoder, dtypes, methods."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers as tf
import zoo
from reference import perturb
from torch import nn

from moe_adapter import inject_dual_path_moe

SIZES = dict(num_experts=4, top_k=2, expert_dim=16, shared_expert_dim=24)
IDS = torch.randint(3, 100, (2, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, :3] = 0  # left padding
PIXELS = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(1))
IMAGE_IDS = torch.tensor([[5, 122, *[120] * 4, 123, 7, 8]])
IMAGE = dict(
    input_ids=IMAGE_IDS,
    attention_mask=torch.ones_like(IMAGE_IDS),
    pixel_values=torch.randn(16, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(2)),
    image_grid_thw=torch.tensor([[1, 4, 4]]),
    mm_token_type_ids=(IMAGE_IDS == 120).long(),
)
TEXT = dict(input_ids=IDS, attention_mask=MASK)


def noisy(model: tf.PreTrainedModel) -> tf.PreTrainedModel:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.2)
    return model.eval()


def cast(model: tf.PreTrainedModel, dtype: torch.dtype) -> tf.PreTrainedModel:
    """Parameters alone, as loading in `dtype` does; `.to(dtype)` rounds rotary frequencies too, which no file holds."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def opt() -> tf.PreTrainedModel:
    """Two linear maps beside the attention, and no module around them."""
    ids = dict(vocab_size=zoo.VOCAB, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    sizes = dict(hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4)
    return noisy(tf.OPTForCausalLM(tf.OPTConfig(max_position_embeddings=256, **sizes, **ids)))


def exaone() -> tf.PreTrainedModel:
    """A family whose files name their weights otherwise than its modules do."""
    config = tf.AutoConfig.for_model("exaone", **zoo.TEXT)
    return noisy(tf.AutoModelForCausalLM.from_config(config))


def lfm2() -> tf.PreTrainedModel:
    """An FFN that calls its activation without holding it."""
    config = tf.Lfm2Config(**zoo.TEXT, layer_types=["full_attention", "conv"], block_auto_adjust_ff_dim=False)
    return noisy(tf.Lfm2ForCausalLM(config))


def falcon_h1() -> tf.PreTrainedModel:
    """Holds buffers that no file has and its initialisation fills."""
    sizes = dict(mamba_d_ssm=64, mamba_n_heads=2, mamba_d_head=32, mamba_d_state=16, head_dim=8)
    return noisy(tf.FalconH1ForCausalLM(tf.FalconH1Config(**zoo.TEXT, **sizes)))


def zamba() -> tf.PreTrainedModel:
    """Ties whole blocks to one another, weight by weight."""
    sizes = dict(attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8, mamba_dt_rank=4, n_mamba_heads=2)
    sizes |= dict(num_hidden_layers=6, attention_hidden_size=64, attention_head_dim=16, use_mamba_kernels=False)
    return noisy(tf.ZambaForCausalLM(tf.ZambaConfig(**{**zoo.TEXT, **sizes, "num_key_value_heads": 4})))


def llama4() -> tf.PreTrainedModel:
    """Already a mixture of experts; names its headless model otherwise than its class says."""
    sizes = dict(intermediate_size_mlp=48, num_local_experts=2, head_dim=8, attention_chunk_size=64)
    return noisy(tf.Llama4ForCausalLM(tf.Llama4TextConfig(**zoo.TEXT, **sizes)))


def bart() -> tf.PreTrainedModel:
    ids = dict(vocab_size=zoo.VOCAB, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2)
    sizes = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in BART_SIZES.items()}
    return noisy(tf.BartForConditionalGeneration(tf.BartConfig(d_model=32, **sizes, **ids, forced_eos_token_id=None)))


VIT_FFN = r"layers?\.\d+"
BART_SIZES = dict(layers=2, attention_heads=4, ffn_dim=48)


def vit() -> tf.PreTrainedModel:
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    return noisy(tf.ViTForImageClassification(tf.ViTConfig(image_size=28, patch_size=14, **sizes)))


class Case:
    """A model to export, the auto class that is to load it, and what it is run on."""

    def __init__(self, build: Callable[[], nn.Module], auto: str, inputs: dict = TEXT, target="mlp", **config):
        self.build, self.auto, self.inputs, self.target = build, auto, inputs, target
        self.config = {**SIZES, **config}

    def injected(self) -> nn.Module:
        return perturb(inject_dual_path_moe(self.build(), self.target, **self.config))

    def answers(self, model: nn.Module) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            found = {"logits": model(**self.inputs, **self.decoder()).logits}
        if model.can_generate():
            found["generated"] = model.generate(**self.inputs, max_new_tokens=6, do_sample=False)
        return found

    def decoder(self) -> dict[str, torch.Tensor]:
        return dict(decoder_input_ids=IDS) if self.auto == "AutoModelForSeq2SeqLM" else {}


def of_zoo(name: str, **config) -> Case:
    vision = "vision_config" in zoo.ZOO[name]().config.to_dict()
    auto = "AutoModelForImageTextToText" if vision else "AutoModelForCausalLM"
    return Case(lambda: zoo.build(name), auto, **config)


CASES: dict[str, Case] = {name: of_zoo(name) for name in zoo.ZOO} | {
    "opt": Case(opt, "AutoModelForCausalLM"),
    "exaone": Case(exaone, "AutoModelForCausalLM"),
    "lfm2": Case(lfm2, "AutoModelForCausalLM"),
    "falcon_h1": Case(falcon_h1, "AutoModelForCausalLM"),
    "zamba": Case(zamba, "AutoModelForCausalLM"),
    "llama4": Case(llama4, "AutoModelForCausalLM", target=r"feed_forward\.shared_expert"),
    "bart": Case(bart, "AutoModelForSeq2SeqLM", target=r"layers\.\d+"),
    "vit": Case(
        vit, "AutoModelForImageClassification", dict(pixel_values=PIXELS), target=r"layers?\.\d+\.mlp|layer\.\d+"
    ),
    "qwen2_vl with an image": Case(lambda: zoo.build("qwen2_vl"), "AutoModelForImageTextToText", IMAGE),
    "qwen2_vl in bfloat16": Case(lambda: cast(zoo.build("qwen2_vl"), torch.bfloat16), "AutoModelForImageTextToText"),
    "llama in float16": Case(lambda: cast(zoo.build("llama"), torch.float16), "AutoModelForCausalLM"),
    "released layer": of_zoo("qwen2_vl", mixing="token", router_softmax="all", preserve_base=False),
    "odd sizes": of_zoo("qwen2", num_experts=3, expert_dim=7, shared_expert_dim=5),
    "one block": of_zoo("qwen2", layers=(1,)),
}
