"""Packing: the same loss and the same gradients as the documents one by one, in fewer positions."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import TINY, tiny_model

from train.config import Settings
from train.data import Schedule
from train.packing import Example, best_fit, collate, pack, shared_prefix
from train.trainer import target_loss


def examples_of(count, prefix=5, seed=0, longest=24):
    """Examples of many lengths, as of a prompt: the first `prefix` tokens are the same in all, the third differs."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(length):
        return torch.randint(2, TINY.vocab_size, (length,), generator=generator).tolist()

    head = tokens(prefix)
    examples = []
    for number in range(count):
        row = [*head, 2 + number, *tokens(int(torch.randint(1, longest, (), generator=generator)))]
        examples.append(Example(row, int(torch.randint(1, len(row), (), generator=generator))))
    return examples


def loss_and_gradients(model, batches, targets):
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = target_loss(model, batch) / targets
        loss.backward()
        total += loss.item()
    return total, [parameter.grad.clone() for parameter in model.parameters()]


def assert_same(one, other, allowed):
    """Loss and every tensor's gradient, relative to its norm (or, where that is rounding alone, to the largest)."""
    assert abs(one[0] - other[0]) <= allowed * abs(other[0])
    smallest = 1e-6 * max(expected.norm() for expected in other[1])
    for found, expected in zip(one[1], other[1], strict=True):
        assert (found - expected).norm() <= allowed * max(expected.norm(), smallest)


LAYOUTS = {
    "padded": collate,
    "packed": lambda examples: pack(examples, share_prefix=False),
    "packed, prefix shared": lambda examples: pack(examples, share_prefix=True),
}


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [1, 4, 32])
def test_a_step_does_not_depend_on_micro_batches_or_packing(dtype, allowed, layout, size):
    examples = examples_of(32)
    targets = sum(example.num_labels for example in examples)
    model = tiny_model(1, tie_word_embeddings=size != 4).to(dtype)
    one_by_one = loss_and_gradients(model, [collate([example]) for example in examples], targets)
    batches = [LAYOUTS[layout](examples[start : start + size]) for start in range(0, 32, size)]
    assert_same(loss_and_gradients(model, batches, targets), one_by_one, allowed)
    if layout == "packed, prefix shared" and size > 1:
        assert batches[0].packed.prefix == 5
        assert batches[0].inputs_BT.shape[1] == sum(len(e.tokens) - 1 for e in examples[:size]) - 5 * (size - 1)


@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=8),
    prefix=st.integers(0, 9),
    first=st.integers(1, 20),
    seed=st.integers(0, 9),
)
@settings(max_examples=20, deadline=None, derandomize=True)
def test_documents_of_any_lengths_with_any_prefix_see_only_themselves(lengths, prefix, first, seed):
    """Targets may begin within the prefix: then one of its positions predicts for many documents."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(2, 9, (length + 1,), generator=generator).tolist() for length in lengths]
    examples = [Example([7] * prefix + row, min(first, len(row) + prefix - 1)) for row in rows]
    model = tiny_model(seed).double()
    targets = sum(example.num_labels for example in examples)
    one_by_one = loss_and_gradients(model, [collate([example]) for example in examples], targets)
    assert_same(loss_and_gradients(model, [pack(examples)], targets), one_by_one, 1e-9)


def test_the_loss_is_transformers_mean_over_all_targets():
    """Its own forward passes, one document at a time, without padding."""
    from transformers import LlamaConfig, LlamaForCausalLM

    ours = tiny_model(5).double()
    fields = {k: v for k, v in TINY.to_dict().items() if k not in ("architectures", "torch_dtype", "dtype")}
    theirs = LlamaForCausalLM(LlamaConfig(**fields)).double()
    theirs.load_state_dict(ours.state_dict(), strict=False)
    theirs.tie_weights()
    examples = examples_of(9)
    targets = sum(example.num_labels for example in examples)
    expected = 0.0
    for example in examples:
        labels = torch.tensor([[-100] * example.prompt_len + example.tokens[example.prompt_len :]])
        loss = theirs(torch.tensor([example.tokens]), labels=labels).loss * example.num_labels / targets
        loss.backward()
        expected += loss.item()
    found, gradients = loss_and_gradients(ours, [pack(examples)], targets)
    assert found == pytest.approx(expected, rel=1e-6)
    parameters = dict(theirs.named_parameters())
    for (name, _), gradient in zip(ours.named_parameters(), gradients):
        assert (gradient - parameters[name].grad).norm() <= 1e-6 * gradient.norm(), name


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(5, 30))
@settings(max_examples=100, deadline=None)
def test_best_fit_places_each_once_where_the_least_room_is_left(lengths, capacity):
    bins = best_fit(lengths, capacity)
    assert sorted(index for one in bins for index in one) == list(range(len(lengths)))
    slow: list[list[int]] = []
    for index, length in enumerate(lengths):
        rooms = [(capacity - sum(lengths[i] for i in one), number) for number, one in enumerate(slow)]
        fitting = [pair for pair in rooms if pair[0] >= length]
        if fitting:
            least = min(fitting)[0]
            mine = next(number for number, one in enumerate(bins) if index in one)
            assert (least, mine) in fitting
            slow[mine].append(index)
        else:
            slow.append([index])
    assert bins == slow


def test_text_fills_its_sequences():
    lengths = torch.randint(5, 300, (5000,), generator=torch.Generator().manual_seed(0)).tolist()
    bins = best_fit(lengths, 2048)
    assert sum(lengths) / (2048 * len(bins)) > 0.99


@pytest.mark.parametrize("packing", ["off", "step", "epoch"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_schedule_sees_every_target_once_an_epoch_on_any_number_of_ranks(packing, ranks):
    examples = examples_of(37)
    common = Settings(epochs=2, batch_size=5, packing=packing, sequence_length=40, seed=3)
    schedules = [
        Schedule(examples, replace(common, micro_batch_size=2), rank=rank, world_size=ranks) for rank in range(ranks)
    ]
    whole = Schedule(examples, common)
    assert schedules[0].total_steps == whole.total_steps
    seen = []
    for step in range(whole.total_steps):
        parts = [list(schedule.micro_batches(step)) for schedule in schedules]
        assert len({len(part) for part in parts}) == 1
        targets = sorted(token for part in parts for batch in part for token in batch.labels_M.tolist())
        assert targets == sorted(next(whole.micro_batches(step)).labels_M.tolist())
        assert len(targets) == whole.num_labels(step) == schedules[-1].num_labels(step)
        if whole.epoch_of(step)[0] == 0:
            seen += targets
    assert sorted(seen) == sorted(token for e in examples for token in e.tokens[e.prompt_len :])


def test_two_ranks_add_up_to_one():
    """An odd number of examples, so that one rank has one fewer, and none in the last micro-batch."""
    examples = examples_of(5)
    model = tiny_model(2).double()
    one = loss_and_gradients(model, Schedule(examples, Settings(batch_size=5)).micro_batches(0), 40)
    parts = [Schedule(examples, Settings(batch_size=5, micro_batch_size=1), rank, 2) for rank in range(2)]
    both = [loss_and_gradients(model, part.micro_batches(0), 40) for part in parts]
    summed = both[0][0] + both[1][0], [a + b for a, b in zip(both[0][1], both[1][1])]
    assert_same(summed, one, 1e-9)


def test_the_shared_prefix_leaves_every_document_a_position_of_its_own():
    assert shared_prefix([[1, 2, 3], [1, 2, 4, 5]]) == 2
    assert shared_prefix([[1, 2], [1, 2, 4, 5]]) == 1
    assert shared_prefix([[3, 2], [1, 2]]) == 0
    assert shared_prefix([[1, 2, 3]] * 4) == 2


def test_packing_is_refused_with_a_cache_or_positions():
    model, batch = tiny_model(0), pack(examples_of(3))
    with pytest.raises(ValueError, match="packed sequences are one row"):
        model.hidden(batch.inputs_BT, positions=torch.zeros_like(batch.inputs_BT), packed=batch.packed)
    with pytest.raises(ValueError, match="packed sequences are one row"):
        model.hidden(batch.inputs_BT[:, 1:], packed=batch.packed)


@pytest.mark.gpu
@pytest.mark.parametrize("share_prefix", [False, True])
def test_packed_rows_on_a_gpu_are_the_documents_one_by_one(share_prefix):
    """flex_attention compiled forward and backward, rows of changing length, and the Triton loss."""
    model = tiny_model(1, head_dim=16)
    for seed in range(3):
        examples = examples_of(40, prefix=30, seed=seed, longest=60)
        targets = sum(example.num_labels for example in examples)
        exact = loss_and_gradients(model.cpu().double(), [collate([example]) for example in examples], targets)
        model.float().cuda()
        found = loss_and_gradients(model, [pack(examples, share_prefix).to(model.device)], targets)
        assert_same((found[0], [gradient.cpu().double() for gradient in found[1]]), exact, 1e-4)
