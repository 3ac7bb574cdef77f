"""BLEU-1, ROUGE-1 and ROUGE-L for English and Chinese, each by its reference implementation."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer
from sacrebleu.metrics import BLEU

from examples.echovlm.cases import Case
from examples.echovlm.findings import parse_findings

METRICS = ("BLEU-1", "ROUGE-1", "ROUGE-L")
IMPLEMENTATIONS = (
    "BLEU-1: sacrebleu corpus BLEU, max_ngram_order=1, tokenize='zh' (13a for Latin script, a token per Chinese "
    "character). ROUGE-1, ROUGE-L: rouge-score, mean F1, lower-cased words of a-z and 0-9, a token per Chinese "
    "character. All times 100."
)
_TOKEN = re.compile(r"[a-z0-9]+|[\u3400-\u9fff]")


class MixedTokenizer(Tokenizer):
    """rouge-score's own words for Latin script, and a token per Chinese character, which it would drop."""

    def tokenize(self, text: str) -> list[str]:
        return _TOKEN.findall(text.lower())


def text_scores(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """The three scores, 0 to 100, of a group of answers (a corpus) against one reference each."""
    rouge = RougeScorer(["rouge1", "rougeL"], tokenizer=MixedTokenizer())
    pairs = [rouge.score(reference, answer) for answer, reference in zip(answers, references, strict=True)]
    bleu = BLEU(tokenize="zh", max_ngram_order=1).corpus_score(list(answers), [list(references)])
    mean_f1 = {name: 100 * sum(pair[name].fmeasure for pair in pairs) / len(pairs) for name in ("rouge1", "rougeL")}
    return {"BLEU-1": bleu.score, "ROUGE-1": mean_f1["rouge1"], "ROUGE-L": mean_f1["rougeL"]}


def finding_accuracy(answers: Sequence[str], cases: Sequence[Case]) -> float | None:
    """Per cent of the attributes known of the cases that the answers state with the right value.

    A wrong value and a missing one count alike. Cases without attributes are passed over; None if none has any.
    """
    stated = [parse_findings(answer, case.organ, case.language) for answer, case in zip(answers, cases, strict=True)]
    hits = [
        found.get(name) == value
        for found, case in zip(stated, cases, strict=True)
        for name, value in case.attributes.items()
    ]
    return 100 * sum(hits) / len(hits) if hits else None
