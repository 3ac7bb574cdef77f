"""The recipe's one configuration: a preset file, validated before anything runs (paper, Table 8)."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib.util
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
    ValidationError,
)
from pydantic.dataclasses import dataclass

from examples.echovlm.pictures import CELL, LABEL_CLASSES
from moe_adapter import DualPathConfig, MoEAdapterError

PRESETS = Path(__file__).parent / "presets"
ACCOUNT = "account.json"  # in a run's folder: what of it is done
_FORBID_UNKNOWN = ConfigDict(extra="forbid")
Share = Annotated[float, Field(ge=0, lt=1)]


class PresetError(MoEAdapterError):
    """A preset that cannot be found, read or validated."""


Task = Literal["report", "diagnosis", "vqa"]
Method = Literal["dual-path", "dense", "plain", "full", "zero-shot"]
Family = Literal["qwen2_vl", "llava_onevision"]
Scheduler = Literal["cosine", "linear", "constant", "constant_with_warmup", "inverse_sqrt", "polynomial"]


def _pattern(text: str) -> str:
    """A regular expression that may be broken into lines, in one piece."""
    pattern = "".join(text.split())
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"got {pattern!r}, expected a regular expression of module names: {error}") from None
    return pattern


def _installed(reporter: str) -> str:
    if importlib.util.find_spec(reporter) is None:
        raise ValueError(f"got {reporter!r}, which is not installed; pip install {reporter}, or leave it out")
    return reporter


def _folder(path: str) -> str:
    if not Path(path).is_dir():
        raise ValueError(f"got {path!r}, expected a folder with an encoder")
    return path


Reporter = Annotated[Literal["tensorboard", "wandb", "mlflow", "swanlab", "trackio"], AfterValidator(_installed)]


def _dual_path(values: dict[str, Any]) -> dict[str, Any]:
    """The values as they are, once `DualPathConfig` has taken them."""
    try:
        DualPathConfig.from_dict(values)
    except MoEAdapterError as error:
        raise ValueError(str(error)) from None
    return values


def _check_json(file: Path) -> None:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"deepspeed: {file} is no JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"deepspeed: {file} holds a {type(values).__name__}, expected a DeepSpeed config's object")


@dataclass(frozen=True, kw_only=True, config=_FORBID_UNKNOWN)
class TrainingConfig:
    """One training run of transformers' Trainer (AdamW)."""

    learning_rate: PositiveFloat
    epochs: PositiveFloat = 1.0
    batch_size: PositiveInt = 1
    accumulation: PositiveInt = 1
    scheduler: Scheduler = "cosine"
    warmup_ratio: Share = 0.03
    weight_decay: NonNegativeFloat = 0.0


@dataclass(frozen=True, kw_only=True, config=_FORBID_UNKNOWN)
class StageConfig(TrainingConfig):
    """One stage. Every `save_steps` steps it leaves a checkpoint to resume from; None leaves none.

    `batching`: "plain" pads a batch's examples to the longest, "grouped" draws them of like lengths, and "packed" puts
    them into one row.
    """

    save_steps: PositiveInt | None = None
    batching: Literal["plain", "grouped", "packed"] = "plain"


@dataclass(frozen=True, kw_only=True, config=_FORBID_UNKNOWN)
class EngineConfig:
    """What trains a stage on the processes of a launcher; by default each has the whole model (DDP).

    `deepspeed`: "zero2", "zero3", or the path of a DeepSpeed config. `fsdp`: FSDP2. With `offload`, what they spread
    over the processes waits in the host's memory.
    """

    deepspeed: str | None = None
    offload: bool = False
    fsdp: bool = False

    def __post_init__(self) -> None:
        known = self.deepspeed in (None, "zero2", "zero3")
        if not known and not Path(str(self.deepspeed)).is_file():
            raise ValueError(f"deepspeed: got {self.deepspeed!r}, expected zero2, zero3 or a DeepSpeed config's path")
        if not known:
            _check_json(Path(str(self.deepspeed)))
        if self.fsdp and self.deepspeed:
            raise ValueError(f"got deepspeed: {self.deepspeed} and fsdp: true, expected one engine; set one to null")
        if self.offload and not self.fsdp and self.deepspeed not in ("zero2", "zero3"):
            raise ValueError("offload: got true, expected it with zero2, zero3 or fsdp; a config of yours says it")


@dataclass(frozen=True, kw_only=True, config=_FORBID_UNKNOWN)
class LoRAConfig:
    """Stage II's low-rank adapters (Table 8); `learning_rate` is their own, None for that of the stage."""

    r: PositiveInt = 8
    alpha: PositiveInt = 16
    dropout: Share = 0.05
    learning_rate: PositiveFloat | None = None
    target: Annotated[str, AfterValidator(_pattern)]


@dataclass(frozen=True, kw_only=True, config=_FORBID_UNKNOWN)
class SamplingConfig:
    """How often the stages draw each organ: in proportion to its weight · examples^temperature (`corpus/sampling.py`).

    1 draws them as they are, 0 all alike; weights are 1 where none is given. `keep`: organ → share of its training
    cases that is used at all, to make a long tail or a learning curve.
    """

    temperature: Annotated[float, Field(ge=0, le=1)] = 1.0
    weights: dict[str, NonNegativeFloat] = dataclasses.field(default_factory=dict)
    keep: dict[str, Annotated[float, Field(gt=0, le=1)]] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, config=_FORBID_UNKNOWN)
class PhantomConfig:
    """How many phantom cases to render when the user brings none."""

    cases_per_organ: PositiveInt
    test_share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    frames: PositiveInt = 2
    size: PositiveInt = 224


@dataclass(frozen=True, kw_only=True, config=_FORBID_UNKNOWN)
class BaseConfig:
    """A small general vision-language model, made when the user brings no checkpoint; sizes in Qwen2-VL's names."""

    family: Family
    vocab_size: PositiveInt
    text: dict[str, Any]
    vision: dict[str, Any]
    tower_pictures: PositiveInt  # labelled cell by cell, for the vision tower alone
    tower_pretraining: TrainingConfig
    pictures: PositiveInt  # described in words, for the whole model, with all of the general text
    pretraining: TrainingConfig


@dataclass(frozen=True, kw_only=True, config=_FORBID_UNKNOWN)
class BertScoreConfig:
    """BERTScore's encoder, a folder as `save_pretrained` leaves it.

    `num_layers`: whose states are compared; None for the layer that bert-score's authors chose for an encoder that is
    named as the folder is.
    """

    encoder: Annotated[str, AfterValidator(_folder)]
    num_layers: PositiveInt | None = None


@dataclass(frozen=True, kw_only=True, config=_FORBID_UNKNOWN)
class EvaluationConfig:
    """Greedy decoding of the held-out cases, and what it is scored on.

    `questions_per_case`: how many of a case's are drawn for "vqa"; None for all. `bertscore`: None leaves it out.
    """

    batch_size: PositiveInt = 1
    max_new_tokens: PositiveInt = 512
    tasks: Annotated[tuple[Task, ...], Field(min_length=1)] = ("report",)
    questions_per_case: PositiveInt | None = None
    bertscore: BertScoreConfig | None = None


@dataclass(frozen=True, kw_only=True, config=_FORBID_UNKNOWN)
class RecipeConfig:
    """Everything the recipe can be told; the defaults live in `presets/paper.yaml`.

    `method`: how the base is fitted to the cases, one of `methods.METHODS`. `frozen`: what of the dual-path layers
    keeps the value it starts with.

    `image_side`: each frame is resized to about image_side² pixels. `precision`: "bf16" is autocast over float32
    weights that train and a frozen base in its checkpoint's dtype, "fp32" is float32 throughout, "auto" is bf16 where
    the processor multiplies it natively. `chunked_loss`: the stages never hold a batch's whole logits. `on_nan`: what a
    loss that is not finite does to the run. `report_to`: where the stages' losses, loads, α and λ go, such as
    "tensorboard". `moe`: arguments of `moe_adapter.DualPathConfig`. `instructions`: stage
    II's tasks, and how often an epoch shows each case's examples of them. `sampling`: how often both stages draw each
    organ. `phantoms` and `base` are None where the preset expects the user's own cases and checkpoint; what `base` says
    of `text` and `vision` only transformers checks.
    """

    method: Method
    frozen: tuple[Literal["router", "alpha", "lambda"], ...]
    image_side: PositiveInt
    max_length: PositiveInt
    precision: Literal["auto", "fp32", "bf16"]
    gradient_checkpointing: bool
    attention: Literal["eager", "sdpa", "flash_attention_2"]
    chunked_loss: bool
    seed: int
    engine: EngineConfig
    on_nan: Literal["stop", "skip"]
    report_to: tuple[Reporter, ...]
    moe: Annotated[dict[str, Any], AfterValidator(_dual_path)]
    lora: LoRAConfig
    stage1: StageConfig
    stage2: StageConfig
    instructions: dict[Task, PositiveInt]
    sampling: SamplingConfig
    evaluation: EvaluationConfig
    phantoms: PhantomConfig | None = None
    base: BaseConfig | None = None

    def __post_init__(self) -> None:
        spread = "fsdp" if self.engine.fsdp else self.engine.deepspeed
        if self.method in ("plain", "full") and spread in ("fsdp", "zero3"):
            raise ValueError(
                f"method: got {self.method} with engine {spread}, whose spread weights only an adapter is gathered "
                "from; expected zero2, or deepspeed: null"
            )
        largest = CELL * LABEL_CLASSES["row"]
        if self.base and (self.image_side % CELL or self.image_side > largest):
            raise ValueError(
                f"image_side: got {self.image_side}, expected a multiple of {CELL} up to {largest} where the base is "
                "made here (a visual token sees so many pixels); any number will do with `base: null` and --base"
            )


def load_preset(name: str, *changes: Mapping[str, Any]) -> RecipeConfig:
    """Read `presets/NAME.yaml`, or a YAML file of the user's, with all that it extends, and `changes` on top.

    Raises: PresetError, with the field, what was got and what is expected.
    """
    try:
        return TypeAdapter(RecipeConfig).validate_python(functools.reduce(_merge, changes, _read(name)))
    except ValidationError as error:
        raise PresetError(f"preset {name!r}: {'; '.join(map(_describe, error.errors()))}") from None


def _read(name: str) -> dict[str, Any]:
    path = Path(name) if name.endswith((".yaml", ".yml")) else PRESETS / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in PRESETS.glob("*.yaml")))
        raise PresetError(f"unknown preset {name!r}: use one of {known}, or the path of a YAML file")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PresetError(f"preset {name!r} is no valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise PresetError(f"preset {name!r}: got {type(values).__name__}, expected a mapping of fields")
    parent = values.pop("extends", None)
    return _merge(_read(parent), values) if parent else values


def _merge(parent: Mapping[str, Any], child: Mapping[str, Any]) -> dict[str, Any]:
    """The child's values over the parent's, section by section."""
    merged = dict(parent)
    for key, value in child.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _describe(error: Any) -> str:
    """One pydantic error as `field: what is expected, got what`, with the nearest known name."""
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "value_error":  # of a check made here, which says what it got
        return f"{where}: {error['ctx']['error']}".removeprefix(": ")
    if error["type"] != "unexpected_keyword_argument":
        return f"{where}: {error['msg']}, got {error['input']!r}"
    nearest = difflib.get_close_matches(str(error["loc"][-1]), _field_names(), n=1)
    return f"{where}: unknown field" + (f", did you mean {nearest[0]!r}?" if nearest else "")


def _field_names() -> list[str]:
    sections = (
        RecipeConfig,
        StageConfig,
        EngineConfig,
        LoRAConfig,
        SamplingConfig,
        PhantomConfig,
        BaseConfig,
        EvaluationConfig,
        BertScoreConfig,
    )
    return [item.name for section in sections for item in dataclasses.fields(section)]
