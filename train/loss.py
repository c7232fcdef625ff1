"""Cross-entropy at target positions only, in chunks: the output layer never sees a prompt token or a pad."""

import torch
from torch import Tensor

from kernels import linear_cross_entropy
from minillama import Llama
from train.packing import Batch


def target_loss(model: Llama, batch: Batch) -> Tensor:
    """Sum over targets of -log p(target), nats, float32 (float64 for a model in float64).

    A sum, not a mean: whoever accumulates micro-batches divides by the targets of the whole optimizer step.
    """
    hidden_BTD = model.hidden(batch.inputs_BT, packed=batch.packed)
    hidden_MD = hidden_BTD.flatten(0, 1).index_select(0, batch.target_rows_M)
    return linear_cross_entropy(hidden_MD, model.output_weight, batch.targets_M)


@torch.no_grad()
def mean_loss(model: Llama, batches: list[Batch], device: torch.device) -> float:
    """Nats per target token over held-out batches."""
    total, targets = 0.0, 0
    for batch in batches:
        total += float(target_loss(model, batch.to(device)))
        targets += len(batch.targets_M)
    return total / targets
