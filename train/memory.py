"""How much memory a training step needs, from shapes alone.

What autograd keeps of a layer is counted operation by operation as `minillama.model` has them; a test compares the sum
with what PyTorch really keeps, and the whole with measured peaks.

    W weights, O optimizer state and G gradients stand for the whole step; A what the forward pass keeps for backward
    falls while G rises. So the peak is W + O + the larger of A + head (backward begins) and G + A of a layer (it ends).
"""

# D width  F inner width  Q heads * head width  K key/value heads * head width

from dataclasses import dataclass

from kernels.chunked_cross_entropy import CHUNK_BYTES
from minillama import LlamaConfig
from train.lora import layer_numbers
from train.optimizer import BLOCK, CHUNK
from train.settings import LORA_TARGETS, Settings

GIB = 1 << 30
# float32 copies of a piece of a weight that CompactAdamW has at once.
WORKING = {"float32": 4, "bfloat16": 6, "int8": 12}
BYTES = {"float32": 4, "bfloat16": 2}
# The libraries' workspaces; on a GPU also the driver's context, and what the allocator cannot use for its holes.
RESERVE = {"cpu": 16 << 20, "cuda": GIB}


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the peak of a step. `gradients` is all of them; `peak` counts what is there at once."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    reserve: int
    peak: int
    checkpoint_copy: int

    def rows(self) -> list[tuple[str, int, str]]:
        """(what, bytes, remark), the peak last."""
        return [
            ("weights", self.weights, ""),
            ("gradients", self.gradients, ""),
            ("optimizer", self.optimizer, ""),
            ("activations", self.activations, "kept by the forward pass for backward"),
            ("logits", self.logits, "a chunk of them, and the output layer's gradients"),
            ("reserve", self.reserve, "the libraries' workspaces"),
            ("peak", self.peak, "not the sum: gradients grow as activations go"),
        ]


def memory_of(
    config: LlamaConfig, settings: Settings, positions: int, targets: int, ranks: int = 1, device: str = "cpu"
) -> Memory:
    """Of one rank's step with forward passes of so many positions and targets; attention within documents, unpadded.

    Of many ranks each holds its part of weights, gradients and optimizer state (FSDP2), and whole what is at work.
    """
    counts = _parameters(config, settings)
    size = BYTES[settings.dtype]
    trained, adapters = counts.trained, counts.adapters
    weights = (counts.base * size + adapters * 4) // ranks
    gradients = trained * (4 if adapters else size) // ranks
    optimizer = _optimizer_bytes(counts, settings, size) // ranks
    kept = _kept_by_layers(config, settings)
    layer = positions * max(kept, default=0)
    activations = positions * (sum(kept) + _kept_outside(config, settings))
    if settings.checkpoint_activations:
        activations = positions * (len(kept) * config.hidden_size * _stream(settings) + _kept_outside(config, settings))
    head = _head(config, settings, targets, device)
    # Of the hidden states' and the MLP's gradients, what is there at once while a layer goes backward.
    passing = positions * 2 * (config.intermediate_size + config.hidden_size) * _compute(settings)
    hidden = positions * 2 * config.hidden_size * _stream(settings)
    again = layer if settings.checkpoint_activations else 0
    begins = activations + head.gradients + max(head.chunk + hidden, again + passing)
    if settings.micro_batch_size and settings.micro_batch_size < -(-settings.batch_size // ranks):
        begins += gradients  # of the micro-batches before
    # The embedding's gradient comes last, as a table beside the output layer's where the two are one weight.
    table = 0 if settings.lora_rank else config.vocab_size * config.hidden_size * size
    standing = table if settings.release_gradients else gradients
    ends = standing + max(layer + passing, table if config.tie_word_embeddings else 0)
    step = standing + WORKING.get(settings.optimizer_state, 0) * 4 * min(CHUNK, trained)
    if ranks > 1:
        gathered = _Gathered(counts, config, size)
        begins += gathered.outer + 2 * gathered.layer
        ends = standing - gathered.outer_gradients // ranks + gathered.at_lowest_layer + layer + passing + table
        step = max(step, standing + gathered.exchanged(ranks, device))
    peak = weights + optimizer + _autocast_copies(counts, settings) + max(begins, ends, step) + RESERVE[device]
    if settings.checkpoint_activations:
        activations += layer
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        logits=head.chunk + head.gradients,
        reserve=RESERVE[device],
        peak=peak,
        checkpoint_copy=weights + optimizer,
    )


@dataclass(frozen=True)
class _Head:
    chunk: int
    gradients: int


def _head(config: LlamaConfig, settings: Settings, targets: int, device: str) -> _Head:
    """The output layer's chunk of logits, and the gradients that it has as soon as its forward pass is done."""
    compute = _compute(settings)
    rows = max(1, min(targets, CHUNK_BYTES[device] // (config.vocab_size * compute)))
    chunk = rows * config.vocab_size * (compute if compute == 4 else compute + 4)  # softmax is in float32
    table = 0 if settings.lora_rank else config.vocab_size * config.hidden_size * 4  # summed in float32 over chunks
    return _Head(chunk, table + targets * config.hidden_size * _stream(settings))


def _autocast_copies(counts: "_Counts", settings: Settings) -> int:
    """Of the weights in the type of the products, which autocast keeps until the step ends."""
    return counts.matrices * _compute(settings) if _compute(settings) != BYTES[settings.dtype] else 0


class _Gathered:
    """What is whole of a model in shards, in bytes: weights while they are at work, gradients until they are cut.

    What stands outside the layers is gathered from the first layer to the last; of the layers there is the one at work
    and the next, and going backward the gradients of one and the copy of them that the ranks exchange.
    """

    def __init__(self, counts: "_Counts", config: LlamaConfig, size: int) -> None:
        self.outer = counts.outside * size
        self.outer_gradients = 0 if counts.adapters else self.outer
        self.layer = (counts.base - counts.outside) // config.num_hidden_layers * size
        self.at_lowest_layer = self.outer + (2 if counts.adapters else 4) * self.layer

    def exchanged(self, ranks: int, device: str) -> int:
        """At the end of backward: the outer gradients and their copy; gloo receives into one more part."""
        return 2 * self.outer_gradients + (self.outer_gradients // ranks if device == "cpu" else 0)


@dataclass(frozen=True)
class _Counts:
    base: int
    adapters: int
    trained: int
    vectors: int
    matrices: int
    outside: int


def linears(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of each linear layer of a decoder layer."""
    d, f = config.hidden_size, config.intermediate_size
    q, k = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    sizes = ((d, q), (d, k), (d, k), (q, d), (d, f), (d, f), (f, d))
    return dict(zip(LORA_TARGETS, sizes))


def _parameters(config: LlamaConfig, settings: Settings) -> _Counts:
    layers, d = config.num_hidden_layers, config.hidden_size
    matrices = sum(inputs * outputs for inputs, outputs in linears(config).values()) * layers
    table = config.vocab_size * d * (1 if config.tie_word_embeddings else 2)
    vectors = (2 * layers + 1) * d
    base = matrices + table + vectors
    adapters = 0
    if settings.lora_rank:
        per_layer = sum(sum(linears(config)[target]) for target in settings.targets) * settings.lora_rank
        adapters = per_layer * len(layer_numbers(settings.lora_layers, layers))
    return _Counts(base, adapters, adapters or base, 0 if adapters else vectors, matrices, table + d)


def _optimizer_bytes(counts: _Counts, settings: Settings, size: int) -> int:
    matrices = counts.trained - counts.vectors
    if settings.optimizer_state == "int8":
        return round(matrices * (2 + 2 * 4 / BLOCK)) + counts.vectors * 8
    if settings.optimizer_state:
        return 2 * (matrices * BYTES[settings.optimizer_state] + counts.vectors * 4)
    return 2 * counts.trained * (4 if counts.adapters else size)


def _compute(settings: Settings) -> int:
    return BYTES[settings.compute_dtype or settings.dtype]


def _stream(settings: Settings) -> int:
    """Bytes of a number on the residual stream, which autocast leaves in the weights' type."""
    return BYTES[settings.dtype]


def _kept_by_layers(config: LlamaConfig, settings: Settings) -> list[int]:
    """Bytes that each decoder layer keeps for backward, per position; none below the lowest that is trained."""
    layers = config.num_hidden_layers
    if not settings.lora_rank:
        return [_kept_by_layer(config, settings, list(LORA_TARGETS))] * layers
    adapted = layer_numbers(settings.lora_layers, layers)
    return [
        _kept_by_layer(config, settings, settings.targets if layer in adapted else [])
        for layer in range(adapted[0], layers)
    ]


def _kept_by_layer(config: LlamaConfig, settings: Settings, inputs: list[str]) -> int:
    """`inputs`: the linear layers whose inputs are needed, for their own gradient or for an adapter's."""
    d, f = config.hidden_size, config.intermediate_size
    q, k = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    compute, stream = _compute(settings), _stream(settings)
    full = not settings.lora_rank
    kept = 2 * 4 * (d + 1)  # both norms' inputs in float32 and their scales
    kept += 2 * stream * d if full else 0  # what the norms' weights multiply
    kept += compute * (2 * q + 2 * k) + 4 * config.num_attention_heads  # q, k, v, attention's output, its logsumexp
    kept += 3 * compute * f  # gate, silu(gate), up
    widths = {name: pair[0] for name, pair in linears(config).items()}
    autocast = compute != stream
    if full:
        copies = {"q_proj": 3 if autocast else 1, "gate_proj": 2 if autocast else 1, "down_proj": 1}
        return kept + compute * sum(copies[name] * widths[name] for name in copies)
    # An adapter works on float32: what is narrower is widened, and what autocast narrows is narrowed, once for each.
    own = autocast or stream < 4
    for group in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("down_proj",), ("o_proj",)):
        users = sum(name in inputs for name in group)
        kept_already = group == ("o_proj",)  # attention's output
        copies_here = users if own else min(1, users) * (not kept_already)
        kept += copies_here * widths[group[0]] * (compute if autocast else 4)
    return kept + len(inputs) * settings.lora_rank * (compute if autocast else 4)


def _kept_outside(config: LlamaConfig, settings: Settings) -> int:
    """Bytes per position: the last norm's, and the rotations."""
    d = config.hidden_size
    return 4 * (d + 1) + (0 if settings.lora_rank else _stream(settings) * d) + 2 * config.head_dim * _stream(settings)
