"""How many bytes an implementation moves, counted by watching every PyTorch operation that it issues.

Each operation reads the elements of its tensor arguments and writes those of its results; views move nothing. That is
what eager execution costs where tensors are larger than the caches, on any device, so the table holds on a machine
without a GPU. A Triton kernel issues no such operations: what it moves follows from its definition and is stated next
to it.

    B rows  V vocabulary  N members  S splits
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels.types import SPLIT


class MovedBytes(TorchDispatchMode):
    """Counts the bytes read and written, and the operations that moved any, while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.read = self.written = self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        arguments = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        result = func(*args, **kwargs)
        changed = list(_changed(func, args, kwargs))
        known = {tensor.untyped_storage().data_ptr() for tensor in arguments}
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        fresh = [tensor for tensor in results if tensor.untyped_storage().data_ptr() not in known]
        allocates_only = func.overloadpacket in (torch.ops.aten.empty, torch.ops.aten.empty_like)
        if (fresh or changed) and not allocates_only:
            written = sum(_bytes(tensor) for tensor in _different([*fresh, *changed]))
            picks = func.overloadpacket in (torch.ops.aten.gather, torch.ops.aten.index_select, torch.ops.aten.index)
            # a gather reads of its source what it returns, and the whole index
            self.read += sum(_bytes(tensor) for tensor in arguments[picks:]) + written * picks
            self.written += written
            self.operations += 1
        return result


def _changed(func, args, kwargs) -> Iterator[Tensor]:
    """The arguments that the operation's schema says it writes to."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            yield from (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def _different(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    seen: set[int] = set()
    for tensor in tensors:
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            yield tensor


def _bytes(tensor: Tensor) -> int:
    """Bytes of a tensor's elements; those of an expanded one are read from one place."""
    return min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())


def count(function: Callable[[], object]) -> MovedBytes:
    """What one call moves."""
    with MovedBytes() as counter:
        function()
    return counter


def plain_eager(logits: Sequence[Tensor], weights: Tensor) -> tuple[Tensor, Tensor]:
    """What one would write without this package: cast, scale, add, log_softmax, argmax; no masks and no flags."""
    x_BV = logits[0].float() * weights[0]
    for number in range(1, len(logits)):
        x_BV = x_BV + logits[number].float() * weights[number]
    token_B = x_BV.argmax(dim=-1)
    return token_B, torch.log_softmax(x_BV, dim=-1).gather(1, token_B[:, None])[:, 0]


def fused_bytes(batch: int, vocabulary: int, itemsizes: Sequence[int]) -> int:
    """Bytes of the Triton kernel for token, log-probability and flag: logits once, partial results out and back,
    results.
    """
    splits = -(-vocabulary // SPLIT)
    logits = batch * vocabulary * sum(itemsizes)
    partial = batch * splits * (4 + 4 + 4 + 4)
    tickets = batch * splits * 8
    return logits + 2 * partial + tickets + batch * (8 + 4 + 4) + batch * splits * 4 * len(itemsizes)


def table(shapes: Sequence[tuple[int, int, int, torch.dtype]]) -> list[dict]:
    """One row for each (B, V, N, dtype): bytes of eager and fused, and their ratio."""
    rows = []
    for batch, vocabulary, members, dtype in shapes:
        logits = [torch.zeros(batch, vocabulary, dtype=dtype) for _ in range(members)]
        weights = torch.ones(members)

        def eager(logits=logits, weights=weights):
            return plain_eager(logits, weights)

        counter = count(eager)
        fused = fused_bytes(batch, vocabulary, [dtype.itemsize] * members)
        eager_bytes = counter.read + counter.written
        rows.append(
            {
                "batch": batch,
                "vocabulary": vocabulary,
                "members": members,
                "dtype": str(dtype).removeprefix("torch."),
                "eager_operations": counter.operations,
                "eager_bytes": eager_bytes,
                "fused_bytes": fused,
                "ratio": round(eager_bytes / fused, 2),
            }
        )
    return rows
