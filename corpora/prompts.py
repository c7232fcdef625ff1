"""Prompts as data: a list of chat messages with fields, in a TOML file.

A prompt file has a key `messages`, a list of tables with `role` and `content`, and optionally `chat`, the name of the
chat format that a model was trained with. In a content, `{source_language}` and `{target_language}` are English names,
`{source}` is the sentence, and `{{` and `}}` are literal braces. Fields are replaced once, so braces inside the
sentence are text. How roles become tokens is defined in minillama.chat, not here.
"""

import re
import tomllib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from corpora.languages import language_name
from corpora.text import read_bytes
from minillama.errors import InputError

FIELDS = ("source_language", "target_language", "source")
ROLES = ("system", "user", "assistant")
FILE_NAME = "prompt.toml"
_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


@dataclass(frozen=True)
class Prompt:
    """A translation prompt: `templates` are (role, content with fields), `chat` a fixed chat format's name or None."""

    name: str
    templates: tuple[tuple[str, str], ...]
    chat: str | None = None

    def __post_init__(self) -> None:
        fields: set[str] = set()
        for number, (role, content) in enumerate(self.templates, 1):
            where = f"{self.name}: message {number}"
            if role not in ROLES:
                raise InputError(f"{where}: unknown role {role!r}, expected one of {', '.join(ROLES)}")
            for piece in _PIECE.finditer(content):
                if piece[0] in ("{{", "}}"):
                    continue
                if piece[1] is None:
                    raise InputError(
                        f"{where}: a lone {piece[0]!r}, expected a field in braces, or '{piece[0] * 2}' for a brace"
                    )
                if piece[1] not in FIELDS:
                    known = ", ".join(f"{{{field}}}" for field in FIELDS)
                    raise InputError(f"{where}: unknown field {piece[0]}, expected one of {known}")
                fields.add(piece[1])
        if "source" not in fields:
            raise InputError(f"{self.name}: no message contains {{source}}, expected the sentence to appear")

    @classmethod
    def load(cls, name_or_path: str | Path) -> "Prompt":
        """Load a built-in prompt by name, a TOML file, or the `prompt.toml` of a model folder.

        Raises InputError for an unknown name, a file that is no such TOML, or an unknown field.
        """
        text = str(name_or_path)
        path = Path(name_or_path)
        if text in prompt_names():
            content = resources.files("corpora").joinpath("prompts", f"{text}.toml").read_bytes()
            return cls(text, *_parse(content, text))
        if path.is_dir():
            path = path / FILE_NAME
        elif path.suffix != ".toml" and not path.exists():
            raise InputError(f"unknown prompt {text!r}: expected one of {', '.join(prompt_names())}, or a .toml file")
        return cls(str(path), *_parse(read_bytes(path), str(path)))

    def messages(self, source: str, source_language: str, target_language: str) -> list[tuple[str, str]]:
        """(role, content) of each message for one sentence; the languages are codes such as `ja`."""
        values = {
            "source_language": language_name(source_language),
            "target_language": language_name(target_language),
            "source": source,
        }

        def replacement(piece: re.Match[str]) -> str:
            return piece[0][0] if piece[1] is None else values[piece[1]]

        return [(role, _PIECE.sub(replacement, content)) for role, content in self.templates]

    def to_toml(self) -> str:
        """The prompt as TOML; `Prompt.load` reads the same templates back."""
        import tomli_w  # only writing needs it

        messages = [{"role": role, "content": content} for role, content in self.templates]
        return tomli_w.dumps({"chat": self.chat, "messages": messages} if self.chat else {"messages": messages})

    def save(self, path: str | Path) -> None:
        """Write the prompt to a file, or as `prompt.toml` into an existing folder."""
        path = Path(path)
        if path.is_dir():
            path = path / FILE_NAME
        path.write_text(self.to_toml(), encoding="utf-8", newline="\n")


def prompt_names() -> list[str]:
    """Names of the built-in prompts."""
    files = resources.files("corpora").joinpath("prompts").iterdir()
    return sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml"))


def _parse(content: bytes, name: str) -> tuple[tuple[tuple[str, str], ...], str | None]:
    try:
        data = tomllib.loads(content.decode("utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{name}: not a TOML file: {error}") from error
    messages = data.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise InputError(f"{name}: expected a non-empty list `messages` of tables with `role` and `content`")
    unknown = sorted(set(data) - {"messages", "chat"})
    if unknown:
        raise InputError(f"{name}: unknown key `{unknown[0]}`, expected `messages` and optionally `chat`")
    chat = data.get("chat")
    if not isinstance(chat, str | None):
        raise InputError(f"{name}: `chat` is {chat!r}, expected the name of a chat format")
    for number, message in enumerate(messages, 1):
        if set(message) != {"role", "content"} or not all(isinstance(value, str) for value in message.values()):
            raise InputError(f"{name}: message {number}: expected `role` and `content`, both strings")
    return tuple((message["role"], message["content"]) for message in messages), chat
