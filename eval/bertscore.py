"""BERTScore as the mean over sentences of F1 (Zhang et al., ICLR 2020), through the package bert-score.

bert-score 0.3.13 was written for transformers 4. With transformers 5 it fails on an empty sentence and on a tokenizer
without a length limit, and it silently leaves out the space before the first word that RoBERTa's published scores have.
Here the tokenizer is corrected before bert-score gets it, and an empty side scores 0, as bert-score defines.
"""

import contextlib
import hashlib
import io
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minillama.errors import InputError
from minillama.machine import pick_device

BATCH_SIZE = 64  # bert-score's default
FILES = ("*.safetensors", "*.bin", "config.json")  # that the signature of a folder depends on


@dataclass(frozen=True)
class BertScorer:
    """A loaded encoder: `f1` scores sentences, `signature` names the model, its layer, and the software."""

    model: Any
    tokenizer: Any
    signature: str
    device: str
    batch_size: int

    def f1(self, hypotheses: Sequence[str], references: Sequence[str]) -> list[float]:
        """F1 of each sentence, 0 where a side is blank."""
        from bert_score.utils import bert_cos_score_idf

        scores = [0.0] * len(hypotheses)
        pairs = {i: pair for i, pair in enumerate(zip(references, hypotheses)) if all(map(str.strip, pair))}
        if not pairs:
            return scores
        idf: defaultdict[int, float] = defaultdict(lambda: 1.0)  # weights of tokens: all alike, no special ones
        idf |= {self.tokenizer.sep_token_id: 0, self.tokenizer.cls_token_id: 0}
        texts = map(list, zip(*pairs.values()))
        options = {"device": self.device, "batch_size": self.batch_size}
        values = bert_cos_score_idf(self.model, *texts, self.tokenizer, idf, **options)
        for index, value in zip(pairs, values[..., 2].tolist()):
            scores[index] = value
        return scores


def load_bertscorer(
    model: str | None = None,
    layers: int | None = None,
    *,
    target: str | None = None,
    device: str = "auto",
    batch_size: int = BATCH_SIZE,
) -> BertScorer:
    """Load an encoder by name or folder, cut after `layers` layers.

    Without a name it is bert-score's default for the target language (roberta-large for English, multilingual BERT for
    Japanese and German), without `layers` bert-score's default for that name. A folder needs `layers`.
    In bert-score, padding raises negative similarities to 0, so a score depends on the batch size: the signature names
    one that is not bert-score's default.
    Raises InputError if bert-score or the model is missing, or a number does not fit.
    """
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            from bert_score.utils import get_hash, get_model, lang2model, model2layers
    except ImportError as error:
        raise InputError("BERTScore needs the package bert-score: pip install 'collab-mt[bertscore]'") from error
    if model is None:
        if target is None:
            raise InputError("BERTScore needs a model or a target language: give --bertscore-model or --target")
        model = str(lang2model[target.lower().replace("_", "-").split("-")[0]])
    folder = Path(model)
    if not folder.is_dir() and (folder.is_absolute() or model.startswith(".")):
        raise InputError(f"{model}: no such folder, expected an encoder's folder or a name on the hub")
    if layers is None:
        layers = None if folder.is_dir() else model2layers.get(model)
    if layers is None:
        raise InputError(f"{model}: bert-score knows no best layer for it, give --bertscore-layers N")
    if batch_size < 1:
        raise InputError(f"batch size {batch_size}, expected at least 1")
    device = str(pick_device(device))
    from transformers import AutoConfig
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(model)
        tokenizer = _load_tokenizer(model, config)
        depth = getattr(config, "num_hidden_layers", None) or getattr(config, "n_layers", None) or 0
        if not 1 <= layers <= depth:
            raise InputError(
                f"{model}: has {depth} layers, expected --bertscore-layers from 1 to {depth}, found {layers}"
            )
        encoder = get_model(model, layers).float().to(device)
    except InputError:
        raise
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{model}: cannot be loaded as an encoder for BERTScore ({reason[:200]})") from error
    signature = get_hash(folder.resolve().name if folder.is_dir() else model, layers, False, False, False, False)
    if folder.is_dir():
        signature += f"_sha256={_digest(folder)}"
    if batch_size != BATCH_SIZE:
        signature += f"_batch={batch_size}"
    return BertScorer(encoder, tokenizer, signature, device, batch_size)


def _load_tokenizer(model: str, config: Any) -> Any:
    from transformers import AutoTokenizer, GPT2Tokenizer, RobertaTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    if isinstance(tokenizer, (GPT2Tokenizer, RobertaTokenizer)):
        # bert-score requests the space when it encodes; transformers 5 accepts it only here.
        tokenizer = AutoTokenizer.from_pretrained(model, add_prefix_space=True)
    positions = getattr(config, "max_position_embeddings", None)
    if positions and tokenizer.model_max_length > positions:
        # RoBERTa's positions start after its padding index.
        reserved = tokenizer.pad_token_id + 1 if isinstance(tokenizer, RobertaTokenizer) else 0
        tokenizer.model_max_length = positions - reserved
    # Where no limit is known, transformers' own marker overflows in the tokenizer.
    tokenizer.model_max_length = min(tokenizer.model_max_length, 1_000_000)
    return tokenizer


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for pattern in FILES for path in folder.glob(pattern)):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:12]
