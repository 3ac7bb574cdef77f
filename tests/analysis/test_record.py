"""A record holds every token that the routers saw, once, and what each was."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
import transformers as tf
import zoo

from moe_adapter import MoEAdapterError, dual_path_layers, inject_dual_path_moe, static_only
from moe_adapter.analysis.record import RoutingRecord, record_routing

sides = pytest.mark.parametrize("side", ["left", "right"])
COMMON = dict(moe_intermediate_size=16, num_experts_per_tok=2)
LATENT = dict(q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8, n_shared_experts=1)
GROUPED = dict(n_routed_experts=4, n_group=2, topk_group=1, first_k_dense_replace=1)
FAMILIES = {
    "Mixtral": dict(num_local_experts=4, num_experts_per_tok=2),
    "Qwen2Moe": dict(COMMON, num_experts=4, shared_expert_intermediate_size=16),
    "Qwen3Moe": dict(COMMON, num_experts=4, head_dim=8),
    "Olmoe": dict(num_experts=4, num_experts_per_tok=3),
    "GptOss": dict(num_local_experts=4, num_experts_per_tok=2, head_dim=8),
    "DeepseekV2": dict(COMMON, **LATENT, **GROUPED),
    "DeepseekV3": dict(COMMON, **LATENT, **GROUPED, num_hidden_layers=3),
}


@sides
def test_every_slot_is_what_the_model_says_of_its_routers(mixtral, text_batch, record, side):
    batch = text_batch(side)
    logits = mixtral(**batch, output_router_logits=True).router_logits
    rows = iter(record(mixtral, lambda: mixtral(**batch)).table().to_pylist())
    for case, mask_S in enumerate(batch["attention_mask"]):
        for position, column in enumerate(mask_S.nonzero().flatten().tolist()):
            token = case * len(mask_S) + column
            for layer, logits_TE in enumerate(logits):
                weights, experts = logits_TE[token].softmax(-1).topk(2)
                for slot in range(2):
                    row = next(rows)
                    assert row.pop("weight") == pytest.approx((weights / weights.sum())[slot].item(), rel=1e-5)
                    token_id = batch["input_ids"][case, column].item()
                    facts = dict(case=str(case), group="all", modality="prompt", position=position, token_id=token_id)
                    assert row == dict(facts, layer=layer, slot=slot, expert=experts[slot].item())
    assert next(rows, None) is None


@sides
def test_dual_path_counts_equal_the_routers_weights(vlm, image_batch, record, side):
    batch = image_batch(side)
    seen: list[torch.Tensor] = []
    layers = dual_path_layers(vlm)
    with ExitStack() as hooks:
        for layer in layers.values():
            hooks.callback(layer.register_forward_pre_hook(lambda module, args: seen.append(args[0])).remove)
        result = record(vlm, lambda: vlm(**batch))
    expected: Counter = Counter()
    for number, (layer, x_BSD) in enumerate(zip(layers.values(), seen, strict=True)):
        experts_BSK = (x_BSD @ layer.router.weight.T).topk(2).indices
        for at in batch["attention_mask"].nonzero().tolist():
            modality = "image" if batch["input_ids"][tuple(at)] == 120 else "prompt"
            expected.update((number, modality, expert) for expert in experts_BSK[tuple(at)].tolist())
    counted = result.count(["layer", "modality", "expert"]).to_pylist()
    assert {tuple(row.values())[:3]: row["count"] for row in counted} == expected
    assert [layer.name for layer in result.facts.layers] == list(layers)
    assert result.facts.tokens == 27 and result.facts.cases == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_own_moe_models(family, text_batch, record):
    """Against what the experts themselves were given."""
    sizes = {**zoo.TEXT, "num_key_value_heads": 4, **FAMILIES[family]}
    model = getattr(tf, f"{family}ForCausalLM")(getattr(tf, f"{family}Config")(**sizes)).eval()
    given = []
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            module.register_forward_pre_hook(lambda module, args: given.append(args[1:]))
    batch = text_batch("left")
    result = record(model, lambda: model(**batch))
    real_T = batch["attention_mask"].flatten().bool()
    assert len(given) == len(result.facts.layers) > 0
    for layer, (index_TK, weights_TK) in enumerate(given):
        rows = result.table(["expert", "weight"], _layer(layer))
        assert rows["expert"].to_pylist() == index_TK[real_T].flatten().tolist()
        torch.testing.assert_close(torch.tensor(rows["weight"].to_pylist()), weights_TK[real_T].flatten())
        assert result.facts.layers[layer].num_experts == 4
        assert result.facts.layers[layer].top_k == index_TK.shape[1]


def test_routers_of_the_vision_tower_are_left_out(image_batch, record):
    model = inject_dual_path_moe(zoo.build("qwen2_vl"), r"(blocks|layers)\.\d+\.mlp", num_experts=2, expert_dim=8)
    assert len(dual_path_layers(model)) == 4
    result = record(model, lambda: model(**image_batch("left")))
    assert [layer.name for layer in result.facts.layers] == [f"model.language_model.layers.{n}.mlp" for n in (0, 1)]


def test_modality_from_the_config_where_the_model_gets_no_types(vlm, record):
    result = record(vlm, lambda: vlm(input_ids=torch.tensor([[5, 120, 120, 6, 121]])))
    modalities = [row["modality"] for row in result.table(where=_layer(0)).to_pylist()[::2]]
    assert modalities == ["prompt", "image", "image", "prompt", "video"]


def test_embeddings_in_place_of_ids(mixtral, record):
    result = record(mixtral, lambda: mixtral(inputs_embeds=torch.randn(2, 3, 32)))
    assert result.facts.tokens == 6 and set(result.table()["token_id"].to_pylist()) == {-1}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("model_name", ["vlm", "mixtral"])
def test_checkpointing_counts_once(request, text_batch, record, routes, model_name, kind):
    model = request.getfixturevalue(model_name).train()
    batch = text_batch("right")
    plain = routes(record(model, lambda: model(**batch)))
    model.gradient_checkpointing_enable({"use_reentrant": kind})
    model.enable_input_require_grads()

    routers_ran = 0

    def count(*_):
        nonlocal routers_ran
        routers_ran += 1

    def step():
        for name, module in model.named_modules():
            if name.endswith((".router", ".gate")):
                module.register_forward_hook(count)
        model(**batch, labels=batch["input_ids"]).loss.backward()

    assert routes(record(model, step)) == plain
    assert routers_ran == 2 * 2, "nothing was computed again in backward"


def test_the_trainers_evaluation(vlm, record, tmp_path):
    data = [{"input_ids": torch.full((length,), 7), "labels": torch.full((length,), 7)} for length in (3, 4, 5, 6, 2)]

    def collate(rows):
        ids, labels = (
            torch.nn.utils.rnn.pad_sequence([row[key] for row in rows], batch_first=True, padding_value=value)
            for key, value in (("input_ids", 0), ("labels", -100))
        )
        return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}

    arguments = tf.TrainingArguments(
        output_dir=str(tmp_path), per_device_eval_batch_size=2, report_to=[], disable_tqdm=True, use_cpu=True
    )
    trainer = tf.Trainer(model=vlm, args=arguments, eval_dataset=data, data_collator=collate)
    cases = ["c1", "c2", "c3", "c4", "c5"]
    groups = dict.fromkeys(cases, "liver") | {"c2": "heart"}
    result = record(vlm, trainer.evaluate, cases=cases, groups=groups)
    per_case = {row["case"]: row["count"] for row in result.count(["case"], _layer(1)).to_pylist()}
    assert per_case == {"c1": 6, "c2": 8, "c3": 10, "c4": 12, "c5": 4}
    assert {row["group"]: row["count"] for row in result.count(["group"]).to_pylist()} == {"heart": 16, "liver": 64}


def test_a_peft_model_is_recorded_under_the_models_own_names(vlm, image_batch, record, routes):
    peft = pytest.importorskip("peft")
    batch = image_batch("left")
    plain = routes(record(vlm, lambda: vlm.generate(**batch, max_new_tokens=3, do_sample=False)))
    names = list(dual_path_layers(vlm))
    lora = peft.get_peft_model(vlm, peft.LoraConfig(target_modules=r".*language_model.*\.(q|v)_proj")).eval()
    result = record(lora, lambda: lora.generate(**batch, max_new_tokens=3, do_sample=False))
    assert routes(result) == plain
    assert [layer.name for layer in result.facts.layers] == names
    assert record(lora, lambda: lora(**batch)).facts.tokens == 27


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_compiled_model_is_recorded(mixtral, text_batch, record, routes):
    batch = text_batch("left")
    compiled = torch.compile(mixtral, backend="eager")
    with torch.no_grad():
        compiled(**batch)
        assert routes(record(compiled, lambda: compiled(**batch))) == routes(record(mixtral, lambda: mixtral(**batch)))


def test_row_groups_are_written_as_it_goes(mixtral, tmp_path):
    path = tmp_path / "routing.parquet"
    ids = torch.randint(3, 100, (4, 30))
    sizes = []
    with record_routing(mixtral, path, row_group_rows=200) as recorder:
        for _ in range(4):
            mixtral(input_ids=ids)
            sizes.append(next(tmp_path.glob("*.partial")).stat().st_size)
            assert sum(map(len, recorder.writer._pending)) * 4 < 200
            assert not path.exists()
    assert sizes == sorted(set(sizes)), "nothing reached the disk between forwards"
    footer = pq.read_metadata(path)
    groups = [footer.row_group(number).num_rows for number in range(footer.num_row_groups)]
    assert groups == [200] * 9 + [120]
    assert RoutingRecord.open(path).facts.tokens == 480
    assert list(tmp_path.iterdir()) == [path]


def test_layers_that_never_ran_and_shares(vlm, text_batch, record):
    first, second = dual_path_layers(vlm)
    dual_path_layers(vlm)[first].static_only = True
    torch.nn.init.constant_(dual_path_layers(vlm)[second].alpha_logit, 1.0)
    facts = record(vlm, lambda: vlm(**text_batch("left"))).facts
    assert (facts.layers[0].num_experts, facts.layers[1].num_experts) == (0, 4)
    assert facts.layers[1].alpha == pytest.approx(torch.tensor(1.0).sigmoid().item())
    assert facts.layers[1].lam is not None


def test_layers_may_be_switched_off_on_the_way(vlm, text_batch, record):
    first = next(iter(dual_path_layers(vlm).values()))

    def run():
        for first.static_only in (False, True, False):
            vlm(**text_batch("left"))

    counts = {row["layer"]: row["count"] for row in record(vlm, run).count(["layer"]).to_pylist()}
    assert counts == {0: 2 * 15 * 2, 1: 3 * 15 * 2}


def test_an_error_leaves_model_and_older_record_as_they_were(vlm, text_batch, record, tmp_path):
    batch = text_batch("left")
    before = record(vlm, lambda: vlm(**batch)).table()

    def fail():
        vlm(**batch)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record(vlm, fail)
    assert RoutingRecord.open(tmp_path / "routing.parquet").table() == before
    assert [path.name for path in tmp_path.iterdir()] == ["routing.parquet"]
    assert "generate" not in vars(vlm)
    assert not any(layer.router._forward_hooks for layer in dual_path_layers(vlm).values())


def test_a_forward_that_fails_is_left_out(mixtral, record, text_batch):
    batch = text_batch("left")

    def run():
        with pytest.raises(IndexError):
            mixtral(input_ids=torch.tensor([[zoo.VOCAB + 1]]))
        handle = mixtral.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            mixtral(**batch)
        handle.remove()
        mixtral(**batch)

    assert record(mixtral, run).facts.tokens == 15


def test_errors(mixtral, vlm, text_batch, tmp_path, record):
    batch = text_batch("left")
    with pytest.raises(MoEAdapterError, match=r"LlamaForCausalLM has no router.*inject_dual_path_moe"):
        record(zoo.build("llama"), lambda: None)
    with pytest.raises(MoEAdapterError, match="nothing was recorded"):
        record(mixtral, lambda: None)
    with pytest.raises(MoEAdapterError, match="nothing was recorded"), static_only(vlm):
        record(vlm, lambda: vlm(**batch))
    with pytest.raises(MoEAdapterError, match=r"router of model\.layers\.0\.mlp ran outside a forward"):
        record(mixtral, lambda: mixtral.model.layers[0].mlp(torch.randn(1, 2, 32)))
    with pytest.raises(MoEAdapterError, match=r"has a forward that takes input_ids"):
        record(torch.nn.Sequential(mixtral.model.layers[0]), lambda: None)
    assert list(tmp_path.iterdir()) == []


def test_a_router_of_another_form_is_named(text_batch, record, mixtral):
    mixtral.model.layers[1].mlp.gate.register_forward_hook(lambda module, args, output: output[:2])
    with pytest.raises(MoEAdapterError, match=r"model\.layers\.1\.mlp returned \(21, 4\) Tensor, \(21, 2\) Tensor"):
        record(mixtral, lambda: mixtral(**text_batch("left")))


def test_a_router_that_sees_other_tokens_is_refused(record, mixtral):
    class Halved(torch.nn.Module):
        def forward(self, input_ids):
            return self.block(torch.randn(*input_ids.shape, 32)[:, ::2])

    model = Halved()
    model.block = mixtral.model.layers[0].mlp
    with pytest.raises(MoEAdapterError, match="router of block saw 4 tokens where the model was given 2 × 4"):
        record(model, lambda: model(torch.ones(2, 4)))


def _layer(number: int):
    return pc.field("layer") == number
