"""From model folders to an ensemble that reads text: tokenizers, chat formats, prompts, then weights.

Everything cheap is opened and checked first, so that bad input is refused before a weight is read.
"""

import time
from collections.abc import Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from corpora import Prompt
from decode.engine.ensemble import Ensemble
from decode.model.packed_llama import PreparedLlama
from decode.pipeline.placement import Place
from decode.pipeline.vocabulary import check_shared
from decode.search_options import SearchOptions
from minillama import InputError, Llama, Tokenizer
from minillama.chat import ChatFormat, chat_format, render, stop_tokens
from minillama.files import resolve_folder
from minillama.tensor_parallel import TPGroup, load_shard
from minillama.weights import Checkpoint, open_folder

PROMPT_FILE = "prompt.toml"
TOO_LONG = ("error", "truncate", "skip")


@dataclass(frozen=True)
class Options(SearchOptions):
    """How sentences are read and decoded. Languages are codes such as `ja`. explain: say why each token was chosen."""

    source: str
    target: str
    max_new_tokens: int = 256
    batch_size: int = 16
    too_long: str = "error"
    speculate: str = "off"
    explain: bool = False


@dataclass(frozen=True)
class Reader:
    """How one member reads a sentence: its tokenizer, chat format, prompt and context."""

    name: str
    folder: Path
    checkpoint: Checkpoint
    tokenizer: Tokenizer
    chat: ChatFormat
    prompt: Prompt

    @property
    def context(self) -> int:
        return self.checkpoint.config.max_position_embeddings

    def encode(self, sentence: str, source: str, target: str) -> list[int]:
        messages = self.prompt.messages(sentence, source, target)
        return render(messages, self.chat, self.tokenizer, self.checkpoint.config.bos_token_id)


@dataclass(frozen=True)
class Sentences:
    """A group of `count` lines, ready to decode: prompts and their 0-based lines; `empty` lines have none.

    A skipped line is too long and empty, a truncated one too long and shortened. `texts` are all of the group as they
    were given, the first of them that of line `first`.
    """

    count: int
    lines: list[int]
    prompts: list[tuple[list[int], ...]]
    empty: list[int]
    skipped: list[int]
    truncated: list[int]
    texts: Sequence[str] = ()
    first: int = 0

    def text(self, line: int) -> str:
        return self.texts[line - self.first]

    def waiting(self, done: Set[int]) -> tuple[list[int], list[tuple[list[int], ...]]]:
        """Lines and prompts of what is not done yet."""
        left = [number for number, line in enumerate(self.lines) if line not in done]
        return [self.lines[number] for number in left], [self.prompts[number] for number in left]


def open_readers(
    folders: Mapping[str, str], prompts: Mapping[str, str | None] | None, chats: Mapping[str, str | None] | None
) -> list[Reader]:
    """Open every member's folder; without a prompt named for it a member uses its folder's, or the paper's.

    Raises InputError for what cannot be run and for vocabularies that differ.
    """
    readers = []
    opened: dict[Path, tuple[Checkpoint, Tokenizer]] = {}
    for name, spec in folders.items():
        folder = resolve_folder(spec).resolve()
        if folder not in opened:
            opened[folder] = (open_folder(folder), Tokenizer.from_pretrained(folder))
        checkpoint, tokenizer = opened[folder]
        size = checkpoint.config.vocab_size
        if len(tokenizer) > size:
            raise InputError(f"{folder}: the tokenizer has {len(tokenizer):,} entries, the model only {size:,}")
        wanted = prompts.get(name) if prompts else None
        prompt = Prompt.load(wanted or (folder if (folder / PROMPT_FILE).exists() else "paper"))
        chat = chat_format((chats.get(name) if chats else None) or prompt.chat, tokenizer)
        readers.append(Reader(name, folder, checkpoint, tokenizer, chat, prompt))
    check_shared({reader.name: reader.tokenizer for reader in readers})
    sizes = {reader.name: reader.checkpoint.config.vocab_size for reader in readers}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
        raise InputError(f"the models' vocabularies differ in size: {listed}")
    return readers


def load_ensemble(
    readers: Sequence[Reader],
    weights: Mapping[str, float],
    places: Mapping[str, Place],
    invariant: bool | None = None,
    part: TPGroup | None = None,
) -> tuple[Ensemble, float]:
    """Load the weights of all members at once and pack them as they come; returns the ensemble and the seconds.

    A folder named twice is read once, unless its members stand in different places. invariant: see `Ensemble`.
    part: what this process holds of the members whose places say that several processes share them.
    """
    started = time.monotonic()
    wanted = {reader.name: (reader.folder, places[reader.name]) for reader in readers}
    different = list(dict.fromkeys(wanted.values()))

    def load(one: tuple[Path, Place]) -> PreparedLlama:
        folder, place = one
        if place.parts == 1:
            model = Llama.from_pretrained(folder, place.dtype, place.device)
        else:
            assert part is not None
            model = load_shard(folder, part, place.dtype, place.device)
        steady = place.device.type == "cpu" if invariant is None else invariant
        try:
            return PreparedLlama(model, place.packed, steady, consume=True)
        except ValueError as error:  # weights that the storage cannot hold
            raise InputError(f"{folder}: {error}") from error

    with ThreadPoolExecutor(len(different)) as pool:
        loaded = dict(zip(different, pool.map(load, different)))
    models = {}
    for reader in readers:
        model = loaded[wanted[reader.name]]
        ends = stop_tokens(reader.chat, reader.tokenizer)
        model.stop_tokens = tuple(dict.fromkeys(model.stop_tokens + ends))
        models[reader.name] = model
    return Ensemble(models, dict(weights)), time.monotonic() - started


def encode_sentences(
    sentences: Sequence[str], readers: Sequence[Reader], options: Options, where: str, first_line: int = 0
) -> Sentences:
    """Prompts of every sentence that is not blank; raises InputError naming the line of one that fits no context."""
    found = Sentences(len(sentences), [], [], [], [], [], sentences, first_line)
    for line, sentence in enumerate(sentences, first_line):
        if not sentence.strip():
            found.empty.append(line)
            continue
        prompt = tuple(reader.encode(sentence, options.source, options.target) for reader in readers)
        if (tight := _tightest(prompt, readers)) is not None:
            reader, length = tight
            if options.too_long == "error":
                raise InputError(
                    f"{where}:{line + 1}: the sentence makes {length} tokens for {reader.name}, whose context is "
                    f"{reader.context}; shorten it, or give --too-long truncate or skip"
                )
            if options.too_long == "skip":
                found.skipped.append(line)
                found.empty.append(line)
                continue
            prompt = _truncate(sentence, readers, options, f"{where}:{line + 1}")
            found.truncated.append(line)
        found.lines.append(line)
        found.prompts.append(prompt)
    return found


def encode_pair(
    sentence: str, translation: str, readers: Sequence[Reader], options: Options, where: str
) -> tuple[tuple[list[int], ...] | None, list[int]]:
    """Prompts and the translation's tokens, without a stop token; no prompts for a blank sentence and one to skip.

    `where` names the line. Raises InputError for a pair that fits no context, unless too long ones are skipped.
    """
    target = readers[0].tokenizer.encode(translation.strip())
    if not sentence.strip():
        return None, target
    prompts = tuple(reader.encode(sentence, options.source, options.target) for reader in readers)
    for reader, prompt in zip(readers, prompts):
        if len(prompt) + len(target) > reader.context:
            if options.too_long == "skip":
                return None, target
            raise InputError(
                f"{where}: prompt and translation make {len(prompt) + len(target)} tokens for {reader.name}, whose "
                f"context is {reader.context}; shorten them, or give --too-long skip"
            )
    return prompts, target


def _tightest(prompt: Sequence[list[int]], readers: Sequence[Reader]) -> tuple[Reader, int] | None:
    """The first member whose context has no room for one token behind the prompt."""
    for reader, part in zip(readers, prompt):
        if len(part) >= reader.context:
            return reader, len(part)
    return None


def _truncate(sentence: str, readers: Sequence[Reader], options: Options, where: str) -> tuple[list[int], ...]:
    """The longest beginning of the sentence that leaves every member half of its context for the translation."""

    def prompt_of(count: int) -> tuple[list[int], ...]:
        return tuple(reader.encode(sentence[:count], options.source, options.target) for reader in readers)

    low, high = 0, len(sentence)
    while low < high:
        middle = (low + high + 1) // 2
        if all(2 * len(part) <= reader.context for part, reader in zip(prompt_of(middle), readers)):
            low = middle
        else:
            high = middle - 1
    if low == 0:
        raise InputError(f"{where}: the prompt alone fills half of a member's context; use a shorter prompt")
    return prompt_of(low)
