"""Predicted memory of a training step, from shapes alone; tests compare it with measured peaks.

What autograd saves is counted by running the model on fake tensors. The peak is the largest of three moments: backward
begins (all activations, few gradients), backward ends (all gradients, one layer's activations), the optimizer's step.
"""

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from kernels.chunked_cross_entropy import CHUNK_BYTES
from minillama.config import LlamaConfig, read_config, read_json
from minillama.errors import InputError
from minillama.model import Llama, rope_frequencies
from train.config import Settings
from train.lora import add_adapters, layer_numbers
from train.optim import GROUP_SIZE, TEMPORARY_BYTES

GIB = 1 << 30
SHAPES = Path(__file__).with_name("shapes.toml")
# Workspaces of libraries; on a GPU also the driver's context and fragmentation.
RESERVE = {"cpu": 16 << 20, "cuda": GIB}


@dataclass(frozen=True)
class Memory:
    """Bytes on one device. `gradients`: all of them; `peak` counts what exists at the same time."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    reserve: int
    peak: int
    checkpoint_copy: int

    def __str__(self) -> str:
        """A line per kind of memory. The peak is not the sum: gradients grow as activations are freed."""
        kinds = ("weights", "gradients", "optimizer", "activations", "logits", "reserve", "peak")
        sizes = {name: getattr(self, name) / GIB for name in kinds}
        return "\n".join(f"{name:12}{size:>6.{2 if size >= 0.1 else 4}f} GiB" for name, size in sizes.items())


def shape_of(model: str) -> LlamaConfig:
    """The configuration of a folder, a config.json, or a model in shapes.toml. Raises InputError otherwise."""
    path = Path(model)
    if path.is_dir():
        return read_config(path)
    if path.is_file():
        return LlamaConfig.from_dict(read_json(path), str(path))
    shapes = tomllib.loads(SHAPES.read_text(encoding="utf-8"))["shape"]
    known = {name: shape for shape in shapes for name in shape.pop("names")}
    short = {name.split("/")[-1].lower(): name for name in known}
    if (name := short.get(model, model)) not in known:
        raise InputError(f"--model {model}: no such folder, and no known shape; known: {', '.join(known)}")
    return LlamaConfig(**known[name])


def memory_of(
    config: LlamaConfig, settings: Settings, positions: int, labels: int, ranks: int = 1, device: str = "cpu"
) -> Memory:
    """Of one rank, for forward passes of so many positions and labels, unpadded.

    With several ranks (FSDP2) each has its shard of all states, and gathers the weights of the layers at work.
    """
    model = _model(config, settings)
    weights = _bytes(model.parameters()) // ranks
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = _bytes(trained) // ranks
    optimizer, update = 2 * gradients, 0
    if settings.optimizer_state:
        state_size = getattr(torch, settings.optimizer_state).itemsize
        optimizer = 2 * sum(p.numel() * (state_size if p.dim() >= 2 else 4) for p in trained) // ranks
        update = TEMPORARY_BYTES * min(GROUP_SIZE, max(p.numel() for p in trained))

    compute_size = getattr(torch, settings.compute_dtype or settings.dtype).itemsize
    stream = positions * config.hidden_size * model.dtype.itemsize  # the hidden states between two layers
    everywhere = replace(settings, lora_layers="all")
    one, two = (_saved_by_autograd(replace(config, num_hidden_layers=n), everywhere, positions) for n in (1, 2))
    layer_saved = two - one
    activations, recomputed, cast = one + (config.num_hidden_layers - 1) * layer_saved, 0, 0
    if settings.lora_rank and settings.lora_layers != "all":
        activations = _saved_by_autograd(config, settings, positions)
    if settings.checkpoint_activations:
        first = layer_numbers(settings.lora_layers, config.num_hidden_layers)[0] if settings.lora_rank else 0
        activations = max(0, one - layer_saved) + (config.num_hidden_layers - first) * stream
        recomputed = layer_saved
        if compute_size < model.dtype.itemsize and not settings.lora_rank:  # autocast caches them until backward
            cast = sum(p.numel() for p in model.model.layers.parameters() if p.dim() >= 2) * compute_size

    rows = max(1, min(labels, CHUNK_BYTES[device] // (config.vocab_size * compute_size)))
    chunk = rows * config.vocab_size * (compute_size if compute_size == 4 else compute_size + 4)  # float32 softmax
    table = 0 if settings.lora_rank else model.output_weight.numel()
    head = table * 4 + labels * config.hidden_size * model.dtype.itemsize  # gradients; the table's summed in float32
    table *= model.dtype.itemsize
    # gradients of hidden states that exist at once while a layer goes backward
    passing = positions * 2 * (config.intermediate_size + config.hidden_size) * compute_size

    begins = activations + head + max(chunk + 2 * stream + cast, recomputed + passing)
    if settings.micro_batch_size and settings.micro_batch_size < -(-settings.batch_size // ranks):
        begins += gradients  # of earlier micro-batches
    kept = table if settings.release_gradients else gradients
    # the gradient of a tied embedding is added to that of the output layer, after all others
    ends = kept + max(layer_saved + passing, table if config.tie_word_embeddings else 0)
    step = kept + update
    if ranks > 1:
        layer = _bytes(p for name, p in model.model.layers[0].named_parameters() if "lora_" not in name)
        outer = _bytes(p for name, p in model.named_parameters() if ".layers." not in name)
        outer_gradients = 0 if settings.lora_rank else outer
        begins += outer + 2 * layer  # gathered: a layer and the next one, and throughout what is outside of layers
        gathered = outer + (2 if settings.lora_rank else 4) * layer  # with a layer's gradients, and their copy to send
        ends = kept - outer_gradients // ranks + gathered + layer_saved + passing + table
        received = outer_gradients // ranks if device == "cpu" else 0  # gloo's own buffer
        step = max(step, kept + 2 * outer_gradients + received)
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations + recomputed,
        logits=chunk + head,
        reserve=RESERVE[device],
        peak=weights + optimizer + max(begins, ends, step) + RESERVE[device],
        checkpoint_copy=weights + optimizer,
    )


def _saved_by_autograd(config: LlamaConfig, settings: Settings, positions: int) -> int:
    """Bytes of the tensors that a forward pass saves for backward, without weights, counted on fake tensors."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = _model(config, settings)
    saved: dict[int, Tensor] = {}

    def save(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True):
        weights = {name: torch.empty(p.shape, dtype=p.dtype) for name, p in model.named_parameters()}
        model.load_state_dict(weights, assign=True)
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=settings.compute_dtype == "bfloat16" != settings.dtype)
        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor), autocast:
            model.hidden(torch.empty(1, positions, dtype=torch.int64))
    rope_frequencies.cache_clear()  # it has a fake tensor
    for weight in model.parameters():
        saved.pop(weight.untyped_storage()._cdata, None)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def _model(config: LlamaConfig, settings: Settings) -> Llama:
    """The model that would be trained, on the meta device."""
    with torch.device("meta"):
        return add_adapters(Llama(config).to(getattr(torch, settings.dtype)), settings)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
