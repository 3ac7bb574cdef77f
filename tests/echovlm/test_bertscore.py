"""BERTScore against its definition in float64, and when it calls itself a stand-in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from echovlm.recipe_parts import TEXTS, write_encoder
from transformers import AutoModel, AutoTokenizer

from examples.echovlm.bertscore import Scorer
from examples.echovlm.config import BertScoreConfig
from examples.echovlm.stand_in import stand_in
from moe_adapter import MoEAdapterError

ANSWERS = ["a cyst is seen in the left lobe", "圆形囊肿", "", "mm mm"]
REFERENCES = [*TEXTS, "a cyst", "  "]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoders") / "mine")


def _f1(encoder: Path, layer: int, answer: str, reference: str) -> float:
    """Zhang et al. (2020), section 3: greedy matching by cosine; [CLS] and [SEP] are matched but not counted."""
    model = AutoModel.from_pretrained(encoder).double().eval()
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    with torch.no_grad():
        states = [
            model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states[layer][0]
            for text in (answer, reference)
        ]
    a, b = (torch.nn.functional.normalize(state, dim=-1) for state in states)
    cosine = a @ b.T
    precision, recall = cosine.max(1).values[1:-1].mean(), cosine.max(0).values[1:-1].mean()
    return float(2 * precision * recall / (precision + recall))


@pytest.mark.parametrize("layer", [2, 3])
def test_it_is_the_definition_at_the_named_layer(encoder: Path, layer: int) -> None:
    found = Scorer(BertScoreConfig(encoder=str(encoder), num_layers=layer))(ANSWERS, REFERENCES)
    expected = [_f1(encoder, layer, *pair) for pair in zip(ANSWERS[:2], REFERENCES[:2], strict=True)]
    assert found == [pytest.approx(expected[0], abs=1e-5), pytest.approx(expected[1], abs=1e-5), 0.0, 0.0]


def test_nothing_to_score_loads_nothing(encoder: Path) -> None:
    assert Scorer(BertScoreConfig(encoder=str(encoder), num_layers=1))(["", " "], ["a", "b"]) == [0.0, 0.0]


def test_another_encoder_is_marked_as_not_comparable(encoder: Path, tmp_path: Path) -> None:
    unknown = Scorer(BertScoreConfig(encoder=str(encoder), num_layers=2))
    assert unknown.name == "BERTScore (stand-in)" and "NOT COMPARABLE" in unknown.description
    for text in ("encoder mine", "layer 2 of 3", "no idf", "not rescaled", "bert-score 0.3"):
        assert text in unknown.description
    chosen = write_encoder(tmp_path / "bert-base-chinese", layers=9)  # bert-score's authors: its layer 8
    known = Scorer(BertScoreConfig(encoder=str(chosen)))
    assert (known.name, known.layer) == ("BERTScore", 8) and "COMPARABLE" not in known.description
    assert Scorer(BertScoreConfig(encoder=str(chosen), num_layers=7)).name == "BERTScore (stand-in)"


def test_a_layer_that_is_not_known_or_not_there_is_refused(encoder: Path) -> None:
    with pytest.raises(MoEAdapterError, match=r"num_layers: got none for mine, .* does not know; expected 1 to 3"):
        Scorer(BertScoreConfig(encoder=str(encoder)))
    with pytest.raises(MoEAdapterError, match=r"num_layers: got 4 for mine"):
        Scorer(BertScoreConfig(encoder=str(encoder), num_layers=4))


def test_a_tokenizer_without_a_limit_is_refused(tmp_path: Path) -> None:
    folder = write_encoder(tmp_path / "endless")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["model_max_length"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(MoEAdapterError, match=r"a tokenizer without a limit .*; expected model_max_length"):
        Scorer(BertScoreConfig(encoder=str(folder), num_layers=2))


def test_the_grids_own_stand_in_is_marked_and_made_once(tmp_path: Path) -> None:
    config = stand_in(tmp_path / "encoder", seed=0, steps=10)
    file = tmp_path / "encoder" / "model.safetensors"
    weights = file.read_bytes()
    assert stand_in(tmp_path / "encoder", seed=1, steps=1) == config and file.read_bytes() == weights
    assert [path.name for path in tmp_path.iterdir()] == ["encoder"]
    scorer = Scorer(config)
    assert scorer.name == "BERTScore (stand-in)" and "NOT COMPARABLE" in scorer.description
    said, other = "A hypoechoic nodule of 12 mm is seen in the left lobe.", "Use the yield expression in a generator."
    near, far = scorer([said] * 2, ["The left lobe shows a hypoechoic nodule of 11 mm.", other])
    assert near > far
    assert scorer(["甲状腺左叶见低回声结节。"], ["甲状腺左叶见低回声结节。"])[0] > 0.999
