"""Chat prompts equal, id for id, what transformers renders from the published templates; no text leaves its message."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library
from transformers import PreTrainedTokenizerFast

from minillama import InputError, Tokenizer
from minillama.chat import FORMATS, chat_format, recognise, render, stop_tokens
from minillama.tokenizer import LLAMA3_PATTERN

# Meta-Llama-3-8B-Instruct's tokenizer_config.json.
LLAMA3_TEMPLATE = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# SmolLM2-135M-Instruct's, without the system message that it invents where there is none.
CHATML_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CORPUS = ["system user assistant", "Translate this into German.\n\n", "It is  a\nlazy\n\n\ndog, isn't it?"] * 30
CONTROL = {
    "llama3": ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "chatml": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "plain": ["<s>", "</s>"],
}
TEMPLATES = {"llama3": LLAMA3_TEMPLATE, "chatml": CHATML_TEMPLATE}
CHATS = pytest.mark.parametrize("name", TEMPLATES)

# Texts without control tokens: of those transformers and we differ on purpose.
words = st.text(st.sampled_from("ab isn't dog.\n\t 12é日"), max_size=30)
messages_of = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), words), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Format -> (ours, transformers') of one file."""
    made = {}
    for name, control in CONTROL.items():
        library = Library(models.BPE())
        split = pre_tokenizers.Split(Regex(LLAMA3_PATTERN if name == "llama3" else GPT2_PATTERN), "isolated")
        bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        library.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_alone])
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        library.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet))
        library.add_special_tokens(control)
        folder = tmp_path_factory.mktemp(name)
        library.save(str(folder / "tokenizer.json"))
        theirs = PreTrainedTokenizerFast(tokenizer_object=library, bos_token=control[0])
        made[name] = Tokenizer.from_pretrained(folder), theirs
    return made


@CHATS
@settings(max_examples=60, deadline=None)
@given(messages=messages_of)
@example(messages=[("user", "\n\n\nleading newlines")])
@example(messages=[("system", "  "), ("user", "trailing \n"), ("assistant", ""), ("user", "12 dogs")])
def test_prompts_equal_transformers_with_the_published_template(name, messages, tokenizers):
    ours, theirs = tokenizers[name]
    expected = theirs.apply_chat_template(
        [{"role": role, "content": text} for role, text in messages],
        chat_template=TEMPLATES[name],
        add_generation_prompt=True,
        return_dict=False,
    )
    assert render(messages, FORMATS[name], ours, ours.special(CONTROL[name][0])) == expected


@pytest.mark.parametrize("name", FORMATS)
def test_the_format_is_recognised_from_the_control_tokens(name, tokenizers):
    ours, _ = tokenizers[name]
    assert recognise(ours) is chat_format(None, ours) is chat_format("auto", ours) is FORMATS[name]
    assert chat_format("plain", ours) is FORMATS["plain"]  # any model can be given plain text
    end_of_turn = {"llama3": "<|eot_id|>", "chatml": "<|im_end|>"}.get(name)
    assert stop_tokens(FORMATS[name], ours) == ((ours.special(end_of_turn),) if end_of_turn else ())
    for other in TEMPLATES.keys() - {name}:
        with pytest.raises(InputError, match=rf"chat format {other} needs <\|\w+\|>, .*this tokenizer does not have"):
            chat_format(other, ours)
    with pytest.raises(InputError, match="chat format 'alpaca' is unknown; there are llama3, chatml, plain and auto"):
        chat_format("alpaca", ours)


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_control_tokens_that_a_user_types_stay_text(name, tokenizers, data):
    ours, _ = tokenizers[name]
    typed = st.lists(st.one_of(st.sampled_from(CONTROL[name]), words), max_size=5).map("".join)
    role, text = data.draw(typed), data.draw(typed)
    ids = render([(role, text), ("user", text)], FORMATS[name], ours, None)
    harmless = render([("x", "y"), ("user", "y")], FORMATS[name], ours, None)
    control = set(ours.specials.values())
    assert [token for token in ids if token in control] == [token for token in harmless if token in control]


@pytest.mark.parametrize("name", ["llama3", "plain"])
@pytest.mark.parametrize("given_bos", [True, False])
def test_the_begin_of_text_token_stands_once(name, given_bos, tokenizers):
    ours, _ = tokenizers[name]
    bos = ours.special(CONTROL[name][0])
    messages = [("system", CONTROL[name][0]), ("user", f"{CONTROL[name][0]}hello")]
    ids = render(messages, FORMATS[name], ours, bos if given_bos else None)
    assert ids[0] == bos
    assert ids.count(bos) == 1


def test_plain_is_the_texts_alone(tokenizers):
    ours, _ = tokenizers["plain"]
    ids = render([("system", "Translate this."), ("user", "a dog ")], FORMATS["plain"], ours, None)
    assert ids == [ours.special("<s>"), *ours.encode("Translate this.\na dog ")]
    # A tokenizer without any begin-of-text token: the text and nothing else.
    chatml, _ = tokenizers["chatml"]
    assert render([("user", "a dog")], FORMATS["plain"], chatml, None) == chatml.encode("a dog")
