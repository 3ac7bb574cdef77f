"""Adapters on the Hugging Face Hub: there, back, and nothing of others' touched."""

from __future__ import annotations

import pytest
import torch
import zoo
from local_hub import local_hub
from reference import perturb
from test_adapters import KINDS, logits, trained
from test_card import CARD

from moe_adapter import MoEAdapterError, load_adapter, save_adapter
from moe_adapter.adapters import active_adapter, from_pretrained, push_to_hub


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Directories of adapters by kind, and what a base with that adapter alone answers."""
    folder, answers = tmp_path_factory.mktemp("adapters"), {}
    for kind in ("plain", "with a LoRA"):
        save_adapter(trained(0, **KINDS[kind]), folder / kind)
        answers[kind] = logits(load_adapter(zoo.build("qwen2"), folder / kind))
    return folder, answers


@pytest.mark.parametrize("kind", ["plain", "with a LoRA"])
def test_push_to_the_hub_and_back(saved, kind, tmp_path):
    folder, answers = saved
    model = load_adapter(zoo.build("qwen2"), folder / kind)
    with local_hub(tmp_path / "hub") as hub:
        url = push_to_hub(model, "clinic/thyroid", token="a-token", **CARD)
        assert "/clinic/thyroid/commit/" in url
        fetched = from_pretrained(zoo.build("qwen2"), "clinic/thyroid", cache_dir=tmp_path / "cache")
        assert active_adapter(fetched) == "default"
        assert torch.equal(logits(fetched), answers[kind])

        card = (hub / "clinic" / "thyroid" / "README.md").read_text()
        perturb(model, seed=8)
        push_to_hub(model, "clinic/thyroid", token="a-token")
        assert (hub / "clinic" / "thyroid" / "README.md").read_text() == card, "kept, as nothing new is said"
        assert len(list((hub / "clinic" / "thyroid").glob("weights-*"))) == 1, "the old weights are gone"
        again = from_pretrained(fetched, "clinic/thyroid", "new", cache_dir=tmp_path / "cache")
        assert torch.equal(logits(again), logits(model))


def test_a_push_makes_the_branch_it_names_and_leaves_files_of_others(saved, tmp_path):
    model = load_adapter(zoo.build("qwen2"), saved[0] / "with a LoRA")
    with local_hub(tmp_path / "hub") as hub:
        repo = hub / "clinic" / "thyroid"
        push_to_hub(model, "clinic/thyroid", token="a-token")
        others = [repo / "weights-best.safetensors", repo / "lora-baseline" / "notes.txt"]
        for file in others:
            file.parent.mkdir(exist_ok=True)
            file.write_text("mine")
        perturb(model, seed=8)
        push_to_hub(model, "clinic/thyroid", token="a-token", revision="v2")
        assert (hub / "branches").read_text().split() == ["clinic/thyroid/v2"]
        assert all(file.read_text() == "mine" for file in others)
        assert len(list(repo.glob("weights-*"))) == 2 and len(list(repo.glob("lora-*"))) == 2
        push_to_hub(model, "clinic/thyroid", token="a-token", revision="v2")
        assert (hub / "branches").read_text().split() == ["clinic/thyroid/v2"]


def test_from_pretrained_takes_a_directory_and_refuses_what_is_none(saved, tmp_path):
    model = from_pretrained(zoo.build("qwen2"), saved[0] / "plain", "local")
    assert active_adapter(model) == "local" and torch.equal(logits(model), saved[1]["plain"])
    with pytest.raises(MoEAdapterError, match="no directory here"):
        from_pretrained(model, tmp_path / "nowhere")
    with local_hub(tmp_path), pytest.raises(MoEAdapterError, match="'clinic/none' is no directory here, and no repo"):
        from_pretrained(model, "clinic/none", cache_dir=tmp_path / "cache")
