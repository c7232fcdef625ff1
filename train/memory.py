"""Predicted memory of a training step, from shapes alone; tests compare it with measured peaks.

What autograd saves of a layer is counted by running the model of one and of two layers on fake tensors. The peak is
the largest of three moments: backward begins (all activations, few gradients), backward ends (all gradients, the
activations of one layer), the optimizer's step.
"""

import tomllib
from collections.abc import Iterable, Iterator
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
# Workspaces of libraries; on a GPU also the driver's context and the allocator's fragmentation.
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

    def lines(self) -> Iterator[str]:
        """A line per kind of memory, in GiB, the peak last."""
        for name, remark in (
            ("weights", ""),
            ("gradients", ""),
            ("optimizer", ""),
            ("activations", "saved by the forward pass for backward"),
            ("logits", "a chunk of them, and the gradients of the output layer"),
            ("reserve", "workspaces of libraries"),
            ("peak", "not the sum: gradients grow as activations are freed"),
        ):
            yield f"{name:12}{format_gib(getattr(self, name)):>10}  {remark}".rstrip()


def format_gib(count: float) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / GIB:.4f} GiB"


def shape_of(model: str) -> LlamaConfig:
    """The configuration of a folder, a config.json, or a model in shapes.toml. Raises InputError otherwise."""
    path = Path(model)
    if path.is_dir():
        return read_config(path)
    if path.is_file():
        return LlamaConfig.from_dict(read_json(path), str(path))
    known: list[str] = []
    for entry in tomllib.loads(SHAPES.read_text(encoding="utf-8"))["shape"]:
        names = entry.pop("names")
        known += names
        if model in names or model in (name.split("/")[-1].lower() for name in names):
            return LlamaConfig(**entry)
    raise InputError(f"--model {model}: no such folder, and no known shape; known: {', '.join(known)}")


def forward_size(settings: Settings, ranks: int) -> int:
    """Positions of a rank's forward pass if no data is given: its share of the step's sequences, all of full length."""
    share = -(-settings.batch_size // ranks)
    return min(settings.micro_batch_size or share, share) * settings.sequence_length


def memory_of(
    config: LlamaConfig, settings: Settings, positions: int, labels: int, ranks: int = 1, device: str = "cpu"
) -> Memory:
    """Of one rank, for forward passes of so many positions and labels, unpadded.

    With several ranks (FSDP2) each has its shard of weights, gradients and optimizer states, and gathers the weights of
    the layers at work.
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
    saved = _saved_activations(config, settings, positions)
    activations, recomputed, cast = saved.total, 0, 0
    if settings.checkpoint_activations:
        activations, recomputed = saved.outside + saved.layers * stream, saved.layer
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
    ends = kept + max(saved.layer + passing, table if config.tie_word_embeddings else 0)
    step = kept + update
    if ranks > 1:
        layer = _bytes(p for name, p in model.model.layers[0].named_parameters() if "lora_" not in name)
        outer = _bytes(p for name, p in model.named_parameters() if ".layers." not in name)
        outer_gradients = 0 if settings.lora_rank else outer
        begins += outer + 2 * layer  # gathered: a layer and the next one, and throughout what is outside of layers
        gathered = outer + (2 if settings.lora_rank else 4) * layer  # with a layer's gradients, and their copy to send
        ends = kept - outer_gradients // ranks + gathered + saved.layer + passing + table
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


@dataclass(frozen=True)
class _Saved:
    """Bytes that autograd saves: in total, of one layer, outside of layers; and the number of layers that save any."""

    total: int
    layer: int
    outside: int
    layers: int


def _saved_activations(config: LlamaConfig, settings: Settings, positions: int) -> _Saved:
    adapted = layer_numbers(settings.lora_layers if settings.lora_rank else "all", config.num_hidden_layers)
    without = config.num_hidden_layers - adapted[0] - len(adapted)  # layers below the first adapter save nothing
    one = _saved_by_autograd(config, replace(settings, lora_layers="all"), positions, 1)
    layer = _saved_by_autograd(config, replace(settings, lora_layers="all"), positions, 2) - one
    total = one + (len(adapted) - 1) * layer
    if without:
        total += without * (_saved_by_autograd(config, replace(settings, lora_layers="0"), positions, 2) - one)
    return _Saved(total, layer, max(0, one - layer), len(adapted) + without)


def _saved_by_autograd(config: LlamaConfig, settings: Settings, positions: int, layers: int) -> int:
    """Bytes of the tensors that a forward pass of so many layers saves for backward, the weights not counted."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = _model(replace(config, num_hidden_layers=layers), settings)
    saved: dict[int, Tensor] = {}

    def save(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True):
        weights = {name: torch.empty(p.shape, dtype=p.dtype) for name, p in model.named_parameters()}
        model.load_state_dict(weights, assign=True)
        mixed = settings.compute_dtype == "bfloat16" and settings.dtype == "float32"
        autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed)
        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor), autocast:
            model.hidden(torch.empty(1, positions, dtype=torch.int64))
    rope_frequencies.cache_clear()  # it has a fake tensor
    for weight in model.parameters():
        saved.pop(weight.untyped_storage()._cdata, None)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def _model(config: LlamaConfig, settings: Settings) -> Llama:
    """The model that would be trained, on the meta device."""
    with torch.device("meta"):
        model = Llama(config).to(getattr(torch, settings.dtype))
    if settings.lora_rank:
        add_adapters(model, settings)
    return model


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
