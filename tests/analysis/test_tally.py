"""Counting while a model trains: the same counts as a record of all tokens, in constant memory, without a trace."""

from __future__ import annotations

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
import transformers as tf
import zoo

from moe_adapter import MoEAdapterError
from moe_adapter.analysis.confidence import confidence
from moe_adapter.analysis.figures import figure5
from moe_adapter.analysis.reader import RoutingRecord
from moe_adapter.analysis.record import record_routing
from moe_adapter.analysis.schema import COUNT_SCHEMA
from moe_adapter.analysis.statistics import expert_load
from moe_adapter.analysis.tally import count_routing

BY = ("layer", "group", "modality")
GROUPS = {"a": "liver", "b": "heart", "c": "vessel"}


@pytest.mark.parametrize("model_name", ["vlm", "mixtral"])
def test_counts_are_those_of_a_record(request, text_batch, image_batch, tmp_path, model_name):
    model = request.getfixturevalue(model_name)
    batches = [(text_batch("left"), ["a", "b", "c"])]
    if model_name == "vlm":
        batches.append((image_batch("left"), ["c", "a"]))

    def run(named):
        for batch, cases in batches:
            named.batch(case_ids=cases)
            model(**batch)

    with record_routing(model, tmp_path / "whole.parquet", groups=GROUPS) as recorder:
        run(recorder)
    with count_routing(model, groups=GROUPS) as counts:
        run(counts)
    whole, found = RoutingRecord.open(tmp_path / "whole.parquet"), counts.record()
    counts.write(tmp_path / "of" / "counts.parquet")
    read = RoutingRecord.open(tmp_path / "of" / "counts.parquet")
    assert pq.read_schema(read.paths[0]).equals(COUNT_SCHEMA)
    for record in (found, read):
        load, expected = expert_load(record, by=BY), expert_load(whole, by=BY)
        assert load.cells == expected.cells
        np.testing.assert_array_equal(load.counts_CE, expected.counts_CE)
        where = pc.field("layer") == 1
        np.testing.assert_array_equal(
            expert_load(record, where=where).counts_CE, expert_load(whole, where=where).counts_CE
        )
        assert record.aggregated and not whole.aggregated
        assert record.facts.layers == whole.facts.layers and record.facts.groups == whole.facts.groups
        assert record.facts.tokens == whole.facts.tokens
        assert record.facts.cases == sum(len(cases) for _, cases in batches)
        assert len(figure5(record).axes) == len(figure5(whole).axes)


def test_a_trainer_step_by_step(vlm, tmp_path):
    """Training forwards alone, with checkpointing; weights and loss as without counting; reset between readings."""

    def train(counted: bool) -> tuple[list[int], list[torch.Tensor]]:
        torch.manual_seed(0)
        model = tf.MixtralForCausalLM(tf.MixtralConfig(**zoo.TEXT, num_local_experts=4, num_experts_per_tok=2))
        data = [{"input_ids": torch.full((6,), 3 + number), "labels": torch.full((6,), 7)} for number in range(8)]
        seen: list[int] = []

        class Reads(tf.TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if counted:
                    seen.append(int(expert_load(counts.record()).counts_CE.sum()))
                    counts.reset()

        arguments = tf.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            num_train_epochs=1,
            eval_strategy="steps",
            eval_steps=1,
            gradient_checkpointing=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = tf.Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data, callbacks=[Reads()])
        with count_routing(model, training=True) as counts:
            trainer.train()
        return seen, [parameter.detach().clone() for parameter in model.parameters()]

    seen, weights = train(counted=True)
    assert seen == [4 * 6 * 2 * 2] * 2, "sequences × tokens × layers × k of a step; nothing of the evaluations"
    for one, other in zip(weights, train(counted=False)[1], strict=True):
        assert torch.equal(one, other)


def test_memory_does_not_grow(mixtral, text_batch):
    with count_routing(mixtral) as counts:
        mixtral(**text_batch("left"))
        size = counts._tally._counts_GMLE.nbytes
        for _ in range(5):
            mixtral(**text_batch("left"))
    assert counts._tally._counts_GMLE.nbytes == size and not hasattr(counts._tally, "cases")
    assert counts.record().facts.tokens == 6 * 15 and counts.record().facts.cases == 18


def test_errors(vlm, mixtral, text_batch, tmp_path):
    with count_routing(vlm) as counts, pytest.raises(MoEAdapterError, match="nothing was recorded"):
        counts.record()
    with count_routing(mixtral) as counts:
        mixtral(**text_batch("left"))
    counts.write(tmp_path / "counts.parquet")
    record = RoutingRecord.open(tmp_path / "counts.parquet")
    with pytest.raises(MoEAdapterError, match=r"no column \['case'\]; it has group, modality, layer, expert"):
        record.count(["case"])
    with pytest.raises(MoEAdapterError, match="needs a record of tokens"):
        confidence(record)
    counts.reset()
    with pytest.raises(MoEAdapterError, match="nothing was recorded"):
        counts.write(tmp_path / "empty.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["counts.parquet"]
