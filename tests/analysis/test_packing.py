"""Packed rows: a record of them is that of the same sequences, one to a row."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import transformers as tf
import zoo
from datasets import Dataset
from transformers.masking_utils import find_packed_sequence_indices
from trl import SFTConfig, SFTTrainer

from moe_adapter import MoEAdapterError, dual_path_layers, inject_dual_path_moe
from moe_adapter.analysis.packing import packed_rows
from moe_adapter.analysis.record import RoutingRecord, record_routing
from moe_adapter.analysis.tally import count_routing

IMAGE, VIDEO = zoo.TOKENS["image_token_id"], zoo.TOKENS["video_token_id"]
NAMES, ORGANS = ["a", "b", "c", "d"], ["liver", "heart", "liver", "vessel"]
GROUPS = dict(zip(NAMES, ORGANS, strict=True))
LENGTHS = (5, 1, 7, 3)


@pytest.fixture
def sequences() -> list[torch.Tensor]:
    return [torch.randint(3, 100, (n,), generator=torch.Generator().manual_seed(n)) for n in LENGTHS]


@pytest.fixture
def llama() -> tf.PreTrainedModel:
    model = inject_dual_path_moe(
        zoo.build("llama"), num_experts=4, top_k=2, expert_dim=8, shared_expert_dim=8, preserve_base=False
    )
    for layer in dual_path_layers(model).values():
        for parameter in layer.new_parameters().values():
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture
def named(record):
    """named(model, *batches): the rows of a record of the batches, whose sequences are NAMES in order, of ORGANS."""

    def run(model: torch.nn.Module, *batches: dict[str, torch.Tensor]) -> dict[tuple, tuple[int, float]]:
        return rows_of(record(model, lambda: [model(**batch) for batch in batches], cases=NAMES, groups=GROUPS))

    return run


def one_by_one(sequences: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": ids[None]} for ids in sequences]


def flattened(sequences: list[torch.Tensor], **options: bool) -> dict[str, torch.Tensor]:
    batch = tf.DataCollatorWithFlattening(**options)([{"input_ids": ids} for ids in sequences])
    return {**batch, "use_cache": False}  # beside a cache transformers doesn't keep packed sequences apart


def rows_of(record: RoutingRecord) -> dict[tuple, tuple[int, float]]:
    """What every row is, with its expert and weight. Read at once: the next record takes the place of its file."""
    rows = record.table().to_pylist()
    found = {tuple(row.values())[:7]: (row["expert"], row["weight"]) for row in rows}
    assert len(found) == len(rows), "a token was recorded twice"
    assert record.facts.cases == len({case for case, *_ in found})
    assert record.facts.tokens == len({key[:4] for key in found})
    return found


def assert_same_rows(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for key, (expert, weight) in expected.items():
        assert found[key] == (expert, pytest.approx(weight, abs=1e-5)), key


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["mixtral", "llama"])
def test_a_packed_row_is_its_sequences(request, named, sequences, name, attention):
    model = request.getfixturevalue(name)
    model.set_attn_implementation(attention)
    ids, mask = (
        torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        for rows in (sequences, [torch.ones_like(row) for row in sequences])
    )
    expected = named(model, dict(input_ids=ids, attention_mask=mask))
    assert {(case, group) for case, group, *_ in expected} == set(GROUPS.items())
    told = dict(return_seq_idx=True, return_flash_attn_kwargs=True)
    for options in ({}, told, dict(position_ids_start=2)):
        assert_same_rows(named(model, flattened(sequences, **options)), expected)


def test_two_packed_rows_with_a_padded_tail(named, mixtral, sequences):
    """The tail's pads have position 0 each, as TRL's and transformers' own make them."""
    a, b, c, d = sequences
    positions = [torch.cat([torch.arange(len(s)) for s in row]) for row in ([a, b], [c, d])]
    ids, positions = (
        torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        for rows in ([torch.cat([a, b]), torch.cat([c, d])], positions)
    )
    packed = named(mixtral, dict(input_ids=ids, position_ids=positions, use_cache=False))
    assert_same_rows(packed, named(mixtral, *one_by_one(sequences)))
    mixtral.config.pad_token_id = None  # then nobody knows
    with pytest.raises(MoEAdapterError, match="met 8 sequences, and record_routing was given 4"):
        named(mixtral, dict(input_ids=ids, position_ids=positions, use_cache=False))


def test_embeddings_may_be_packed(record, mixtral, sequences):
    packed = flattened(sequences)
    embeds = mixtral.get_input_embeddings()(packed["input_ids"]).detach()
    given = dict(inputs_embeds=embeds, position_ids=packed["position_ids"], use_cache=False)
    rows = rows_of(record(mixtral, lambda: mixtral(**given)))
    whole = rows_of(record(mixtral, lambda: mixtral(**packed)))
    assert {case for case, *_ in whole} == {"0", "1", "2", "3"}  # without names
    assert rows == {(*key[:4], -1, *key[5:]): value for key, value in whole.items()}


@pytest.mark.parametrize("key", ["seq_idx", "cu_seq_lens_q"])
def test_sequences_told_without_position_ids(named, mixtral, sequences, key):
    """Only kernels that read these keep such rows apart, so names and positions alone are compared."""
    told = flattened(sequences, return_position_ids=False, return_seq_idx=True, return_flash_attn_kwargs=True)
    packed = named(mixtral, {name: told[name] for name in ("input_ids", "use_cache", key)})
    assert packed.keys() == named(mixtral, *one_by_one(sequences)).keys()


def vision_batches(model) -> tuple[list[dict], dict]:
    """Cases with an image, a video of two steps, text alone, two images: one by one, and packed as (4, 1, T) M-RoPE."""
    image, film, plain = [122, *[IMAGE] * 4, 123], [122, *[VIDEO] * 8, 123], [5, 6, 7]
    ids = [[9, *image, 10], [11, *film, 12, 13], plain, [*image, 14, *image, 15]]
    grids = [{"image": [[1, 4, 4]]}, {"video": [[2, 4, 4]]}, {}, {"image": [[1, 4, 4]] * 2}]
    batches, positions = [], []
    for row, grid in zip(ids, grids, strict=True):
        tokens = torch.tensor([row])
        batch = {"input_ids": tokens, "mm_token_type_ids": (tokens == IMAGE).int() + 2 * (tokens == VIDEO).int()}
        for kind, sizes in grid.items():
            pixels = torch.randn(int(torch.tensor(sizes).prod(1).sum()), 3 * 2 * 14 * 14)
            name = "pixel_values" if kind == "image" else "pixel_values_videos"
            batch |= {f"{kind}_grid_thw": torch.tensor(sizes), name: pixels}
        given = {name: value for name, value in batch.items() if not name.startswith("pixel")}
        rope = model.model.get_rope_index(**given)[0]
        positions.append(torch.cat([torch.arange(len(row)).expand(1, 1, -1), rope]))
        batches.append(batch)
    names = list(dict.fromkeys(name for batch in batches for name in batch))
    per_token = ("input_ids", "mm_token_type_ids")
    packed = {
        name: torch.cat([batch[name] for batch in batches if name in batch], dim=int(name in per_token))
        for name in names
    }
    return batches, {**packed, "position_ids": torch.cat(positions, dim=-1), "use_cache": False}


def test_packed_images_and_videos(named, vlm):
    vlm.eval()
    batches, packed = vision_batches(vlm)
    expected = named(vlm, *batches)
    kinds = {(case, modality) for case, _, modality, *_ in expected}
    assert kinds == {*((name, "prompt") for name in NAMES), ("a", "image"), ("b", "video"), ("d", "image")}
    assert_same_rows(named(vlm, packed), expected)


def test_positions_of_one_sequence_do_not_split_it(vlm, mixtral, record, text_batch):
    """M-RoPE's three kinds, which go back within an image; another start; padding; a cache; generate; a mask."""
    vlm.eval()
    batches, _ = vision_batches(vlm)
    case = batches[3]
    rope = vlm.model.get_rope_index(case["input_ids"], case["mm_token_type_ids"], case["image_grid_thw"])[0]
    assert (rope.diff() != 1).any()
    ids, columns = torch.full((2, 6), 7), torch.arange(6).expand(2, 6)
    padded = text_batch("left")
    holes = (padded["attention_mask"].cumsum(1) - 1).masked_fill(padded["attention_mask"] == 0, 1)
    packed = torch.tensor([[0, 1, 2, 0, 1, 2]]).expand(2, 6)

    def cached():
        out = mixtral(input_ids=ids, position_ids=columns, cache=tf.DynamicCache())
        for step in range(6, 9):
            position = torch.full((2, 1), step)
            out = mixtral(input_ids=ids[:, :1], position_ids=position, cache=out.cache)

    greedy = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False)
    runs = {
        "M-RoPE": (vlm, lambda: vlm(**case, position_ids=rope), [14]),
        "M-RoPE beside the text's": (vlm, lambda: vlm(**case, position_ids=torch.cat([_text(14), rope])), [14]),
        "another start": (mixtral, lambda: mixtral(input_ids=ids, position_ids=columns + 9), [6, 6]),
        "of one row for all": (mixtral, lambda: mixtral(input_ids=ids, position_ids=columns[:1]), [6, 6]),
        "padding": (mixtral, lambda: mixtral(**padded, position_ids=holes), [7, 5, 3]),
        "a cache": (mixtral, cached, [9, 9]),
        "generate": (mixtral, lambda: mixtral.generate(ids, position_ids=columns, **greedy), [9, 9]),
        "generate without a cache": (
            mixtral,
            lambda: mixtral.generate(ids, position_ids=packed, use_cache=False, **greedy),
            [9, 9],
        ),
        "beams": (mixtral, lambda: mixtral.generate(ids[:1], num_beams=3, **greedy), [9]),
        "a mask": (mixtral, lambda: mixtral(input_ids=ids, position_ids=packed, attention_mask=ids), [6, 6]),
        "an empty cache": (
            mixtral,
            lambda: mixtral(input_ids=ids, position_ids=packed, cache=tf.DynamicCache()),
            [6, 6],
        ),
    }
    for name, (model, run, lengths) in runs.items():
        found = record(model, run)
        places = Counter(zip(*(found.table().column(key).to_pylist() for key in ("case", "position")), strict=True))
        rows = 4 * (3 if name == "beams" else 1)
        assert places == {(str(c), at): rows for c, length in enumerate(lengths) for at in range(length)}, name


def _text(tokens: int) -> torch.Tensor:
    return torch.arange(tokens).expand(1, 1, -1)


def test_the_rule_is_transformers_own():
    generator = torch.Generator().manual_seed(0)
    split = 0
    for _ in range(200):
        jumps = torch.rand(3, 12, generator=generator) < 0.1
        steps = torch.where(jumps, torch.randint(-4, 5, (3, 12), generator=generator), 1)
        positions = steps.cumsum(1)
        theirs = find_packed_sequence_indices(positions)
        ours = packed_rows({"position_ids": positions}, torch.ones(3, 12).numpy(), None)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            split += 1
            within = torch.tensor(ours.sequence_BS)
            assert torch.equal(within - within[:, :1], theirs)
            assert within[1:, 0].tolist() == (within[:-1, -1] + 1).tolist()
    assert split > 100


def test_names_are_one_for_each_sequence(mixtral, sequences, tmp_path):
    batch = flattened(sequences)
    with record_routing(mixtral, tmp_path / "a.parquet", groups=GROUPS) as recorder:
        recorder.batch(case_ids=NAMES)
        mixtral(**batch)
        recorder.batch(case_ids=["e"], groups=["lung"])
        mixtral(input_ids=sequences[0][None])
    found = RoutingRecord.open(tmp_path / "a.parquet")
    counts = {(row["case"], row["group"]): row["count"] // 4 for row in found.count(["case", "group"]).to_pylist()}
    assert counts == {**dict(zip(GROUPS.items(), LENGTHS, strict=True)), ("e", "lung"): 5}
    for given in (1, 3):
        message = rf"got {given} case ids for a batch of 1 rows holding 4 sequences; give one per sequence"
        with pytest.raises(MoEAdapterError, match=message), record_routing(mixtral, tmp_path / "b.parquet") as recorder:
            recorder.batch(case_ids=NAMES[:given])
            mixtral(**batch)


def test_counts_are_of_sequences(mixtral, sequences):
    with count_routing(mixtral) as counts:
        mixtral(**flattened(sequences))
        mixtral(**flattened(sequences))
        mixtral(input_ids=torch.full((2, 3), 5))
    facts = counts.record().facts
    assert (facts.cases, facts.tokens) == (4 + 4 + 2, 2 * sum(LENGTHS) + 6)
    tail = torch.zeros(1, 4, dtype=torch.long)
    with count_routing(mixtral) as counts:  # nothing but padding
        mixtral(input_ids=tail, position_ids=tail, use_cache=False)
        assert counts._tally.tokens == counts._tally.sequences == 0


def test_the_trainers_evaluation_and_training_of_flattened_batches(mixtral, named, record, sequences, tmp_path):
    data = [{"input_ids": ids, "labels": ids} for ids in sequences]
    arguments = tf.TrainingArguments(per_device_eval_batch_size=3, per_device_train_batch_size=2, **_quiet(tmp_path))
    collator = tf.DataCollatorWithFlattening()
    trainer = tf.Trainer(mixtral, arguments, data_collator=collator, train_dataset=data, eval_dataset=data)
    found = rows_of(record(mixtral, trainer.evaluate, cases=NAMES, groups=GROUPS))
    assert_same_rows(found, named(mixtral, *one_by_one(sequences)))
    with count_routing(mixtral, training=True) as counts:
        trainer.train()
    assert (counts.record().facts.cases, counts.record().facts.tokens) == (4, sum(LENGTHS))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("multiple", [None, 8], ids=["whole", "padded tail"])
@pytest.mark.parametrize("packing", [True, False], ids=["packing", "padding-free"])
def test_trls_packing_and_padding_free(llama, record, tokenizer, tmp_path, packing, multiple):
    lengths = (5, 9, 7, 3, 8, 2)
    rows = [torch.randint(3, 100, (n,)).tolist() for n in lengths]
    data = Dataset.from_dict({"input_ids": rows})
    arguments = SFTConfig(
        packing=packing,
        padding_free=True,
        max_length=12 if packing else None,
        pad_to_multiple_of=multiple,
        per_device_eval_batch_size=2,
        **_quiet(tmp_path),
    )
    trainer = SFTTrainer(llama, arguments, train_dataset=data, eval_dataset=data, processing_class=tokenizer)
    met = []  # packing puts them in an order of its own
    for row in trainer.eval_dataset:
        met += list(torch.tensor(row["input_ids"]).split(row["seq_lengths"] if packing else len(row["input_ids"])))
    assert sorted(map(len, met)) == sorted(lengths)
    names = [f"case {number}" for number in range(len(met))]
    found = rows_of(record(llama, trainer.evaluate, cases=names))
    expected = record(llama, lambda: [llama(**batch) for batch in one_by_one(met)], cases=names)
    assert_same_rows(found, rows_of(expected))


def _quiet(path) -> dict:
    return dict(
        output_dir=str(path), report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True, bf16=False,
        num_train_epochs=1,
    )  # fmt: skip


@pytest.fixture
def tokenizer():
    from tokenizers import Tokenizer, models

    vocabulary = {f"t{i}": i for i in range(zoo.VOCAB)}
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="t3")), pad_token="t0", eos_token="t2"
    )
