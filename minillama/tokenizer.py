"""Text to token ids and back, from each of the three file formats of Llama tokenizers.

`tokenizer.json` (tokenizers), Meta's tiktoken ranks and sentencepiece's protobuf; the last two are both named
`tokenizer.model`. The libraries do the work; here control tokens are kept out of user text, and vocabularies compared.
"""

import base64
import json
import re
import shutil
from collections.abc import Sequence
from functools import cache
from itertools import count, pairwise
from pathlib import Path
from typing import Any

from minillama.errors import InputError
from minillama.files import resolve_folder

# Published with Llama 3 (github.com/meta-llama/llama-models, llama3/tokenizer.py).
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_NAMED = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    5: "<|step_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
    11: "<|image|>",
}
LLAMA3_CONTROL_TOKENS = 256
RESERVED = b"reserved_special_token"
# Longer runs of spaces or of non-spaces overflow tiktoken's regular expression; Meta's tokenizer has the same limits.
TIKTOKEN_MAX_RUN = 25_000
TIKTOKEN_MAX_TEXT = 400_000


class Tokenizer:
    """`Tokenizer.from_pretrained(DIR)`; `encode` adds no control tokens and never returns one for user text."""

    def __init__(self, backend: "Backend", files: Sequence[Path] = ()) -> None:
        self._backend = backend
        self._files = list(files)
        self.specials = backend.specials
        self._control = frozenset(backend.specials.values())

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Tokenizer":
        """Load the tokenizer of a folder or hub id; raises InputError where there is none or it is damaged."""
        folder = resolve_folder(folder)
        found = [path for name in ("tokenizer.json", "tokenizer.model") if (path := folder / name).exists()]
        if not found:
            raise InputError(f"{folder}: no tokenizer.json and no tokenizer.model")
        others = (folder / name for name in ("tokenizer_config.json", "special_tokens_map.json"))
        return cls(_open_backend(found[0]), [*found, *(path for path in others if path.exists())])

    def encode(self, text: str) -> list[int]:
        # Lone surrogates are not valid UTF-8; they become U+FFFD.
        return self._backend.encode(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; control tokens and ids without an entry are left out, invalid UTF-8 becomes U+FFFD."""
        return self._backend.decode([token for token in ids if token in self.pieces() and token not in self._control])

    def special(self, name: str) -> int | None:
        """Id of a control token such as `<|eot_id|>`, or None."""
        return self.specials.get(name)

    def pieces(self) -> dict[int, bytes]:
        """Every id's bytes, which need not be whole characters; a control token's are its name."""
        return self._backend.pieces

    def __len__(self) -> int:
        """One more than the largest id."""
        return max(self.pieces(), default=-1) + 1

    def differences(self, other: "Tokenizer") -> list[str]:
        """Return a line for every id whose entries differ; empty where the vocabularies are equal.

        Entries are compared as bytes, so the same vocabulary in two file formats is equal. A control token is equal to
        one that the other vocabulary only reserves (`<|reserved_special_token_3|>`).
        """
        found = []
        for token in sorted(self.pieces().keys() | other.pieces().keys()):
            mine, others = self.pieces().get(token), other.pieces().get(token)
            if mine != others and not any(RESERVED in (piece or b"") for piece in (mine, others)):
                found.append(f"{token}: {_show(mine)} against {_show(others)}")
        return found

    def save(self, folder: Path) -> None:
        """Copy the files that this tokenizer was loaded from."""
        for file in self._files:
            shutil.copyfile(file, folder / file.name)


def _show(piece: bytes | None) -> str:
    return "nothing" if piece is None else repr(piece.decode("utf-8", errors="backslashreplace"))


def _open_backend(path: Path) -> "Backend":
    try:
        if path.name == "tokenizer.json":
            return JsonBackend(path)
        return SentencePieceBackend(path) if path.read_bytes()[:1] == b"\n" else TiktokenBackend(path)
    except InputError:
        raise
    except Exception as error:
        reason = str(error).split("\n")[0] or type(error).__name__
        raise InputError(f"{path}: not a tokenizer that can be read ({reason})") from None


class JsonBackend:
    """`tokenizer.json`, by Hugging Face's tokenizers."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as HuggingFaceTokenizer

        self._tokenizer = HuggingFaceTokenizer.from_file(str(path))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Otherwise `<|eot_id|>` in a user's text would become the control token.
        self._tokenizer.encode_special_tokens = True
        added = self._tokenizer.get_added_tokens_decoder()
        self.specials = {token.content: index for index, token in added.items() if token.special}
        written = json.loads(self._tokenizer.to_str())
        unknown = written["model"].get("unk_token")
        self._control = frozenset(index for name, index in self.specials.items() if name != unknown)
        to_bytes = _byte_level_bytes if '"ByteLevel"' in json.dumps(written.get("decoder")) else _sentencepiece_bytes
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=False)
        self.pieces = {index: to_bytes(piece) for piece, index in vocabulary.items()}
        self.pieces |= {index: token.content.encode() for index, token in added.items()}

    def encode(self, text: str) -> list[int]:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        if self._control.isdisjoint(encoding.ids):
            return encoding.ids
        # A vocabulary may have control tokens among its words and find them in a text: split the text inside them.
        spans = [span for token, span in zip(encoding.ids, encoding.offsets) if token in self._control]
        cuts = [start + 1 for start, end in spans if end > start + 1]
        if not cuts:
            return [token for token in encoding.ids if token not in self._control]
        return [token for first, last in pairwise([0, *cuts, len(text)]) for token in self.encode(text[first:last])]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)


class TiktokenBackend:
    """Meta's Llama 3 `tokenizer.model`: base64 ranks, followed by 256 control tokens."""

    def __init__(self, path: Path) -> None:
        import tiktoken

        ranks = {}
        for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
            if line:
                try:
                    piece, rank = line.split()
                    ranks[base64.b64decode(piece, validate=True)] = int(rank)
                except ValueError:
                    raise InputError(f"{path}:{number}: expected a base64 piece and its rank") from None
        if sorted(ranks.values()) != list(range(len(ranks))) or not all(bytes([byte]) in ranks for byte in range(256)):
            raise InputError(f"{path}: expected ranks 0, 1, 2, ... and all 256 bytes among the pieces")
        reserved = (f"<|reserved_special_token_{number}|>" for number in count())
        names = [LLAMA3_NAMED.get(index) or next(reserved) for index in range(LLAMA3_CONTROL_TOKENS)]
        self.specials = {name: len(ranks) + index for index, name in enumerate(names)}
        self._encoding = tiktoken.Encoding(
            path.name, pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens=self.specials
        )
        self.pieces = {rank: piece for piece, rank in ranks.items()}
        self.pieces |= {index: name.encode() for name, index in self.specials.items()}

    def encode(self, text: str) -> list[int]:
        if len(text) < TIKTOKEN_MAX_RUN:
            return self._encoding.encode_ordinary(text)
        return [token for piece in _cut_long_runs(text) for token in self._encoding.encode_ordinary(piece)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._encoding.decode(list(ids))


class SentencePieceBackend:
    """Llama 1 and 2 style `tokenizer.model`."""

    def __init__(self, path: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        self._processor: Any = SentencePieceProcessor(model_file=str(path))
        ids = range(self._processor.get_piece_size())
        names = {i: self._processor.id_to_piece(i) for i in ids}
        self.pieces = {i: _sentencepiece_bytes(name) for i, name in names.items()}
        self.specials = {names[i]: i for i in ids if self._processor.is_control(i) or self._processor.is_unknown(i)}

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode(list(ids))


# One class per file format: `pieces` are every id's bytes, `specials` the ids of control tokens by name.
Backend = JsonBackend | TiktokenBackend | SentencePieceBackend


def _cut_long_runs(text: str) -> list[str]:
    """Split as Meta does: blocks of 400,000 characters, in them runs of at most 25,000 spaces or non-spaces."""
    pieces = []
    for offset in range(0, len(text), TIKTOKEN_MAX_TEXT):
        block = text[offset : offset + TIKTOKEN_MAX_TEXT]
        runs = re.finditer(r"\s+|\S+", block)
        cuts = [cut for run in runs for cut in range(run.start() + TIKTOKEN_MAX_RUN, run.end(), TIKTOKEN_MAX_RUN)]
        pieces += [block[first:last] for first, last in pairwise([0, *cuts, len(block)])]
    return pieces


@cache
def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable character for each of the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _byte_level_bytes(piece: str) -> bytes:
    alphabet = _byte_level_alphabet()
    return bytes(alphabet[character] for character in piece) if alphabet.keys() >= set(piece) else piece.encode()


def _sentencepiece_bytes(piece: str) -> bytes:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("\u2581", " ").encode()
