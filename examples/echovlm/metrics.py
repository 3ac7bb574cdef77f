"""BLEU-1, ROUGE-1, ROUGE-L, METEOR and BERTScore of English and Chinese answers, each by its reference implementation.

A metric gives each of N answers a row of S sums, which add up to those of any group of answers: so BLEU-1, a score of
a whole corpus, can be taken anew of every bootstrap resample. `corpus_score` makes the score of the sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import version

import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer
from sacrebleu.metrics import BLEU

from examples.echovlm import bertscore, meteor
from examples.echovlm.config import BertScoreConfig
from examples.echovlm.corpus.deduplication.tokens import by_character

WORDS = "lower-cased words of a-z and 0-9, a token per Chinese character, after NFKC"


class MixedTokenizer(Tokenizer):
    """rouge-score's own words for Latin script, and a token per Chinese character, which it would drop."""

    def tokenize(self, text: str) -> list[str]:
        return by_character(text)


class TextMetrics:
    """The text metrics that can be computed here.

    `described`: of each its implementation, tokenizer and setting; `missing`: of each other one what it lacks.
    """

    def __init__(self, encoder: BertScoreConfig | None = None) -> None:
        """`encoder`: BERTScore's. Raises: MoEAdapterError if it cannot be used."""
        self.described = {
            "BLEU-1": f"sacrebleu {version('sacrebleu')}, corpus BLEU of order 1, tokenize='zh': 13a for Latin script, "
            "a token per Chinese character",
            "ROUGE-1": f"rouge-score {version('rouge-score')}, mean F1; {WORDS}",
            "ROUGE-L": f"rouge-score {version('rouge-score')}, mean F1 of the longest common subsequence; {WORDS}",
        }
        self.missing: dict[str, str] = {}
        self._others: dict[str, Callable[[Sequence[str], Sequence[str]], list[float]]] = {}
        if meteor.wordnet() is None:
            self.missing["METEOR"] = meteor.CURE
        else:
            self.described["METEOR"] = f"{meteor.description()}; {WORDS}"
            self._others["METEOR"] = lambda answers, references: meteor.scores(
                *([MixedTokenizer().tokenize(text) for text in texts] for texts in (answers, references))
            )
        if encoder is None:
            self.missing["BERTScore"] = bertscore.CURE
        else:
            scorer = bertscore.Scorer(encoder)
            self.described[scorer.name] = scorer.description
            self._others[scorer.name] = scorer

    def sums(self, answers: Sequence[str], references: Sequence[str]) -> dict[str, np.ndarray]:
        """Sums (N, S) of each metric: for BLEU-1 hits, length and reference's length, else score (0 to 1) and 1."""
        rouge = RougeScorer(["rouge1", "rougeL"], tokenizer=MixedTokenizer())
        pairs = [rouge.score(reference, answer) for answer, reference in zip(answers, references, strict=True)]
        rouge1, rouge_l = ([pair[name].fmeasure for pair in pairs] for name in ("rouge1", "rougeL"))
        # A common subsequence is a set of common words; the paper's Table 2 has it otherwise.
        assert all(longest <= words + 1e-12 for longest, words in zip(rouge_l, rouge1, strict=True))
        means = {"ROUGE-1": rouge1, "ROUGE-L": rouge_l}
        means |= {name: score(answers, references) for name, score in self._others.items()}
        return {"BLEU-1": _bleu(answers, references)} | {
            name: np.stack([np.array(values, float), np.ones(len(answers))], axis=1) for name, values in means.items()
        }


def corpus_score(name: str, sums: np.ndarray) -> np.ndarray:
    """The score, 0 to 100, of answers with the summed-up sums (…, S); NaN where nothing was counted.

    Source: BLEU of order 1, Papineni et al. (2002), as sacrebleu has it; anything else is a ratio of two sums.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        if name != "BLEU-1":
            return 100 * sums[..., 0] / sums[..., 1]
        hits, length, reference = np.moveaxis(sums, -1, 0)
        brevity = np.exp(np.minimum(0, 1 - reference / length))
        return np.where(length > 0, 100 * brevity * hits / length, 0.0)


def _bleu(answers: Sequence[str], references: Sequence[str]) -> np.ndarray:
    bleu = BLEU(tokenize="zh", max_ngram_order=1, effective_order=True)
    scores = [bleu.sentence_score(answer, [reference]) for answer, reference in zip(answers, references, strict=True)]
    return np.array([(score.counts[0], score.sys_len, score.ref_len) for score in scores], float)
