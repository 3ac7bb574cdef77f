"""METEOR: nltk's own values, Chinese by hand, and what is said where there is no WordNet."""

from __future__ import annotations

import nltk
import pytest
from nltk.stem.api import StemmerI
from nltk.translate.meteor_score import single_meteor_score

from examples.echovlm import meteor
from examples.echovlm.metrics import TextMetrics

# nltk's documentation of single_meteor_score and meteor_score: 0.6944 and, of the best of three references, 0.7398
HYPOTHESIS = [
    "It",
    "is",
    "a",
    "guide",
    "to",
    "action",
    "which",
    "ensures",
    "that",
    "the",
    "military",
    "always",
    "obeys",
    "the",
    "commands",
    "of",
    "the",
    "party",
]
REFERENCE = [
    "It",
    "is",
    "a",
    "guide",
    "to",
    "action",
    "that",
    "ensures",
    "that",
    "the",
    "military",
    "will",
    "forever",
    "heed",
    "Party",
    "commands",
]


@pytest.fixture(scope="module")
def wordnet() -> None:
    if meteor.wordnet() is None:
        pytest.skip(f"METEOR {meteor.CURE}")


@pytest.mark.usefixtures("wordnet")
def test_it_is_nltks_documented_value() -> None:
    assert meteor.scores([HYPOTHESIS], [REFERENCE]) == [pytest.approx(0.6944, abs=5e-5)]


@pytest.mark.usefixtures("wordnet")
@pytest.mark.parametrize(("answer", "reference"), [("cysts", "cyst"), ("auto", "car"), ("tumor", "tumour")])
def test_stems_and_synonyms_match(answer: str, reference: str) -> None:
    assert meteor.scores([[answer], ["left"]], [[reference], ["right"]]) == [0.5, 0.0]  # one match in one chunk


@pytest.mark.usefixtures("wordnet")
def test_chinese_is_matched_by_character_alone() -> None:
    metrics = TextMetrics()
    [[score, _]] = metrics.sums(["左叶结节14mm"], ["右叶结节14mm"])["METEOR"]
    assert score == pytest.approx(4 / 5 * (1 - 0.5 * (1 / 4) ** 3))  # 4 of 5 tokens in one chunk, P = R

    class Nothing(StemmerI):
        def stem(self, token: str) -> str:
            return token

        def synsets(self, token: str) -> list:
            return []

    texts = [list("结节见于左叶"), list("左叶见低回声结节")]
    exact = single_meteor_score(texts[1], texts[0], stemmer=Nothing(), wordnet=Nothing())
    assert meteor.scores(texts[:1], texts[1:]) == [exact] and exact > 0


@pytest.mark.usefixtures("wordnet")
def test_it_names_its_wordnet() -> None:
    assert "synonyms in WordNet 3." in TextMetrics().described["METEOR"]


def test_without_a_wordnet_it_is_left_out_and_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    monkeypatch.setattr(meteor, "DEBIAN", str(tmp_path))
    monkeypatch.setattr(meteor, "wordnet", meteor.wordnet.__wrapped__)  # past the cache
    metrics = TextMetrics()
    assert "METEOR" not in metrics.described and "nltk.downloader wordnet" in metrics.missing["METEOR"]
    assert set(metrics.sums(["a cyst"], ["a cyst"])) == {"BLEU-1", "ROUGE-1", "ROUGE-L"}
