"""Three file formats, one behaviour: the libraries' ids, every text back again, and no control token out of a text.

The vocabularies are trained here; truth is tokenizers, tiktoken and sentencepiece called directly.
"""

import base64
import itertools
import json

import pytest
import sentencepiece
import tiktoken
import tiktoken.load
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from minillama import InputError, Tokenizer
from minillama.tokenizer import LLAMA3_NAMED, LLAMA3_PATTERN

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog doesn't mind: it's 2024 already.",
    "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。",
    "Die Katze sitzt auf der Straße; größere Häuser stehen daneben.\n\n\tEingerückt.",
    "<|start_header_id|>user<|end_header_id|> <s> </s> <unk> <|eot_id|> <|begin_of_text|>",
] * 20
VOCABULARY = 400
ALPHABET = pre_tokenizers.ByteLevel.alphabet()
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
CONTROL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<s>",
           "</s>", "<unk>", "<|reserved_special_token_0|>", "<|im_start|>", "<|im_end|>"]  # fmt: skip

# Any text at all, with control tokens and lone surrogates thrown in.
surrogates = st.text(st.characters(categories=["Cs"]), max_size=2)
parts = st.one_of(st.sampled_from(CONTROL), st.text(), surrogates, st.just("  \n "))
texts = st.lists(parts, max_size=6).map("".join)


def as_read(text):
    """What a text is once lone surrogates, which no encoding has, are U+FFFD, and pairs are their character."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def train_byte_level():
    """Byte-level BPE whose ids are merge ranks, with Llama 3's control tokens after them."""
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(tokenizers.Regex(LLAMA3_PATTERN), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, BYTE_LEVEL])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=ALPHABET))
    reserved = (f"<|reserved_special_token_{number}|>" for number in itertools.count())
    tokenizer.add_special_tokens([LLAMA3_NAMED.get(index) or next(reserved) for index in range(256)])
    assert tokenizer.token_to_id("<|begin_of_text|>") == VOCABULARY
    return tokenizer


def ranks_of(tokenizer):
    """tiktoken's table of a byte-level vocabulary, by GPT-2's characters for bytes."""
    printable = [byte for byte in range(256) if 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255]
    to_byte = {chr(byte): byte for byte in printable}
    to_byte |= {chr(256 + index): byte for index, byte in enumerate(sorted({*range(256)} - {*printable}))}
    assert to_byte.keys() == set(ALPHABET)
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    return {bytes(to_byte[character] for character in piece): rank for piece, rank in vocabulary.items()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One vocabulary as tokenizer.json and as ranks; another as sentencepiece."""
    made = {name: tmp_path_factory.mktemp(name) for name in ("json", "tiktoken", "sentencepiece")}
    tokenizer = train_byte_level()
    tokenizer.save(str(made["json"] / "tokenizer.json"))
    lines = [base64.b64encode(piece) + b" %d" % rank for piece, rank in ranks_of(tokenizer).items()]
    (made["tiktoken"] / "tokenizer.model").write_bytes(b"\n".join(lines) + b"\n")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_prefix=str(made["sentencepiece"] / "tokenizer"), vocab_size=420,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, minloglevel=2,
    )  # fmt: skip
    return made


@pytest.fixture(scope="module")
def loaded(folders):
    return {name: Tokenizer.from_pretrained(folder) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def library(folders):
    """The same three, by the libraries alone: text -> ids."""
    from_json = tokenizers.Tokenizer.from_file(str(folders["json"] / "tokenizer.json"))
    from_json.encode_special_tokens = True
    ranks = tiktoken.load.load_tiktoken_bpe(str(folders["tiktoken"] / "tokenizer.model"))
    encoding = tiktoken.Encoding("small", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens={})
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folders["sentencepiece"] / "tokenizer.model"))
    return {
        "json": lambda text: from_json.encode(text, add_special_tokens=False).ids,
        "tiktoken": lambda text: encoding.encode(text, disallowed_special=()),
        "sentencepiece": processor.encode,
    }


FORMATS = pytest.mark.parametrize("name", ["json", "tiktoken", "sentencepiece"])


@FORMATS
@settings(max_examples=80, deadline=None)
@given(text=texts)
@example(text="<|eot_id|>")
@example(text="<s>")
@example(text="</s><unk>")
@example(text="\ud83d\ude00 \ud83d")
@example(text="".join(CORPUS[:4]))
def test_ids_are_the_librarys_none_is_a_control_token_and_the_text_comes_back(name, text, loaded, library):
    tokenizer = loaded[name]
    ids = tokenizer.encode(text)
    assert ids == library[name](as_read(text))
    assert not set(ids) & set(tokenizer.specials.values())
    assert tokenizer.decode(ids) == as_read(text)


@settings(max_examples=50, deadline=None)
@given(text=texts)
@example(text="<|eot_id|>")
@example(text="a <|eot_id|><|eot_id|> b")
def test_control_tokens_among_a_vocabularys_own_words_are_not_found_in_text(text, worded):
    assert worded.special("<|eot_id|>") is not None
    ids = worded.encode(text)
    assert not set(ids) & set(worded.specials.values())
    assert worded.decode(ids) == as_read(text)


@pytest.fixture(scope="module")
def worded(tmp_path_factory):
    """BPE that looks a whole text up in its vocabulary first, control tokens included."""
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer, tokenizer.decoder = BYTE_LEVEL, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|eot_id|>", "<s>"], initial_alphabet=ALPHABET)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.encode_special_tokens = True
    assert tokenizer.encode("<|eot_id|>").ids == [0]  # the library alone does find it
    folder = tmp_path_factory.mktemp("worded")
    tokenizer.save(str(folder / "tokenizer.json"))
    return Tokenizer.from_pretrained(folder)


@FORMATS
def test_control_tokens_are_got_by_name_and_left_out_of_text(name, loaded):
    tokenizer = loaded[name]
    ids = tokenizer.encode("the cat")
    control = tokenizer.special("<s>" if name == "sentencepiece" else "<|begin_of_text|>")
    assert control not in (None, *ids)
    assert tokenizer.decode([control, *ids, control]) == "the cat"
    assert tokenizer.special("<|no_such_token|>") is None
    # A model's vocabulary may be padded: an id past the last entry has no text.
    assert tokenizer.decode([*ids, len(tokenizer), len(tokenizer) + 7]) == "the cat"
    # Four bytes, none of them in the corpus: one token each. What is not UTF-8 is a replacement character.
    assert "\ufffd" in tokenizer.decode(tokenizer.encode("𝒳")[:-1])


def test_one_vocabulary_in_two_file_formats_is_equal(loaded):
    assert loaded["json"].differences(loaded["tiktoken"]) == loaded["tiktoken"].differences(loaded["json"]) == []
    assert len(loaded["json"]) == len(loaded["tiktoken"]) == VOCABULARY + 256
    assert loaded["json"].specials == loaded["tiktoken"].specials


def test_sentencepiece_and_its_tokenizer_json_are_equal(folders, loaded, tmp_path):
    """As Llama 1 and 2 come: tokenizer.model, and transformers' conversion of it."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folders["sentencepiece"] / "tokenizer.model"))
    vocabulary = {processor.id_to_piece(i): i for i in range(processor.get_piece_size())}
    merges = [
        (piece[:cut], piece[cut:])
        for piece, rank in vocabulary.items()
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary and not piece.startswith("<0x")
    ]
    converted = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    converted.decoder = decoders.Sequence(steps)
    converted.add_special_tokens(["<unk>", "<s>", "</s>"])
    converted.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.from_pretrained(tmp_path).differences(loaded["sentencepiece"]) == []


def test_differences_name_every_entry_that_is_read_differently(folders, loaded, tmp_path):
    written = json.loads((folders["json"] / "tokenizer.json").read_text())
    vocabulary = written["model"]["vocab"]
    by_id = {index: piece for piece, index in vocabulary.items()}
    vocabulary[by_id[300]], vocabulary[by_id[301]] = 301, 300
    eot = next(token for token in written["added_tokens"] if token["content"] == "<|eot_id|>")
    eot["content"] = "<|im_end|>"
    reserved = next(token for token in written["added_tokens"] if token["content"] == "<|reserved_special_token_9|>")
    reserved["content"] = "<|mine|>"  # the other only reserves this id
    (tmp_path / "tokenizer.json").write_text(json.dumps(written))
    changed = Tokenizer.from_pretrained(tmp_path)
    lines = loaded["tiktoken"].differences(changed)
    assert [int(line.split(":")[0]) for line in lines] == [300, 301, eot["id"]]
    assert lines[-1] == f"{eot['id']}: '<|eot_id|>' against '<|im_end|>'"
    assert loaded["sentencepiece"].differences(changed)[0].startswith("0: ")
    written["added_tokens"] = written["added_tokens"][:10]
    (tmp_path / "tokenizer.json").write_text(json.dumps(written))
    lines = Tokenizer.from_pretrained(tmp_path).differences(loaded["json"])
    assert f"{VOCABULARY + 10}: nothing against '<|python_tag|>'" in lines


@FORMATS
@pytest.mark.parametrize("unit", [" ", "é"])
def test_runs_longer_than_25000_are_encoded_and_come_back(name, unit, loaded, library):
    text = "start " + unit * 60_001 + " end"
    ids = loaded[name].encode(text)
    assert loaded[name].decode(ids) == text
    assert not set(ids) & set(loaded[name].specials.values())
    if name == "tiktoken":  # a long text without long runs has the library's own ids
        text = " ".join(CORPUS) * 12
        assert 25_000 < len(text) < 400_000
        assert loaded[name].encode(text) == library[name](text)


@FORMATS
def test_a_saved_tokenizer_is_the_same(name, folders, loaded, tmp_path):
    (folders[name] / "tokenizer_config.json").write_text("{}")
    Tokenizer.from_pretrained(folders[name]).save(tmp_path)
    assert (tmp_path / "tokenizer_config.json").exists()
    again = Tokenizer.from_pretrained(tmp_path)
    assert again.differences(loaded[name]) == []
    assert again.encode(CORPUS[1]) == loaded[name].encode(CORPUS[1])
    if name == "json":  # truncation and padding of the file do not apply
        tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        tokenizer.enable_truncation(3)
        tokenizer.enable_padding(length=50)
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        assert Tokenizer.from_pretrained(tmp_path).encode(CORPUS[0]) == loaded[name].encode(CORPUS[0])


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", b"{", r"tokenizer\.json: not a tokenizer that can be read"),
        ("tokenizer.json", b'{"model": 3}', r"tokenizer\.json: not a tokenizer that can be read"),
        ("tokenizer.model", b"", r"tokenizer\.model: expected ranks"),
        ("tokenizer.model", b"YQ== 0\nnot base64! 1\n", r"tokenizer\.model:2: expected a base64 piece and its rank"),
        ("tokenizer.model", b"\nbroken", r"tokenizer\.model: not a tokenizer that can be read"),
        ("tokenizer.model", b"YQ== 0\nYg== 1\n", r"tokenizer\.model: expected ranks .* all 256 bytes"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(file, content, message, tmp_path):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        Tokenizer.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)
