"""Generated instances to deduplicate: what the phantoms' reports and questions say, reworded at random."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import count, islice

from examples.echovlm.cases import Case
from examples.echovlm.corpus.deduplication import Instance
from examples.echovlm.phantom import ORGANS
from examples.echovlm.phantom.generate import describe

REWORDED = 0.8  # of a text's words at most; how many is drawn evenly for each instance
LEXICON_CASES = 20  # of each organ


def generated_instances(number: int, seed: int = 0) -> list[Instance]:
    """So many question-answer pairs, a third of the cases Chinese; the same for the same seed."""
    rng = random.Random(seed)
    lexicon = {language: _words(language) for language in ("en", "zh")}
    made = (
        Instance(
            id=f"{name}",
            question=question,
            answer=_reworded(answer, case.language, lexicon, rng),
            language=case.language,
        )
        for name, (case, question, answer) in enumerate(_pairs(seed))
    )
    return list(islice(made, number))


def _pairs(seed: int) -> Iterator[tuple[Case, str, str]]:
    """Every case's questions, each with its answer and the report that it rests on."""
    for case in _cases(seed):
        space = " " if case.language == "en" else ""
        for asked in case.questions:
            yield case, asked.question, space.join((asked.answer, case.findings, case.impression))


def _cases(seed: int) -> Iterator[Case]:
    for number in count():
        for organ in ORGANS:
            yield describe(organ, number, seed=seed, frames=1, split="train")


def _words(language: str) -> list[str]:
    cases = islice(_cases(0), LEXICON_CASES * len(ORGANS))
    return sorted({word for case in cases if case.language == language for word in _split(case.findings, language)})


def _reworded(text: str, language: str, lexicon: dict[str, list[str]], rng: random.Random) -> str:
    """The text with a share of its words replaced, left out, or preceded by a number or another word."""
    share, words = rng.uniform(0, REWORDED), []
    for word in _split(text, language):
        if rng.random() >= share:
            words.append(word)
            continue
        other = rng.choice(lexicon[language])
        words.extend(rng.choice(((other,), (), (other, word), (str(rng.randrange(3, 90)), word))))
    return (" " if language == "en" else "").join(words)


def _split(text: str, language: str) -> list[str]:
    return text.split() if language == "en" else list(text)
