"""Chat formats: a list of (role, text) messages as token ids that end where the assistant answers.

Control tokens are looked up by name and a user's text goes through `Tokenizer.encode`, so no text can open or close a
message. The begin-of-text token is added once, at the start.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from minillama.errors import InputError
from minillama.tokenizer import Tokenizer

Message = tuple[str, str]


@dataclass(frozen=True)
class ChatFormat:
    """What stands around a message: control tokens, or text in which `{role}` is filled in.

    strip: remove white space around the message.
    """

    name: str
    opening: tuple[str, ...]
    closing: tuple[str, ...]
    strip: bool

    @property
    def control_tokens(self) -> set[str]:
        return {piece for piece in (*self.opening, *self.closing) if piece.startswith("<|")}


FORMATS = {
    "llama3": ChatFormat(
        "llama3", ("<|start_header_id|>", "{role}", "<|end_header_id|>", "\n\n"), ("<|eot_id|>",), strip=True
    ),
    "chatml": ChatFormat("chatml", ("<|im_start|>", "{role}\n"), ("<|im_end|>", "\n"), strip=False),
    "plain": ChatFormat("plain", (), (), strip=False),
}
BEGIN_OF_TEXT = ("<|begin_of_text|>", "<s>")


def recognise(tokenizer: Tokenizer) -> ChatFormat:
    """Return the format whose control tokens the tokenizer has, `plain` where it has none."""
    return next(chat for chat in FORMATS.values() if chat.control_tokens <= tokenizer.specials.keys())


def chat_format(name: str | None, tokenizer: Tokenizer) -> ChatFormat:
    """Return the named format, or for None and 'auto' the recognised one.

    Raises InputError where the name is unknown or the tokenizer lacks the format's control tokens.
    """
    if name in (None, "auto"):
        return recognise(tokenizer)
    if name not in FORMATS:
        raise InputError(f"chat format {name!r} is unknown; there are {', '.join(FORMATS)} and auto")
    chat = FORMATS[name]
    missing = sorted(chat.control_tokens - tokenizer.specials.keys())
    if missing:
        raise InputError(f"chat format {name} needs {', '.join(missing)}, which this tokenizer does not have")
    return chat


def render(messages: Sequence[Message], chat: ChatFormat, tokenizer: Tokenizer, bos_token_id: int | None) -> list[int]:
    """Return token ids of the messages and, in a chat format, of the header of the assistant's answer.

    In `plain` the texts are joined by newlines. ChatML has no token before the first message. Adjacent texts (a role's
    newline and the message) are encoded as one, as in a rendered template.
    """
    begins = () if chat.name == "chatml" else (bos_token_id, *map(tokenizer.special, BEGIN_OF_TEXT))
    ids = [token for token in begins if token is not None][:1]
    if not chat.opening:
        return ids + tokenizer.encode("\n".join(text for _, text in messages))
    pieces: list[int | str] = []
    for role, text in messages:
        content = text.strip() if chat.strip else text
        pieces += [*_pieces(chat.opening, role, tokenizer), content, *_pieces(chat.closing, role, tokenizer)]
    pieces += _pieces(chat.opening, "assistant", tokenizer)
    for kind, adjacent in groupby(pieces, key=type):
        run = list(adjacent)
        ids += tokenizer.encode("".join(map(str, run))) if kind is str else map(int, run)
    return ids


def stop_tokens(chat: ChatFormat, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The token that ends an answer in this format, in addition to the model's own stop tokens."""
    return tuple(token for piece in chat.closing if (token := tokenizer.special(piece)) is not None)


def _pieces(template: tuple[str, ...], role: str, tokenizer: Tokenizer) -> list[int | str]:
    """Control tokens as ids, the rest as text."""
    return [tokenizer.specials.get(piece, piece.replace("{role}", role)) for piece in template]
