"""Data: every example once an epoch, the same order from the same seed, targets exactly where they belong."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from corpora import Pairs, Prompt
from minillama import Tokenizer
from minillama.chat import chat_format
from train.data import documents, epoch_order, responses
from train.packing import Example, collate

PROMPT = Prompt.load("plain")


@given(st.lists(st.integers(2, 60), min_size=1, max_size=300), st.integers(1, 20), st.integers(0, 5), st.integers(0, 3))
def test_an_epoch_holds_every_example_once(lengths, batch_size, seed, epoch):
    order = epoch_order(lengths, batch_size, seed, epoch)
    assert sorted(np.concatenate(order)) == list(range(len(lengths)))
    assert len(order) == -(-len(lengths) // batch_size)
    again = epoch_order(lengths, batch_size, seed, epoch)
    assert all((one == other).all() for one, other in zip(order, again))


def test_epochs_and_seeds_have_different_orders():
    lengths = list(range(2, 202))
    first, second, other = (np.concatenate(epoch_order(lengths, 8, *key)) for key in ((0, 0), (0, 1), (1, 0)))
    assert (first != second).any()
    assert (first != other).any()


@given(st.lists(st.lists(st.integers(1, 99), min_size=2, max_size=12), min_size=1, max_size=8), st.data())
def test_collated_rows_predict_each_target_from_the_token_before_it(rows, data):
    examples = [Example(row, data.draw(st.integers(1, len(row) - 1))) for row in rows]
    batch = collate(examples)
    flat = batch.inputs_BT.flatten()
    index = 0
    for number, example in enumerate(examples):
        for position in range(example.prompt_len, len(example.tokens)):
            row = int(batch.label_positions_M[index])
            assert row == number * batch.inputs_BT.shape[1] + position - 1
            assert int(flat[row]) == example.tokens[position - 1]
            assert int(batch.labels_M[index]) == example.tokens[position]
            index += 1
    assert index == len(batch.labels_M)


def test_responses_are_the_translation_and_the_end_and_nothing_of_the_prompt(tokenizer_folder):
    tokenizer = Tokenizer.from_pretrained(tokenizer_folder)
    pairs = Pairs(["私は学生です。"], ["i am a student."], 0, "test")
    (example,) = responses(pairs, ("ja", "en"), PROMPT, chat_format("plain", tokenizer), tokenizer, 0, 1)
    assert example.tokens[0] == 0
    assert example.tokens.count(0) == 1
    assert example.tokens[example.prompt_len :] == [*tokenizer.encode("i am a student."), 1]
    assert tokenizer.decode(example.tokens[: example.prompt_len]) == "Japanese: 私は学生です。\nEnglish:"


def test_a_long_document_goes_on_in_examples_that_lose_no_target(tokenizer_folder):
    tokenizer = Tokenizer.from_pretrained(tokenizer_folder)
    text = "he lived a hard life. " * 20
    whole = [0, *tokenizer.encode(text), 1]
    parts = documents([text], tokenizer, 0, 1, max_length=16)
    assert all(len(part.tokens) <= 16 for part in parts)
    assert [token for part in parts for token in part.tokens[1:]] == whole[1:]
    assert torch.tensor([part.prompt_len for part in parts]).unique().tolist() == [1]
