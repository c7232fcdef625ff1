"""Chat formats: a list of (role, text) messages becomes token ids that end where the model is to speak.

Formats are built from ids: control tokens by name, everything a user wrote by `Tokenizer.encode`, so that no text can
open or close a turn. The begin-of-text token stands once, at the start.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from minillama.errors import InputError
from minillama.tokenizer import Tokenizer

Message = tuple[str, str]


@dataclass(frozen=True)
class ChatFormat:
    """Pieces around a message: control tokens, or text with `{role}` for the message's. `strip` trims the message."""

    name: str
    opening: tuple[str, ...]
    closing: tuple[str, ...]
    end_of_turn: str | None
    strip: bool

    @property
    def control_tokens(self) -> set[str]:
        return {part for part in (*self.opening, *self.closing, self.end_of_turn) if part and part.startswith("<|")}


FORMATS = {
    "llama3": ChatFormat(
        "llama3", ("<|start_header_id|>", "{role}", "<|end_header_id|>", "\n\n"), ("<|eot_id|>",), "<|eot_id|>", True
    ),
    "chatml": ChatFormat("chatml", ("<|im_start|>", "{role}\n"), ("<|im_end|>", "\n"), "<|im_end|>", False),
    "plain": ChatFormat("plain", (), (), None, False),
}
BEGIN_OF_TEXT = ("<|begin_of_text|>", "<s>")


def recognise(tokenizer: Tokenizer) -> ChatFormat:
    """The format whose control tokens the tokenizer has; `plain` when it has none."""
    for chat in (FORMATS["llama3"], FORMATS["chatml"]):
        if chat.control_tokens <= tokenizer.specials.keys():
            return chat
    return FORMATS["plain"]


def chat_format(name: str | None, tokenizer: Tokenizer) -> ChatFormat:
    """The named format, checked against the tokenizer, or the recognised one for None or 'auto'."""
    if name in (None, "auto"):
        return recognise(tokenizer)
    if name not in FORMATS:
        raise InputError(f"chat format {name!r} is unknown; there are {', '.join(FORMATS)} and auto")
    chat = FORMATS[name]
    lacking = sorted(chat.control_tokens - tokenizer.specials.keys())
    if lacking:
        raise InputError(f"chat format {name} needs {', '.join(lacking)}, which this tokenizer does not have")
    return chat


def render(messages: Sequence[Message], chat: ChatFormat, tokenizer: Tokenizer, bos_token_id: int | None) -> list[int]:
    """Token ids of the messages and, in a chat format, of the header under which the assistant answers.

    In `plain` the texts follow each other, a newline between. ChatML models have no token before the first turn. Texts
    that touch (a role's newline and the message) are encoded as one, as in a rendered template.
    """
    begin = bos_token_id if chat.name != "chatml" else None
    if begin is None and chat.name != "chatml":
        begin = next((token for name in BEGIN_OF_TEXT if (token := tokenizer.special(name)) is not None), None)
    ids = [] if begin is None else [begin]
    if not chat.opening:
        return ids + tokenizer.encode("\n".join(text for _, text in messages))
    parts: list[int | str] = []
    for role, text in messages:
        parts += _parts(chat.opening, role, tokenizer)
        parts.append(text.strip() if chat.strip else text)
        parts += _parts(chat.closing, role, tokenizer)
    parts += _parts(chat.opening, "assistant", tokenizer)
    for _, touching in groupby(parts, key=lambda part: isinstance(part, int)):
        run = list(touching)
        ids += tokenizer.encode("".join(map(str, run))) if isinstance(run[0], str) else [int(part) for part in run]
    return ids


def stop_tokens(chat: ChatFormat, tokenizer: Tokenizer) -> tuple[int, ...]:
    """What ends the assistant's turn in this format, beside the model's own stop tokens."""
    token = tokenizer.special(chat.end_of_turn) if chat.end_of_turn else None
    return () if token is None else (token,)


def _parts(parts: tuple[str, ...], role: str, tokenizer: Tokenizer) -> list[int | str]:
    """Control tokens as ids, the rest as text."""
    found: list[int | str] = []
    for part in parts:
        token = tokenizer.special(part)
        found.append(part.replace("{role}", role) if token is None else token)
    return found
