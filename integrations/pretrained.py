"""Models as transformers keeps them: a checkpoint with its adapter and processor, and prompts in its chat template."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jinja2 import TemplateError
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, BatchFeature

import moe_adapter.integrations.transformers  # noqa: F401  (the auto classes then load what export_model wrote)
from moe_adapter.adapters import from_pretrained
from moe_adapter.errors import MoEAdapterError

GREEDY: dict[str, Any] = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
DTYPES = ("auto", "float32", "bfloat16", "float16")

Conversation = Sequence[Mapping[str, Any]]  # messages, each content a list of parts


def auto_class(config: Any) -> Any:
    """The auto class of a config's model: a vision-language model's, else a causal LM's."""
    vision = type(config) in AutoModelForImageTextToText._model_mapping
    return AutoModelForImageTextToText if vision else AutoModelForCausalLM


def load_model(source: str, *, adapter: str | None = None, dtype: str = "auto", device: str | None = None) -> Any:
    """A checkpoint's model in evaluation mode, with an adapter where one is named.

    Args:
        source: a checkpoint's directory, what `export_model` wrote included, or a name on the hub.
        adapter: a directory of `save_adapter`, or a repository on the hub.
        dtype: one of DTYPES; "auto" is the checkpoint's own.
        device: "cpu", "cuda:1", or "auto" to spread over what there is; None is the GPU where there is one, under
            torchrun that of the process.

    Raises:
        MoEAdapterError: there is no such checkpoint or adapter, or they don't fit.
    """
    device = device or (f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")
    placed = {} if device == "cpu" else {"device_map": device}
    try:
        config = AutoConfig.from_pretrained(source)
        model = auto_class(config).from_pretrained(source, dtype=dtype, **placed)
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise _not_loaded(source, error, "a checkpoint's directory, as save_pretrained writes it") from error
    if adapter is not None:
        model = from_pretrained(model, adapter)
    return model.eval()


def load_processor(source: str) -> Any:
    """A checkpoint's processor, or its tokenizer where the model reads text alone; pads on the left.

    Raises:
        MoEAdapterError: there is none.
    """
    try:
        processor = AutoProcessor.from_pretrained(source)
        if tokenizer_of(processor) is None:
            raise ValueError("it holds no tokenizer.")
    except (OSError, ValueError, ImportError) as error:
        raise _not_loaded(source, error, "the processor or tokenizer beside the model's weights") from error
    tokenizer = tokenizer_of(processor)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return processor


def tokenizer_of(processor: Any) -> Any:
    """A processor's tokenizer; a tokenizer is its own."""
    return processor if hasattr(processor, "convert_ids_to_tokens") else getattr(processor, "tokenizer", None)


def reads_images(processor: Any) -> bool:
    return getattr(processor, "image_processor", None) is not None


def encode(model: Any, processor: Any, conversations: Sequence[Conversation], *, answered: bool) -> BatchFeature:
    """What the model is called with for a batch of conversations, by its own chat template, where the model is.

    Args:
        conversations: with contents in parts, {"type": "text", "text": …} or {"type": "image", "image": PIL's}.
        answered: whether they end in an answer; else the template opens one.

    A tokenizer without a chat template takes a conversation's text as it is.

    Raises:
        MoEAdapterError: the processor has no chat template, takes no images, or its template refuses a conversation.
    """
    if reads_images(processor):
        inputs = _templated(processor, conversations, answered, processor_kwargs={"padding": True})
        return inputs.to(model.device, model.dtype)  # of what is floating point, the pixels
    conversations = list(map(_text_alone, conversations))
    if processor.chat_template:
        return _templated(processor, conversations, answered, padding=True).to(model.device)
    texts = ["".join(message["content"] for message in each) for each in conversations]
    return processor(texts, padding=True, return_tensors="pt").to(model.device)


def _templated(processor: Any, conversations: Sequence[Conversation], answered: bool, **padding: Any) -> Any:
    if not processor.chat_template:
        raise MoEAdapterError(
            f"{type(processor).__name__} has no chat template to put images into: put the instruction-tuned model's "
            "chat_template.jinja into the checkpoint's directory."
        )
    options = dict(tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=not answered)
    try:
        return processor.apply_chat_template(list(map(list, conversations)), **options, **padding)
    except TemplateError as error:
        raise MoEAdapterError(f"the model's chat template refuses a conversation: {error}") from error


def answer_ids(model: Any, inputs: Mapping[str, Any], max_new_tokens: int) -> torch.Tensor:
    """Greedy answers (B, A) to prompts padded on the left, without the prompts."""
    stop = model.generation_config.pad_token_id
    pad = {} if stop is not None else {"pad_token_id": _first(model.generation_config.eos_token_id)}
    out = model.generate(**inputs, max_new_tokens=max_new_tokens, **GREEDY, **pad)
    return out[:, inputs["input_ids"].shape[1] :]


def answer_to(
    model: Any, tokenizer: Any, inputs: Mapping[str, Any], given: str | None, max_new_tokens: int
) -> list[int]:
    """The ids of the answer that is given, or of the model's own to one prompt, without what ends it.

    Raises:
        MoEAdapterError: nothing is left.
    """
    if given is not None:
        ids = tokenizer(given, add_special_tokens=False)["input_ids"]
    else:
        with torch.inference_mode():
            ids = answer_ids(model, inputs, max_new_tokens)[0].tolist()
    special = set(tokenizer.all_special_ids)
    while ids and ids[-1] in special:
        ids = ids[:-1]
    if not ids:
        raise MoEAdapterError("the model's answer is empty; give one with --answer")
    return ids


def read(model: Any, inputs: Mapping[str, Any]) -> None:
    """One forward for what happens inside the model: no cache, and where it can be, logits of the last token alone."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # peft's forward names no argument
    keep = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(base.forward).parameters else {}
    model(**inputs, use_cache=False, **keep)


def image_grids(processor: Any, images: Sequence[Any]) -> list[tuple[int, int]]:
    """(rows, columns) of image tokens of each image, as the model of this processor sees it.

    Raises:
        MoEAdapterError: the processor gives no grids, as Qwen2-VL's does.
    """
    found = processor.image_processor(list(images), return_tensors="pt") if reads_images(processor) else {}
    merge = getattr(getattr(processor, "image_processor", None), "merge_size", None)
    if "image_grid_thw" not in found or merge is None:
        raise MoEAdapterError(
            f"{type(processor).__name__} tells no grid of an image's tokens, so that experts can't be laid over "
            "images; expected a model of Qwen2-VL's kind."
        )
    return [(height // merge, width // merge) for _, height, width in found["image_grid_thw"].tolist()]


def progress(items: Iterable[Any], *, label: str, total: int, shown: bool) -> Iterable[Any]:
    """A bar on stderr while `items` are gone through, where that is a terminal."""
    return tqdm(items, desc=label, total=total, disable=None if shown else True)


def _text_alone(conversation: Conversation) -> list[dict[str, Any]]:
    """Contents as strings, as a language model's template wants them."""
    if any(part["type"] != "text" for message in conversation for part in message["content"]):
        raise MoEAdapterError("the model reads text alone, and a case has images: leave them out.")
    return [{**each, "content": "".join(part["text"] for part in each["content"])} for each in conversation]


def _not_loaded(source: str, error: Exception, expected: str) -> MoEAdapterError:
    reason = str(error).strip().partition("\n")[0]
    return MoEAdapterError(
        f"{source}: {reason} Expected {expected}, or a name on the hub, which takes a network or a model that was "
        "fetched before."
    )


def _first(ids: int | Sequence[int] | None) -> int | None:
    return ids[0] if isinstance(ids, Sequence) else ids
