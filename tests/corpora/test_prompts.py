"""A prompt is data: what is in the file and the sentence is what the messages say, and nothing more. TOML is checked
with tomllib."""

import re
import tomllib

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from corpora import LANGUAGES, Prompt, language_code, language_name
from minillama.cli import Parser
from minillama.errors import InputError

TEXT = st.text(st.characters(codec="utf-8"), max_size=40)
PARTS = ["{source}", "{target_language}", "{", "}", "{{", "}}", "{0}", "%s", "$source", "\\1", "\n", "犬", '"']
TRICKY = st.lists(st.sampled_from(PARTS)).map("".join)

PAPER = "Translate the following sentence from German to English.\nGerman:Guten Tag.\nEnglish:"


def test_the_papers_instruction_is_as_printed_and_the_plain_prompt_labels_two_lines():
    assert Prompt.load("paper").messages("Guten Tag.", "de", "en") == [("system", PAPER)]
    assert Prompt.load("paper-user").messages("Guten Tag.", "de", "en") == [("user", PAPER)]
    [(_, content)] = Prompt.load("plain").messages("食べる。", "ja", "en")
    assert content == "Japanese: 食べる。\nEnglish:"


@given(sentence=st.one_of(TEXT, TRICKY), name=st.sampled_from(["paper", "paper-user", "plain"]))
def test_the_sentence_is_never_interpreted(sentence, name):
    prompt = Prompt.load(name)
    [(_, empty)] = prompt.messages("", "ja", "en")
    [(_, content)] = prompt.messages(sentence, "ja", "en")
    end = "\nEnglish:"
    assert content == empty.removesuffix(end) + sentence + end


@example(before="\x7f\x00\x1f\\", after='\r\n\t"', role="user")  # TOML needs DEL escaped, JSON does not
@given(before=st.one_of(TEXT, TRICKY), after=st.one_of(TEXT, TRICKY), role=st.sampled_from(["system", "user"]))
def test_a_saved_prompt_is_the_same_prompt(tmp_path_factory, before, after, role):
    escaped = [text.replace("{", "{{").replace("}", "}}") for text in (before, after)]
    template = f"{escaped[0]}{{source}}{escaped[1]}"
    prompt = Prompt("made", (("system", "{source_language}"), (role, template)))
    messages = [{"role": "system", "content": "{source_language}"}, {"role": role, "content": template}]
    assert tomllib.loads(prompt.to_toml()) == {"messages": messages}
    folder = tmp_path_factory.mktemp("model")
    prompt.save(folder)
    loaded = Prompt.load(folder)
    assert loaded.templates == prompt.templates
    assert loaded.messages("x", "ja", "en") == [("system", "Japanese"), (role, f"{before}x{after}")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[[messages]]\nrole = "user"\ncontent = "{source} {langauge}"', "unknown field {langauge}, expected one of"),
        ('[[messages]]\nrole = "user"\ncontent = "{source} {"', "a lone '{'"),
        ('[[messages]]\nrole = "user"\ncontent = "{source} {}"', "unknown field {}"),
        ('[[messages]]\nrole = "user"\ncontent = "hello"', "no message contains {source}"),
        ('[[messages]]\nrole = "robot"\ncontent = "{source}"', "unknown role 'robot', expected one of system, user"),
        ('[[messages]]\nrole = "user"', "message 1: expected `role` and `content`"),
        ("messages = []", "expected a non-empty list `messages`"),
        ('message = "x"', "expected a non-empty list `messages`"),
        ("messages = [", "not a TOML file"),
    ],
)
def test_a_prompt_file_that_does_not_fit_is_named(tmp_path, content, message):
    path = tmp_path / "bad.toml"
    path.write_text(content)
    with pytest.raises(InputError, match=f"bad.toml.*{re.escape(message)}") as error:
        Prompt.load(path)
    assert "\n" not in str(error.value)


def test_an_unknown_prompt_lists_the_known(tmp_path):
    with pytest.raises(InputError, match="unknown prompt 'papr': expected one of paper, paper-user, plain"):
        Prompt.load("papr")
    with pytest.raises(InputError, match=r"prompt\.toml: no such file"):
        Prompt.load(tmp_path)


def test_languages_have_english_names():
    codes = {"ja": "Japanese", "pt-BR": "Portuguese", "zh_Hans": "Chinese", "EN": "English"}
    assert {code: language_name(code) for code in codes} == codes
    assert all(name[0].isupper() for name in LANGUAGES.values())


def test_a_language_option_of_argparse_has_the_same_message():
    parser = Parser(prog="command")
    parser.add_argument("--source", type=language_code)
    assert parser.parse_args(["--source", "pt-BR"]).source == "pt-BR"
    with pytest.raises(InputError, match=r"argument --source: unknown language 'germn': .* such as de \(German\)"):
        parser.parse_args(["--source", "germn"])


@pytest.mark.parametrize(
    ("code", "hint"),
    [("jp", "such as"), ("Japanese", r"ja \(Japanese\)"), ("germn", r"de \(German\)"), ("", "such as")],
)
def test_an_unknown_language_is_an_error_with_a_hint(code, hint):
    with pytest.raises(InputError, match=hint):
        Prompt.load("plain").messages("x", code, "en")
