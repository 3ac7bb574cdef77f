"""`moe-adapter routing record`: runs a model over cases, and records where their tokens go."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_adapter.analysis.commands import command
from moe_adapter.analysis.commands._options import add_model, at_least, loading, refuse_existing, shows_progress
from moe_adapter.analysis.commands._output import print_written
from moe_adapter.errors import MoEAdapterError

if TYPE_CHECKING:
    from moe_adapter.analysis.prompts import Prompt

EXAMPLES = (
    "moe-adapter routing record Qwen2-VL-7B --adapter runs/a --data cases.jsonl -o routing.parquet",
    "moe-adapter routing record Qwen2-VL-7B --adapter runs/a --data cases.jsonl -o routing.parquet \\",
    "      --group organ --prompt 'Write the report.' --answers findings",
    "moe-adapter routing record OLMoE-1B-7B --data prompts.jsonl -o olmoe.parquet --max-new-tokens 0",
    "torchrun --nproc-per-node 8 --no-python moe-adapter routing record … -o r.parquet  # r.0-of-8.parquet, …",
)


def add(subparsers: Any) -> None:
    help = "run a model over cases, and record where their tokens go"
    parser = command(subparsers, "record", run, help=help, examples=EXAMPLES)
    add_model(parser)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="RECORD", help="the Parquet file to write")
    parser.add_argument("--overwrite", action="store_true", help="an old one")
    data = parser.add_argument_group("cases")
    fields = "id, group, prompt or messages, images (paths from the file's folder)"
    data.add_argument("--data", type=Path, required=True, help=f"JSONL, a case a line: {fields}")
    data.add_argument("--group", default="group", metavar="FIELD", help="the field of the group, such as organ")
    data.add_argument("--prompt", help="for lines that have none")
    data.add_argument("--batch-size", type=at_least(1), default=8, metavar="N", help="cases at a time (default: 8)")
    answers = parser.add_argument_group("answers")
    either = answers.add_mutually_exclusive_group()
    either.add_argument(
        "--max-new-tokens",
        type=at_least(0),
        default=128,
        metavar="N",
        help="of a greedy answer; 0 reads the prompts alone (default: 128)",
    )
    either.add_argument("--answers", metavar="FIELD", help="read the answers of this field, and generate none")
    answers.add_argument("--save-answers", type=Path, metavar="FILE", help="JSONL: the cases, each with its answer")


def run(options: argparse.Namespace) -> None:
    from moe_adapter.analysis.prompts import read_prompts
    from moe_adapter.analysis.record import RoutingRecord, record_routing

    rank, ranks = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    output, save_answers = (_part(path, rank, ranks) for path in (options.output, options.save_answers))
    for path in filter(None, (output, save_answers)):
        refuse_existing(path, overwrite=options.overwrite)
    prompts = read_prompts(options.data, group=options.group, prompt=options.prompt, answer=options.answers)
    prompts = _share(prompts, rank, ranks)
    with loading(options) as pretrained:
        place = dict(adapter=options.adapter, dtype=options.dtype, device=options.device)
        model, processor = pretrained.load_model(options.model, **place), pretrained.load_processor(options.model)
        with record_routing(model, output) as recorder:
            answers = list(_answers(pretrained, model, processor, prompts, recorder, options))
    written = [output]
    if save_answers:
        lines = [{**each.line, "id": each.case, "answer": text} for each, text in zip(prompts, answers, strict=True)]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        save_answers.write_text(text, encoding="utf-8")
        written.append(save_answers)
    facts = RoutingRecord.open(output).facts
    print_written(written, options, tokens=facts.tokens, cases=facts.cases, groups=facts.groups)
    if not options.json:
        print(f"{facts.tokens:,} tokens of {facts.cases:,} cases in {len(facts.layers)} layers")


def _part(path: Path | None, rank: int, ranks: int) -> Path | None:
    """What one of several processes writes in place of `path`."""
    return path and (path.with_name(f"{path.stem}.{rank}-of-{ranks}{path.suffix}") if ranks > 1 else path)


def _share(prompts: list[Prompt], rank: int, ranks: int) -> list[Prompt]:
    """The cases of one of several processes; a case is not divided."""
    numbers = {case: number for number, case in enumerate(dict.fromkeys(each.case for each in prompts))}
    if len(numbers) < ranks:
        raise MoEAdapterError(f"{len(numbers)} cases for {ranks} processes: start fewer.")
    return [each for each in prompts if numbers[each.case] % ranks == rank]


def _answers(
    pretrained: Any,
    model: Any,
    processor: Any,
    prompts: Sequence[Prompt],
    recorder: Any,
    options: argparse.Namespace,
) -> Iterator[str]:
    """Each case's answer, given or generated; "" where the prompt alone is read."""
    import torch

    size = options.batch_size
    batches = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    tokenizer = pretrained.tokenizer_of(processor)
    for batch in pretrained.progress(batches, label="batches", total=len(batches), shown=shows_progress(options)):
        recorder.batch(case_ids=[each.case for each in batch], groups=[each.group for each in batch])
        given = options.answers is not None
        conversations = list(map(_conversation, batch))
        try:
            inputs = pretrained.encode(model, processor, conversations, answered=given)
            with torch.inference_mode():
                if given or not options.max_new_tokens:
                    pretrained.read(model, inputs)
                    yield from (each.answer or "" for each in batch)
                else:
                    ids = pretrained.answer_ids(model, inputs, options.max_new_tokens)
                    yield from map(str.strip, tokenizer.batch_decode(ids, skip_special_tokens=True))
        except torch.OutOfMemoryError as error:
            raise MoEAdapterError(f"{size} cases at a time don't fit into memory: lower --batch-size.") from error


def _conversation(prompt: Prompt) -> list[dict[str, Any]]:
    """A case's messages with its images in their places, and its answer where it is given."""
    from moe_adapter.analysis.prompts import open_image

    images = map(open_image, prompt.images)

    def filled(part: dict[str, Any]) -> dict[str, Any]:
        return part | {"image": next(images)} if part["type"] == "image" else part

    messages = [{**message, "content": list(map(filled, message["content"]))} for message in prompt.messages]
    if prompt.answer is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": prompt.answer}]})
    return messages
