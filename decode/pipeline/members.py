"""The members of an ensemble as they read text: tokenizers, chat formats and prompts first, then the weights.

What is quick is opened and checked first, so that bad input is refused before a weight is read.
"""

import argparse
import time
from collections.abc import Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from corpora import Prompt
from corpora.pairs import one_line
from decode.engine.ensemble import Ensemble
from decode.engine.expression import format_weights
from decode.engine.sequence import Sequence as EngineSequence
from decode.model.packed_llama import PackedLlama
from decode.pipeline.config import Options, named_folders
from decode.pipeline.placement import Placement, listed, per_member, placements, tp_sizes
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
    def from_arguments(cls, arguments: argparse.Namespace, batch_size: int, tp: str = "1") -> "EnsembleSpec":
        """tp: as `--tensor-parallel` has it. Raises InputError."""
        folders = named_folders(arguments.model)
        names = list(folders)
        weights = combination(arguments, names)
        where = placements(arguments.device, arguments.dtype, names, batch_size, tp_sizes(tp, names))
        prompts, chats = per_member(arguments.prompt, names, "--prompt"), per_member(arguments.chat, names, "--chat")
        used = {name: folders[name] for name in weights}
        return cls(used, weights, {name: where[name] for name in weights}, open_members(used, prompts, chats))

    @property
    def tp_size(self) -> int:
        return max(placement.tp_size for placement in self.placements.values())

    def describe(self) -> tuple[str, str]:
        """`L + S (L 12.3 M, S 4.5 M)`, and where they are: `float32, cpu (AVX512, 8 threads)`."""
        sizes = ", ".join(f"{member.name} {member.checkpoint.parameters / 1e6:,.1f} M" for member in self.members)
        where = {name: f"{p.weight_dtype}, {device_name(p.device)}" for name, p in self.placements.items()}
        return f"{format_weights(self.weights)} ({sizes})", listed(where)

    def load(self, invariant: bool | None = None, tp: TPGroup | None = None) -> tuple[Ensemble, float]:
        return load_ensemble(self.members, self.weights, self.placements, invariant, tp)


@dataclass
class EncodedInput:
    """Consecutive lines of input, the first of them number `first` (from 0), and the prompts made of them.

    prompts: one tuple per line of `lines`, one prompt per member.   empty: lines without a prompt, blank or skipped.
    A skipped line is too long for a context and empty, a truncated one too long and shortened.   fault: why the line
    after these is refused.
    """

    texts: Sequence[str]
    first: int = 0
    lines: list[int] = field(default_factory=list)
    prompts: list[tuple[list[int], ...]] = field(default_factory=list)
    empty: list[int] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
    truncated: list[int] = field(default_factory=list)
    fault: InputError | None = None

    def checked(self) -> "EncodedInput":
        """The same; raises InputError where a line was refused."""
        if self.fault is not None:
            raise self.fault
        return self

    def text(self, line: int) -> str:
        return self.texts[line - self.first]

    def remaining(self, done: Set[int]) -> "EncodedInput":
        """The lines with prompts that are not in `done`, and no empty ones."""
        return self.select([index for index, line in enumerate(self.lines) if line not in done])

    def select(self, indices: Sequence[int]) -> "EncodedInput":
        """Some of the lines with prompts, and no empty ones."""
        lines, prompts = [self.lines[index] for index in indices], [self.prompts[index] for index in indices]
        return EncodedInput(self.texts, self.first, lines, prompts)

    def sequences(self, options: Options) -> list[EngineSequence]:
        """What the engine is given. Samples depend on the line's number, so the batch does not change them."""
        params, most = options.sampling_params, options.max_new_tokens
        return [
            EngineSequence(prompt, params, most, key=line, explain=options.explain)
            for line, prompt in zip(self.lines, self.prompts)
        ]


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
        requested = prompts.get(name) if prompts else None
        prompt = Prompt.load(requested or (folder if (folder / PROMPT_FILE).exists() else "paper"))
        chat = chat_format((chats.get(name) if chats else None) or prompt.chat, tokenizer)
        members.append(MemberSpec(name, folder, checkpoint, tokenizer, chat, prompt))
    check_shared_vocabulary({member.name: member.tokenizer for member in members})
    sizes = {member.name: f"{member.checkpoint.config.vocab_size:,}" for member in members}
    if len(set(sizes.values())) > 1:
        raise InputError(f"the models' vocabularies differ in size: {listed(sizes)}")
    return members


def check_shared_vocabulary(tokenizers: Mapping[str, Tokenizer]) -> None:
    """Compare every tokenizer with the first: an id must be the same piece of text for all members.

    Raises InputError naming the entries that differ.
    """
    (first_name, first), *others = tokenizers.items()
    for name, tokenizer in others:
        differences = first.differences(tokenizer)
        if differences:
            more = f" and {len(differences) - SHOWN:,} more" if len(differences) > SHOWN else ""
            raise InputError(
                f"{first_name} ({len(first):,} entries) and {name} ({len(tokenizer):,}) do not share one vocabulary: "
                f"{len(differences):,} ids differ, {'; '.join(differences[:SHOWN])}{more}; members need the same table"
            )


def load_ensemble(
    members: Sequence[MemberSpec],
    weights: Mapping[str, float],
    placements: Mapping[str, Placement],
    invariant: bool | None = None,
    tp: TPGroup | None = None,
) -> tuple[Ensemble, float]:
    """Load the weights of all members at once and pack them; returns the ensemble and the seconds that took.

    A folder named twice is read once, unless its members have different placements. invariant: see PackedLlama; None:
    on a CPU. tp: the group that shares the members whose placement has several processes.
    """
    started = time.monotonic()
    keys = {member.name: (member.folder, placements[member.name]) for member in members}
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
    for member in members:
        model = loaded[keys[member.name]]
        stops = stop_tokens(member.chat, member.tokenizer)
        model.stop_tokens = tuple(dict.fromkeys(model.stop_tokens + stops))
        models[member.name] = model
    return Ensemble(models, dict(weights)), time.monotonic() - started


def encode_lines(
    texts: Sequence[str], members: Sequence[MemberSpec], options: Options, name: str, first: int = 0
) -> EncodedInput:
    """The prompts of every line that is not blank, up to one that is refused because it fits no context (`fault`)."""
    found = EncodedInput(texts, first)
    for line, sentence in enumerate(texts, first):
        try:
            prompt, too_long = _encode_line(sentence, members, options, f"{name}:{line + 1}")
        except InputError as error:
            found.texts, found.fault = texts[: line - first], error
            break
        if too_long:
            (found.skipped if prompt is None else found.truncated).append(line)
        if prompt is None:
            found.empty.append(line)
        else:
            found.lines.append(line)
            found.prompts.append(prompt)
    return found


def _encode_line(
    sentence: str, members: Sequence[MemberSpec], options: Options, where: str
) -> tuple[tuple[list[int], ...] | None, bool]:
    """(prompts, whether the sentence was too long for a context); no prompts for a blank or skipped one."""
    if not sentence.strip():
        return None, False
    prompts = _encode(sentence, members, options)
    for member, tokens in zip(members, prompts):
        if len(tokens) < member.context:  # room for one token
            continue
        if options.too_long == "skip":
            return None, True
        if options.too_long == "truncate":
            return _truncate(sentence, members, options, where), True
        raise InputError(
            f"{where}: the sentence makes {len(tokens)} tokens for {member.name}, whose context is {member.context}; "
            "shorten it, or give --too-long truncate or skip"
        )
    return prompts, False


def encode_pair(
    sentence: str, translation: str, members: Sequence[MemberSpec], options: Options, where: str
) -> tuple[tuple[list[int], ...] | None, list[int]]:
    """Prompts and the translation's tokens, without a stop token; no prompts for a blank sentence and one to skip.

    `where` names the line. Raises InputError for a pair that fits no context, unless too long ones are skipped.
    """
    target = members[0].tokenizer.encode(translation.strip())
    if not sentence.strip():
        return None, target
    prompts = _encode(sentence, members, options)
    for member, prompt in zip(members, prompts):
        if len(prompt) + len(target) > member.context:
            if options.too_long == "skip":
                return None, target
            raise InputError(
                f"{where}: prompt and translation make {len(prompt) + len(target)} tokens for {member.name}, whose "
                f"context is {member.context}; shorten them, or give --too-long skip"
            )
    return prompts, target


def _encode(sentence: str, members: Sequence[MemberSpec], options: Options) -> tuple[list[int], ...]:
    return tuple(member.encode(sentence, options.source, options.target) for member in members)


def _truncate(sentence: str, members: Sequence[MemberSpec], options: Options, where: str) -> tuple[list[int], ...]:
    """The longest beginning of the sentence that leaves every member half of its context for the translation."""
    low, high = 0, len(sentence)
    while low < high:
        middle = (low + high + 1) // 2
        prompt = _encode(sentence[:middle], members, options)
        if all(2 * len(tokens) <= member.context for tokens, member in zip(prompt, members)):
            low = middle
        else:
            high = middle - 1
    if low == 0:
        raise InputError(f"{where}: the prompt alone fills half of a member's context; use a shorter prompt")
    return _encode(sentence[:low], members, options)
