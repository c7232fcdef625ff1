"""The loss of a batch: what is kept for backward, in which precision, and with nothing to predict."""

import pytest
import torch
from test_packing import assert_same, examples_of, loss_and_gradients
from tiny import tiny_model

from train.packing import Example, collate, pack
from train.trainer import target_loss


def saved_bytes(model, batch):
    """Bytes that autograd saves for backward, without weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = target_loss(model, batch)
    loss.backward()
    return sum(kept.values())


@pytest.mark.parametrize("layout", [collate, pack])
def test_checkpointed_activations_change_nothing_but_memory(layout):
    model, examples = tiny_model(3, num_hidden_layers=6), examples_of(12)
    batch = layout(examples)
    targets = sum(example.num_labels for example in examples)
    plain, kept = loss_and_gradients(model, [batch], targets), saved_bytes(model, batch)
    model.model.checkpoint_activations = True
    again = loss_and_gradients(model, [batch], targets)
    assert again[0] == plain[0]
    assert all(torch.equal(one, other) for one, other in zip(plain[1], again[1]))
    assert saved_bytes(model, batch) < kept / 3


def test_mixed_precision_gives_nearly_the_same_gradients_in_the_weights_own_dtype():
    model, examples = tiny_model(3), examples_of(12)
    targets = sum(example.num_labels for example in examples)
    exact = loss_and_gradients(model, [pack(examples)], targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = loss_and_gradients(model, [pack(examples)], targets)
    assert_same(mixed, exact, 6e-2)
    assert {gradient.dtype for gradient in mixed[1]} == {torch.float32}


@pytest.mark.parametrize("layout", [collate, pack])
def test_a_batch_without_targets_costs_nothing(layout):
    model = tiny_model(3)
    total, gradients = loss_and_gradients(model, [layout([Example([1, 2, 3], 3)])], 1)
    assert total == 0.0
    assert not any(gradient.any() for gradient in gradients)
