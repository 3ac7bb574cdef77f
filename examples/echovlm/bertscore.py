"""BERTScore by bert-score, with an encoder from a folder on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer

from examples.echovlm.config import BertScoreConfig
from moe_adapter.errors import MoEAdapterError

CURE = (
    "needs an encoder, such as bert-base-multilingual-cased: `evaluation: {bertscore: {encoder: FOLDER}}` in the preset"
)
LONGEST = 10**6  # tokens; a tokenizer that was told no limit has one beyond any text's


class Scorer:
    """BERTScore F1 of answers, not rescaled, without idf weights.

    `name`: "BERTScore" of an encoder and layer that bert-score's authors chose, which a folder's name tells; of any
    other "BERTScore (stand-in)". `description`: encoder, layer and the rest of the setting.
    """

    def __init__(self, config: BertScoreConfig) -> None:
        """Raises: MoEAdapterError if the folder's encoder has no such layer, or no layer is named."""
        from bert_score.utils import model2layers

        self.folder = config.encoder
        encoder = Path(config.encoder).resolve().name
        chosen = {name.rpartition("/")[2]: layer for name, layer in model2layers.items()}.get(encoder)
        self.layer = config.num_layers or chosen or 0
        try:
            layers = AutoConfig.from_pretrained(config.encoder).num_hidden_layers
        except (OSError, ValueError) as error:
            raise MoEAdapterError(
                f"evaluation.bertscore.encoder: got {config.encoder}, expected what save_pretrained leaves of one: "
                f"{str(error).splitlines()[0]}"
            ) from None
        if not 1 <= self.layer <= layers:
            raise MoEAdapterError(
                f"evaluation.bertscore.num_layers: got {config.num_layers or 'none'} for {encoder}, which bert-score "
                f"{'knows' if chosen else 'does not know'}; expected 1 to {layers}, the layer whose states are compared"
            )
        if AutoTokenizer.from_pretrained(config.encoder).model_max_length > LONGEST:
            raise MoEAdapterError(
                f"evaluation.bertscore.encoder: got a tokenizer without a limit in {config.encoder}; expected "
                "model_max_length in its tokenizer_config.json, the most tokens that the encoder takes; add it"
            )
        stand_in = self.layer != chosen
        self.name = "BERTScore (stand-in)" if stand_in else "BERTScore"
        self.description = (
            f"bert-score {version('bert-score')}, mean F1, encoder {encoder}, layer {self.layer} of {layers}, its own "
            "tokenizer, no idf, not rescaled; blind to negation"
            + ("; a stand-in encoder: NOT COMPARABLE with any published BERTScore" if stand_in else "")
        )

    def __call__(self, answers: Sequence[str], references: Sequence[str]) -> list[float]:
        """F1 of each answer against its reference; 0 where either is empty. The encoder is loaded for the call only."""
        import bert_score

        full = [i for i, pair in enumerate(zip(answers, references, strict=True)) if all(map(str.strip, pair))]
        values = [0.0] * len(answers)
        if full:
            texts = [[side[i] for i in full] for side in (answers, references)]
            _, _, f1 = bert_score.score(*texts, model_type=self.folder, num_layers=self.layer)
            for i, value in zip(full, f1.tolist(), strict=True):
                values[i] = value
        return values
