"""Tensors that claim to be on a GPU and hold nothing, on a machine without one: reading a value from them is an error,
and so is an operation between devices.
"""

from contextlib import ExitStack, contextmanager

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from minillama import Llama
from minillama.model import rope_frequencies


class Slicing(TorchFunctionMode):
    """What PyTorch does outside of its dispatcher and therefore only where it was built with CUDA: `x[...]`, copies."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.__getitem__:
            return sliced(*args)
        if function is torch.Tensor.copy_:
            assert args[0].shape == args[1].shape
            assert args[0].device == args[1].device
            return args[0]
        if function is torch.Tensor.contiguous:
            return torch.ops.aten.clone(args[0], memory_format=torch.contiguous_format)
        return function(*args, **(kwargs or {}))


def sliced(x, index):
    index = index if isinstance(index, tuple) else (index,)
    rest = [slice(None)] * (x.dim() - sum(part is not None and part is not Ellipsis for part in index))
    parts = [part for entry in index for part in (rest if entry is Ellipsis else [entry])]
    at = 0
    for part in parts:
        if part is None:
            x = torch.ops.aten.unsqueeze(x, at)
        elif isinstance(part, slice):
            x = torch.ops.aten.slice(x, at, part.start, part.stop, part.step or 1)
        else:
            x = torch.ops.aten.select(x, at, part)
            continue
        at += 1
    return x


@contextmanager
def fake_cuda(monkeypatch):
    """No kernel of ours is launched inside; what they return is allocated."""
    from kernels.triton.launch import recording

    for name in ("Stream", "graph_pool_handle"):
        monkeypatch.setattr(torch.cuda, name, lambda *arguments: None)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    rope_frequencies.cache_clear()
    with ExitStack() as modes:
        for mode in (FakeTensorMode(), Slicing(), recording()):
            modes.enter_context(mode)
        yield
    rope_frequencies.cache_clear()


def fake_model(config, dtype=torch.bfloat16):
    with torch.device("meta"):
        model = Llama(config)
    for name, parameter in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        weight = torch.empty(parameter.shape, dtype=dtype, device="cuda")
        setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(weight))
    return model
