"""Model cards: what is read off an adapter's files, what its author says, and no more."""

from __future__ import annotations

import zoo
from huggingface_hub import ModelCard
from test_adapters import SIZES, trained

from moe_adapter import dual_path_layers, inject_dual_path_moe, save_adapter
from moe_adapter.adapters import write_card

CARD = dict(
    training_data="1,204 thyroid cases of two hospitals, 2019 to 2023",
    metrics={"BLEU-1": 41.2, "ROUGE-L": 0.53},
    language=["en", "zh"],
    license="apache-2.0",
)


def test_a_model_card_says_what_the_adapter_is(tmp_path):
    model = trained(0, lora={})
    model.get_base_model().config._name_or_path = "Qwen/Qwen2-0.5B"
    save_adapter(model, tmp_path)
    card = ModelCard.load(write_card(tmp_path, **CARD))
    assert card.data.base_model == "Qwen/Qwen2-0.5B" and card.data.library_name == "moe-adapter"
    assert card.data.language == ["en", "zh"] and card.data.license == "apache-2.0"
    new = sum(p.numel() for layer in dual_path_layers(model).values() for p in layer.new_parameters().values())
    base = sum(p.numel() for p in zoo.build("qwen2").parameters())
    lora = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    for count in (new, base, lora, new + base + lora):
        assert f"| {count:,} |" in card.text
    assert CARD["training_data"] in card.text and "| BLEU-1 | 41.2 |" in card.text
    assert "| expert_dim | `16` |" in card.text
    results = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert results == CARD["metrics"] and "Not stated" in card.data.eval_results[0].dataset_name


def test_a_card_names_what_was_measured_and_its_tables_hold(tmp_path):
    save_adapter(trained(0), tmp_path)
    card = ModelCard.load(write_card(tmp_path, metrics={"recall | at 1\n": 0.5}, dataset="200 held-out cases"))
    assert r"| recall \| at 1 | 0.5 |" in card.text and "On 200 held-out cases:" in card.text
    assert card.data.eval_results[0].dataset_name == "200 held-out cases"


def test_a_card_states_no_more_than_is_known_and_outlives_the_next_save(tmp_path):
    save_adapter(trained(0), tmp_path)
    card = write_card(tmp_path).read_text()
    assert card.count("Not stated by the author.") == 2 and "base_model" not in card
    save_adapter(trained(1), tmp_path)
    assert (tmp_path / "README.md").read_text() == card
    assert len(list(tmp_path.iterdir())) == 3


def test_the_card_of_a_local_base_tells_no_path(tmp_path):
    zoo.build("qwen2").save_pretrained(tmp_path / "my-base")
    model = inject_dual_path_moe(type(zoo.build("qwen2")).from_pretrained(tmp_path / "my-base"), **SIZES)
    save_adapter(model, tmp_path / "adapter")
    assert "base_model: my-base" in write_card(tmp_path / "adapter").read_text()
    assert str(tmp_path) not in "".join(file.read_text() for file in (tmp_path / "adapter").glob("*.[jm]*"))
