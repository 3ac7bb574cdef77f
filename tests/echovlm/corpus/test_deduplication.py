"""Deduplication drops exactly what comparing every pair drops, in both senses of "duplicate"."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Callable, Sequence
from functools import lru_cache
from hashlib import blake2b

import numpy as np
import pytest
from rapidfuzz.distance import LCSseq
from rapidfuzz.process import cdist
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer

from benchmarks.instances import generated_instances
from examples.echovlm.corpus.deduplication import Deduplicator, Instance, RougeL, SimHash, ordered
from examples.echovlm.corpus.deduplication.errors import DeduplicationError
from examples.echovlm.corpus.deduplication.tokens import DICTIONARY, TOKENIZERS, by_character, by_word
from examples.echovlm.metrics import MixedTokenizer

Found = list[tuple[str, float] | None]
AGAINST = pytest.mark.parametrize("against", ["prior", "kept"])


def found(deduplicator: Deduplicator, instances: Sequence[Instance]) -> Found:
    verdicts = list(deduplicator.verdicts(instances))
    assert [instance for instance, _ in verdicts] == list(instances)
    return [drop and (drop.duplicate_of, drop.score) for _, drop in verdicts]


def brute_force(scores: Callable[[int], np.ndarray], names: Sequence[str], against: str) -> Found:
    """`scores(i)`: of instance i against each before it, NaN where the two are no duplicates."""
    result: Found = []
    for i in range(len(names)):
        row = scores(i)
        hits = [int(j) for j in np.flatnonzero(~np.isnan(row)) if against == "prior" or result[j] is None]
        result.append((names[hits[0]], float(row[hits[0]])) if hits else None)
    return result


def rouge_by_cdist(instances: Sequence[Instance], tokenizer: str, against: str) -> Found:
    tokens = [TOKENIZERS[tokenizer](instance.text) for instance in instances]
    codes: dict[str, int] = {}
    coded = [[codes.setdefault(token, len(codes)) for token in text] for text in tokens]
    size = np.array([len(text) for text in coded])

    def scores(i: int) -> np.ndarray:
        lcs = cdist([coded[i]], coded[:i], scorer=LCSseq.similarity, dtype=np.int32)[0] if i else np.zeros(0, np.int32)
        total = size[i] + size[:i]
        return np.where(20 * lcs > 7 * total, 2 * lcs / np.maximum(total, 1), np.nan)

    return brute_force(scores, [instance.id for instance in instances], against)


def fingerprint(features: Sequence[str]) -> int:
    votes = [0] * 64
    for feature in features:
        digest = int.from_bytes(blake2b(feature.encode(), digest_size=8).digest())
        for bit in range(64):
            votes[bit] += 1 if digest >> bit & 1 else -1
    return sum(1 << bit for bit, vote in enumerate(votes) if vote > 0)


def simhash_by_pairs(instances: Sequence[Instance], measure: SimHash, against: str) -> Found:
    prints = [fingerprint(measure.parts(instance.text)) for instance in instances]

    def scores(i: int) -> np.ndarray:
        distances = np.array([(prints[i] ^ other).bit_count() for other in prints[:i]], dtype=float)
        return np.where(distances <= measure.distance, distances, np.nan)

    return brute_force(scores, [instance.id for instance in instances], against)


@lru_cache
def corpus(number: int) -> tuple[Instance, ...]:
    return tuple(generated_instances(number))


def texts(*answers: str) -> list[Instance]:
    return [Instance(id=str(n), question="", answer=answer, language="en") for n, answer in enumerate(answers)]


def pair_at(lcs: int, m: int, n: int) -> list[Instance]:
    """Two texts of m and n tokens, of which they share this many in order."""
    shared = [f"s{i}" for i in range(lcs)]
    others = ([f"{name}{i}" for i in range(size - lcs)] for name, size in (("a", m), ("b", n)))
    return texts(*(" ".join(shared + own) for own in others))


@AGAINST
@pytest.mark.parametrize("tokenizer", ["character", "jieba"])
def test_rouge_l_equals_every_pair_compared(tokenizer: str, against: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ordered, "CHUNK", 300)
    instances = corpus(2000)
    drops = found(Deduplicator(RougeL(tokenizer=tokenizer), against=against), instances)
    assert drops == rouge_by_cdist(instances, tokenizer, against)
    assert 0.1 < sum(drop is not None for drop in drops) / len(drops) < 0.9


@pytest.mark.slow
@AGAINST
def test_rouge_l_equals_every_pair_compared_of_10k(against: str) -> None:
    instances = corpus(10_000)
    drops = found(Deduplicator(RougeL(), against=against), instances)
    assert drops == rouge_by_cdist(instances, "character", against)


@AGAINST
@pytest.mark.parametrize("longest", [70, 300, 1500])
def test_long_texts_too(longest: int, against: str) -> None:
    """Of few different words, so that the bitmaps are full and the same word comes many times."""
    rng = random.Random(longest)
    answers = ["".join(rng.choices("abcdef ", k=rng.randrange(1, 5 * longest))) for _ in range(60)]
    for _ in range(140):
        words = rng.choice(answers).split()
        answers.append(" ".join(word if rng.random() < 0.8 else "zz" for word in words))
    instances = texts(*answers)
    drops = found(Deduplicator(RougeL(), against=against), instances)
    assert drops == rouge_by_cdist(instances, "character", against)
    assert any(drops)


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.5, 0.95])
def test_other_thresholds(threshold: float) -> None:
    instances = corpus(300)
    scorer = [by_character(instance.text) for instance in instances]

    def scores(i: int) -> np.ndarray:
        f1 = np.array([2 * LCSseq.similarity(scorer[i], other) / (len(scorer[i]) + len(other)) for other in scorer[:i]])
        return np.where(f1 > threshold, f1, np.nan)

    expected = brute_force(scores, [instance.id for instance in instances], "prior")
    assert found(Deduplicator(RougeL(threshold)), instances) == expected


def test_scores_are_those_of_rouge_score() -> None:
    class Ours(Tokenizer):
        def tokenize(self, text: str) -> list[str]:
            return by_character(text)

    scorer = RougeScorer(["rougeL"], tokenizer=Ours())
    instances = corpus(120)
    drops = found(Deduplicator(RougeL()), instances)
    for i, drop in enumerate(drops):
        f1 = [scorer.score(other.text, instances[i].text)["rougeL"].fmeasure for other in instances[:i]]
        first = next((n for n, value in enumerate(f1) if value > 0.7 + 1e-9), None)
        assert drop == (None if first is None else (instances[first].id, pytest.approx(f1[first])))
    assert any(drops)


@pytest.mark.parametrize(
    ("lcs", "m", "n"), [(7 * k, 10 * k - d, 10 * k + d) for k in (1, 2, 3, 5, 8) for d in range(3 * k + 1)]
)
def test_a_pair_at_the_threshold_is_kept_and_one_token_more_is_not(lcs: int, m: int, n: int) -> None:
    assert found(Deduplicator(RougeL()), pair_at(lcs, m, n)) == [None, None]
    if lcs < m:
        assert found(Deduplicator(RougeL()), pair_at(lcs + 1, m, n)) == [None, ("0", 2 * (lcs + 1) / (m + n))]


def test_any_prior_and_any_kept_differ_and_name_the_earliest() -> None:
    a = "one two three four five six seven eight nine ten"
    b = a.replace("one", "x").replace("two", "y")  # 0.8 of a
    c = b.replace("three", "z").replace("four", "w")  # 0.8 of b, 0.6 of a
    assert found(Deduplicator(RougeL(), against="prior"), texts(a, b, c)) == [None, ("0", 0.8), ("1", 0.8)]
    assert found(Deduplicator(RougeL(), against="kept"), texts(a, b, c)) == [None, ("0", 0.8), None]
    assert found(Deduplicator(RougeL(), against="kept"), texts(b, a, c)) == [None, ("0", 0.8), ("0", 0.8)]


def test_an_answer_counts_as_well_as_a_question() -> None:
    question = "What does the frame of the left breast show to the reader?"
    one, two = (Instance(id=a, question=question, answer=a * 30, language="en") for a in ("yes ", "no "))
    assert found(Deduplicator(RougeL()), [one, two]) == [None, None]


@pytest.mark.parametrize("tokenizer", ["character", "jieba"])
@pytest.mark.parametrize(("measure", "identical"), [(RougeL, 1.0), (SimHash, 0)])
def test_texts_without_tokens_are_kept_and_identical_ones_are_not(measure: type, identical: float, tokenizer) -> None:
    finding = "甲状腺左叶见低回声结节"
    instances = texts("", "?", "。", finding + "。", "", finding, finding + "。")
    deduplicator = Deduplicator(measure(tokenizer=tokenizer))
    assert found(deduplicator, instances) == [*[None] * 5, ("3", identical), ("3", identical)]
    assert deduplicator.without_tokens == 4


def test_a_file_of_nothing_but_texts_without_tokens() -> None:
    assert found(Deduplicator(RougeL()), texts("", "")) == [None, None] and found(Deduplicator(RougeL()), []) == []


@AGAINST
@pytest.mark.parametrize("features", ["word-1", "word-2", "char-4"])
def test_simhash_equals_every_pair_compared(features: str, against: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ordered, "CHUNK", 300)
    instances = corpus(1000)
    measure = SimHash(features=features, distance=3 if features == "word-1" else 8)
    drops = found(Deduplicator(measure, against=against), instances)
    assert drops == simhash_by_pairs(instances, measure, against)
    assert any(drops)


@pytest.mark.slow
def test_simhash_equals_every_pair_compared_of_10k() -> None:
    instances, measure = corpus(10_000), SimHash()
    assert found(Deduplicator(measure), instances) == simhash_by_pairs(instances, measure, "prior")


@AGAINST
@pytest.mark.parametrize("measure", [RougeL, SimHash])
def test_neither_chunks_nor_batches_change_a_verdict(
    measure: type, against: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    instances = corpus(1200)
    whole = found(Deduplicator(measure(), against=against), instances)
    for chunk in (1, 97, 400):
        monkeypatch.setattr(ordered, "CHUNK", chunk)
        deduplicator = Deduplicator(measure(), against=against)
        count = 200 if chunk == 1 else len(instances)
        first = found(deduplicator, instances[: count // 3])
        assert first + found(deduplicator, instances[count // 3 : count]) == whole[:count]


@AGAINST
def test_memory_is_linear(against: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All alike, so that there are as many pairs as there can be."""
    monkeypatch.setattr(ordered, "CHUNK", 64)

    def peak(number: int) -> int:
        answers = texts(*(f"the liver is of normal size and even echotexture number {n}" for n in range(number)))
        tracemalloc.start()
        assert sum(drop is None for drop in found(Deduplicator(RougeL(), against=against), answers)) == 1
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    peak(100)
    assert peak(4000) < 5 * peak(1000)


def test_character_tokens_are_those_that_answers_are_scored_by() -> None:
    for instance in corpus(200):
        assert by_character(instance.text) == MixedTokenizer().tokenize(instance.text)


def test_tokens_of_both_scripts() -> None:
    assert by_character("左叶见１４㎜ Hypo-Echoic结节。") == ["左", "叶", "见", "14mm", "hypo", "echoic", "结", "节"]
    assert by_word("左叶见１４㎜ 低回声结节。")[-3:] == ["14mm", "低回声", "结节"]


def test_every_word_of_the_ultrasound_dictionary_is_one_token() -> None:
    words = DICTIONARY.read_text(encoding="utf-8").split()
    assert len(words) == len(set(words)) > 100
    assert [by_word(word) for word in words] == [[word] for word in words]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RougeL(0), "threshold: got 0; expected an F1 between 0 and 1"),
        (lambda: RougeL(1.0), "threshold: got 1.0"),
        (lambda: RougeL(float("nan")), "threshold: got nan"),
        (lambda: RougeL(tokenizer="bert"), "tokenizer: got 'bert'; expected one of character, jieba"),
        (lambda: SimHash(distance=64), "distance: got 64; expected a number of bits from 0 to 63"),
        (lambda: SimHash(features="word"), "features: got 'word'; expected word-N or char-N"),
        (lambda: Deduplicator(RougeL(), against="all"), "against: got 'all'; expected one of prior, kept"),
    ],
)
def test_settings_that_cannot_be_used(make: Callable[[], object], message: str) -> None:
    with pytest.raises(DeduplicationError, match=message):
        make()


def test_an_id_that_came_before_changes_nothing() -> None:
    one, two = texts("the liver is normal", "no stone is seen in the kidney")
    deduplicator = Deduplicator(RougeL())
    with pytest.raises(DeduplicationError, match="got '0', which came before; expected ids that occur once"):
        found(deduplicator, [one, two, one])
    assert found(deduplicator, [one, two]) == [None, None]
    with pytest.raises(DeduplicationError, match="got '1', which came before"):
        found(deduplicator, [two])
