"""The members of an ensemble as they read text: tokenizers, chat formats and prompts first, then the weights.

What is quick is opened and checked first, so that bad input is refused before a weight is read.
"""

import argparse
import time
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from corpora import Prompt
from corpora.pairs import one_line
from decode.engine.ensemble import Ensemble
from decode.engine.expression import format_weights
from decode.model.packed_llama import PackedLlama
from decode.pipeline.config import Options, named_folders
from decode.pipeline.placement import Placement, listed, per_member, placements
from decode.pipeline.weights_file import combination
from minillama import InputError, Llama, Tokenizer
from minillama.chat import ChatFormat, chat_format, render, stop_tokens
from minillama.files import resolve_folder
from minillama.machine import device_name
from minillama.tensor_parallel import TPGroup, load_shard
from minillama.weights import Checkpoint, open_folder

PROMPT_FILE = "prompt.toml"
# Differences between two vocabularies that a message lists.
SHOWN = 5


@dataclass(frozen=True)
class MemberSpec:
    """What is known of a member before its weights are loaded: its tokenizer, chat format, prompt and context."""

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
        """The member's prompt for a sentence, as tokens."""
        messages = self.prompt.messages(sentence, source, target)
        return render(messages, self.chat, self.tokenizer, self.checkpoint.config.bos_token_id)

    def text(self, tokens: Sequence[int]) -> str:
        """Generated tokens as one line; a model may write line breaks."""
        return one_line(self.tokenizer.decode(tokens)).strip()


@dataclass(frozen=True)
class EnsembleSpec:
    """The models of a command line that have a weight, checked but not loaded. folders: as they are given."""

    folders: dict[str, str]
    weights: dict[str, float]
    placements: dict[str, Placement]
    members: list[MemberSpec]

    @classmethod
    def from_arguments(
        cls, arguments: argparse.Namespace, batch_size: int, tp: str = "1", weights: dict[str, float] | None = None
    ) -> "EnsembleSpec":
        """tp: as `--tensor-parallel` has it.   weights: instead of the command line's. Raises InputError."""
        folders = named_folders(arguments.model)
        names = list(folders)
        weights = weights or combination(arguments, names)
        where = placements(arguments.device, arguments.dtype, names, batch_size, tp)
        prompts, chats = per_member(arguments.prompt, names, "--prompt"), per_member(arguments.chat, names, "--chat")
        used = {name: folders[name] for name in weights}
        return cls(used, weights, {name: where[name] for name in weights}, open_members(used, prompts, chats))

    def describe(self) -> tuple[str, str]:
        """`L + S (L 12.3 M, S 4.5 M)`, and where they are: `float32, cpu (AVX512, 8 threads)`."""
        sizes = ", ".join(f"{member.name} {member.checkpoint.parameters / 1e6:,.1f} M" for member in self.members)
        where = {name: f"{p.weight_dtype}, {device_name(p.device)}" for name, p in self.placements.items()}
        return f"{format_weights(self.weights)} ({sizes})", listed(where)

    def load(self, invariant: bool | None = None, tp: TPGroup | None = None) -> tuple[Ensemble, float]:
        """Load the weights of all members at once and pack them; returns the ensemble and the seconds that took.

        A folder named twice is read once, unless its members have different placements. invariant: see PackedLlama;
        None: on a CPU.   tp: the group that shares the members whose placement has several processes.
        """
        started = time.monotonic()
        keys = {member.name: (member.folder, self.placements[member.name]) for member in self.members}
        different = list(dict.fromkeys(keys.values()))

        def load(key: tuple[Path, Placement]) -> PackedLlama:
            folder, placement = key
            if placement.tp_size == 1:
                model = Llama.from_pretrained(folder, placement.dtype, placement.device)
            else:
                assert tp is not None
                model = load_shard(folder, tp, placement.dtype, placement.device)
            batch_invariant = placement.device.type == "cpu" if invariant is None else invariant
            try:
                return PackedLlama(model, placement.packed_dtype, batch_invariant, consume=True)
            except ValueError as error:  # weights that the dtype cannot hold
                raise InputError(f"{folder}: {error}") from error

        with ThreadPoolExecutor(len(different)) as pool:
            loaded = dict(zip(different, pool.map(load, different)))
        models = {}
        for member in self.members:
            model = models[member.name] = loaded[keys[member.name]]
            stops = stop_tokens(member.chat, member.tokenizer)
            model.stop_tokens = tuple(dict.fromkeys(model.stop_tokens + stops))
        return Ensemble(models, self.weights), time.monotonic() - started


def open_members(
    folders: Mapping[str, str], prompts: Mapping[str, str | None] | None, chats: Mapping[str, str | None] | None
) -> list[MemberSpec]:
    """Open every member's folder. A member without a prompt in `prompts` uses its folder's, else the paper's.

    Raises InputError for what cannot be run and for vocabularies that differ.
    """
    members = []
    opened: dict[Path, tuple[Checkpoint, Tokenizer]] = {}
    for name, spec in folders.items():
        folder = resolve_folder(spec).resolve()
        if folder not in opened:
            opened[folder] = (open_folder(folder), Tokenizer.from_pretrained(folder))
        checkpoint, tokenizer = opened[folder]
        size = checkpoint.config.vocab_size
        if len(tokenizer) > size:
            raise InputError(f"{folder}: the tokenizer has {len(tokenizer):,} entries, the model only {size:,}")
        prompt = (prompts or {}).get(name) or (folder if (folder / PROMPT_FILE).exists() else "paper")
        loaded = Prompt.load(prompt)
        chat = chat_format((chats or {}).get(name) or loaded.chat, tokenizer)
        members.append(MemberSpec(name, folder, checkpoint, tokenizer, chat, loaded))
    _check_shared_vocabulary(members)
    return members


def _check_shared_vocabulary(members: Sequence[MemberSpec]) -> None:
    """Compare every member with the first: an id must be the same piece of text for all, and have a logit."""
    first = members[0]
    for other in members[1:]:
        if differences := first.tokenizer.differences(other.tokenizer):
            more = f" and {len(differences) - SHOWN:,} more" if len(differences) > SHOWN else ""
            raise InputError(
                f"{first.name} ({len(first.tokenizer):,} entries) and {other.name} ({len(other.tokenizer):,}) do not "
                f"share one vocabulary: {len(differences):,} ids differ, {'; '.join(differences[:SHOWN])}{more}"
            )
    sizes = {member.name: f"{member.checkpoint.config.vocab_size:,}" for member in members}
    if len(set(sizes.values())) > 1:
        raise InputError(f"the models' vocabularies differ in size: {listed(sizes)}")


def encode_sentence(
    sentence: str, new_tokens: int, members: Sequence[MemberSpec], options: Options, where: str
) -> tuple[tuple[list[int], ...] | None, str]:
    """A prompt for each member, None for a sentence that is blank or skipped; and "skipped", "truncated" or "".

    new_tokens: must fit every member's context after its prompt.   where: names the line. Raises InputError for a
    sentence that is too long, unless the options skip or truncate it.
    """
    if not sentence.strip():
        return None, ""
    prompts = _prompts(sentence, members, options)
    for member, prompt in zip(members, prompts):
        if len(prompt) + new_tokens <= member.context:
            continue
        if options.too_long == "skip":
            return None, "skipped"
        if options.too_long == "truncate":
            return _truncated_prompts(sentence, members, options, where), "truncated"
        raise InputError(
            f"{where}: prompt and translation make at least {len(prompt) + new_tokens} tokens for {member.name}, whose "
            f"context is {member.context}; shorten them, or give --too-long"
        )
    return prompts, ""


def encode_pair(
    sentence: str, translation: str, members: Sequence[MemberSpec], options: Options, where: str
) -> tuple[tuple[list[int], ...] | None, list[int]]:
    """The same with the translation's tokens, without a stop token."""
    target = members[0].tokenizer.encode(translation.strip())
    return encode_sentence(sentence, len(target), members, options, where)[0], target


def _prompts(sentence: str, members: Sequence[MemberSpec], options: Options) -> tuple[list[int], ...]:
    return tuple(member.encode(sentence, options.source, options.target) for member in members)


def _truncated_prompts(
    sentence: str, members: Sequence[MemberSpec], options: Options, where: str
) -> tuple[list[int], ...]:
    """Of the longest beginning of the sentence that leaves every member half of its context for the translation."""

    def fits(length: int) -> bool:
        prompts = _prompts(sentence[:length], members, options)
        return all(2 * len(prompt) <= member.context for member, prompt in zip(members, prompts))

    length = len(sentence) - bisect_left(range(len(sentence), 0, -1), True, key=fits)
    if length == 0:
        raise InputError(f"{where}: the prompt alone fills half of a member's context; use a shorter prompt")
    return _prompts(sentence[:length], members, options)
