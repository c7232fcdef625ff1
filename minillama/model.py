"""Llama 3: RMSNorm, grouped-query attention, rotary position embedding (RoPE), SwiGLU.

Module names are Hugging Face's, so a checkpoint's tensors load without a table. `KVCache` owns all state between calls.
Nothing here knows batches of sentences, other models or training.
"""

# B batch  T new positions  S cached positions  D model width  H query heads  K key/value heads  G = H/K  C head width
# F feed-forward width  V vocabulary

import math
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minillama.cache import KVCache
from minillama.config import LlamaConfig
from minillama.files import atomic_folder, resolve_folder
from minillama.packed_attention import PackedSequences
from minillama.weights import check_shapes, load_weights, open_folder, write_checkpoint


@lru_cache(maxsize=64)
def rope_frequencies(config: LlamaConfig, device: torch.device) -> Tensor:
    """Angular frequencies (C/2,) float32, with the `llama3` scaling of the Llama 3.1 release where it is set."""
    channels = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float()
    frequencies = 1.0 / (config.rope_theta ** (channels / config.head_dim))
    if (scaling := config.rope_scaling) is not None:
        periods = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
        ramp = (periods - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        keep = ramp.clamp(0, 1)
        frequencies = (1 - keep) * frequencies / scaling.factor + keep * frequencies
    return frequencies.to(device)


def rope_cos_sin(config: LlamaConfig, positions_BT: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine (B, T, 1, C) of every position's angles, computed in float32."""
    angles = positions_BT[..., None].float() * rope_frequencies(config, positions_BT.device)
    angles_BT1C = torch.cat((angles, angles), dim=-1)[:, :, None]
    return angles_BT1C.cos().to(dtype), angles_BT1C.sin().to(dtype)


def apply_rope(x_BTHC: Tensor, cos_BT1C: Tensor, sin_BT1C: Tensor) -> Tensor:
    """Rotate channel pairs by their angles, in Hugging Face's layout: channel c is paired with c + C/2."""
    first, second = x_BTHC.chunk(2, dim=-1)
    return x_BTHC * cos_BT1C + torch.cat((-second, first), dim=-1) * sin_BT1C


class Linear(nn.Linear):
    def reset_parameters(self) -> None:
        # Random numbers on the meta device would import torch's compiler, which takes seconds and 150 MB.
        if not self.weight.is_meta:
            super().reset_parameters()


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        width, bias = config.hidden_size, config.attention_bias
        self.q_proj = Linear(width, self.heads * self.head_dim, bias=bias)
        self.k_proj = Linear(width, self.kv_heads * self.head_dim, bias=bias)
        self.v_proj = Linear(width, self.kv_heads * self.head_dim, bias=bias)
        self.o_proj = Linear(self.heads * self.head_dim, width, bias=bias)

    def forward(self, x_BTD: Tensor, context: "ForwardContext") -> Tensor:
        batch, count, _ = x_BTD.shape
        q_BTHC = self.q_proj(x_BTD).view(batch, count, self.heads, self.head_dim)
        k_BTKC = self.k_proj(x_BTD).view(batch, count, self.kv_heads, self.head_dim)
        v_BTKC = self.v_proj(x_BTD).view(batch, count, self.kv_heads, self.head_dim)
        q_BHTC = apply_rope(q_BTHC, context.cos, context.sin).transpose(1, 2)
        k_BKTC = apply_rope(k_BTKC, context.cos, context.sin).transpose(1, 2)
        out_BHTC = context.attend(self.layer, q_BHTC, k_BKTC, v_BTKC.transpose(1, 2))
        return self.o_proj(out_BHTC.transpose(1, 2).reshape(batch, count, self.heads * self.head_dim))


class MLP(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(width, inner, bias=bias)
        self.up_proj = Linear(width, inner, bias=bias)
        self.down_proj = Linear(inner, width, bias=bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


class Layer(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x_BTD: Tensor, context: "ForwardContext") -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), context)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class ForwardContext:
    """What all layers of one forward share: positions, RoPE factors and the attention mask.

    Without a cache every row is one causal sequence (right padding is harmless: no token before it sees it), or with
    `packed` several sequences. With a cache, a query at position p sees its sequence's keys 0..p.
    """

    def __init__(
        self,
        config: LlamaConfig,
        x: Tensor,
        positions_BT: Tensor,
        cache: KVCache | None,
        packed: PackedSequences | None,
    ) -> None:
        self.cos, self.sin = rope_cos_sin(config, positions_BT, x.dtype)
        self.positions_BT = positions_BT
        self.cache = cache
        self.packed = None if packed is None else packed.attention(x.device, x.dtype, config.head_dim)
        self.groups = config.num_attention_heads // config.num_key_value_heads
        if cache is not None:
            keys_S = torch.arange(cache.filled, device=positions_BT.device)
            visible_BTS = keys_S <= positions_BT[..., None]
            mask_BTS = x.new_zeros(visible_BTS.shape).masked_fill_(~visible_BTS, float("-inf"))
            # The G query heads of a group are folded into the query axis, so keys and values are read once, unexpanded.
            self.mask = mask_BTS[:, None, None].expand(-1, -1, self.groups, -1, -1).flatten(2, 3)

    def attend(self, layer: int, q_BHTC: Tensor, k_BKTC: Tensor, v_BKTC: Tensor) -> Tensor:
        if self.packed is not None:
            return self.packed.attend(q_BHTC, k_BKTC, v_BKTC)
        if self.cache is None:
            return F.scaled_dot_product_attention(q_BHTC, k_BKTC, v_BKTC, is_causal=True, enable_gqa=self.groups > 1)
        batch, heads, count, width = q_BHTC.shape
        k_BKSC, v_BKSC = self.cache.write(layer, k_BKTC, v_BKTC, self.positions_BT)
        q_BKGTC = q_BHTC.reshape(batch, heads // self.groups, self.groups * count, width)
        out = F.scaled_dot_product_attention(q_BKGTC, k_BKSC, v_BKSC, attn_mask=self.mask)
        return out.view(batch, heads, count, width)


class Decoder(nn.Module):
    """The part that Hugging Face names `model.`: embedding, layers, last norm.

    checkpoint_activations: keep only each layer's input for backward and recompute the layer there.
    """

    checkpoint_activations = False

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, tokens_BT: Tensor, positions_BT: Tensor | None, cache: KVCache | None, packed: PackedSequences | None
    ) -> Tensor:
        batch, count = tokens_BT.shape
        if packed is not None:
            if cache is not None or positions_BT is not None or (batch, count) != (1, packed.total):
                raise ValueError(f"packed sequences are one row (1, {packed.total}) with neither cache nor positions")
            positions_BT = packed.positions(tokens_BT.device)
        elif cache is not None:
            if cache.batch_size != batch:
                raise ValueError(f"{batch} rows of tokens, but the cache has {cache.batch_size} sequences")
            positions_BT = cache.extend(count, positions_BT)
        elif positions_BT is None:
            positions_BT = torch.arange(count, device=tokens_BT.device)[None]
        x_BTD = self.embed_tokens(tokens_BT)
        context = ForwardContext(self.config, x_BTD, positions_BT, cache, packed)
        for layer in self.layers:
            if self.checkpoint_activations and torch.is_grad_enabled():
                x_BTD = checkpoint(layer, x_BTD, context, use_reentrant=False, preserve_rng_state=False)
            else:
                x_BTD = layer(x_BTD, context)
        return self.norm(x_BTD)


class Llama(nn.Module):
    """`Llama(config).init_weights(seed)` is an untrained model, `Llama.from_pretrained(DIR)` a trained one."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size, bias=False)
        # Ids that end a text, of config.json and generation_config.json; a chat format adds its end-of-turn token.
        self.stop_tokens: tuple[int, ...] = config.eos_token_id

    @property
    def output_weight(self) -> Tensor:
        """(V, D): logits = hidden @ output_weight.T"""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.embed_tokens.weight.dtype

    def hidden(
        self,
        tokens: Tensor,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
        packed: PackedSequences | None = None,
    ) -> Tensor:
        """Hidden states (B, T, D) after the last norm, for tokens (B, T) int64.

        cache: append the T positions to each sequence, after its last position or at `positions` (B, T).
        packed: the single row (1, T) holds several sequences that do not see each other.
        Raises ValueError where the cache has another number of sequences or one would run past its capacity.
        """
        return self.model(tokens, positions, cache, packed)

    def forward(self, tokens: Tensor, cache: KVCache | None = None, positions: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) for tokens (B, T); see `hidden`."""
        return F.linear(self.hidden(tokens, cache, positions), self.output_weight)

    @torch.no_grad()
    def init_weights(self, seed: int = 0, std: float = 0.02) -> "Llama":
        """Set random weights, the same on every device for a seed: normal(0, std), biases 0, norms 1."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
        return self

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> "Llama":
        """Load a folder (or hub id) in Hugging Face's or Meta's layout; dtype None keeps the checkpoint's own.

        Tensors are memory-mapped: at most the model itself and one group of tensors are in memory. Raises InputError,
        before a weight is read, for a model that cannot be run.
        """
        checkpoint = open_folder(resolve_folder(folder))
        with torch.device("meta"):
            model = cls(checkpoint.config)
        check_shapes(model, checkpoint)
        load_weights(model, checkpoint, dtype, device)
        model.stop_tokens = checkpoint.stop_tokens
        return model.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write, atomically, a folder that transformers, vLLM and llama.cpp's converter read."""
        with atomic_folder(Path(folder)) as temporary:
            self.write_files(temporary)

    def write_files(self, folder: Path) -> None:
        """Write the model's files into an existing folder, for a caller that adds others to it."""
        write_checkpoint(folder, self.config, self.stop_tokens, self.state_dict(), self.dtype)
