"""The configuration of a Llama: read from Hugging Face's `config.json` or Meta's `params.json`, written as the former.

A configuration that this model cannot run is refused here, by name, before a weight is read.
"""

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from minillama.errors import InputError

REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@dataclass(frozen=True)
class RopeScaling:
    """The `llama3` scaling: low frequencies are divided by `factor`, high ones unchanged, with a ramp between them."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class LlamaConfig:
    """The fields have the names of Hugging Face's `config.json`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in (*REQUIRED, "num_key_value_heads", "head_dim", "max_position_embeddings"):
            _check_positive(name, getattr(self, name))
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise InputError(f"head_dim {self.head_dim} is odd; rotary embeddings rotate pairs of channels")

    @classmethod
    def from_dict(cls, config: dict[str, Any], where: str = "config.json") -> "LlamaConfig":
        """Read a Hugging Face configuration; raises InputError that names the first unsupported setting."""
        _refuse_unsupported(config, where)
        missing = [name for name in REQUIRED if config.get(name) is None]
        if missing:
            raise InputError(f"{where}: no {', '.join(missing)}; is this a Llama's configuration?")
        theta, scaling = _read_rope(config, where)
        heads, width = config["num_attention_heads"], config["hidden_size"]
        given = {field.name: config[field.name] for field in fields(cls) if config.get(field.name) is not None}
        given |= {"rope_theta": theta, "rope_scaling": scaling, "eos_token_id": token_ids(config.get("eos_token_id"))}
        try:
            for name in ("hidden_size", "num_attention_heads"):  # divided below
                _check_positive(name, config[name])
            # Hugging Face's defaults, where they are not this class's.
            defaults = {"num_key_value_heads": heads, "head_dim": width // heads, "rms_norm_eps": 1e-6}
            return cls(**(defaults | given))
        except InputError as error:
            raise InputError(f"{where}: {error}") from None

    @classmethod
    def from_meta(
        cls, params: dict[str, Any], vocab_size: int, tied: bool, where: str = "params.json"
    ) -> "LlamaConfig":
        """Read Meta's `params.json`; not all releases have the vocabulary size in it, so that of the weights is passed.

        The feed-forward width is Meta's: two thirds of 4 D, times a multiplier, rounded up. The factor of the RoPE
        scaling is that of Hugging Face's configurations: 32 for Llama 3.2's tied 1B and 3B, 8 for 3.1 and later.
        """
        for name in ("moe_args", "vision_chunk_size", "quantization_args", "lora_args"):
            if params.get(name):
                raise InputError(f"{where}: {name} is set; only dense, unquantised text Llamas can be run")
        for name in ("dim", "n_heads", "n_layers"):
            if not isinstance(params.get(name), int) or params[name] < 1:
                raise InputError(f"{where}: {name} is {params.get(name)!r}; is this Meta's params.json?")
        width, heads = params["dim"], params["n_heads"]
        hidden = int((params.get("ffn_dim_multiplier") or 1) * int(2 * 4 * width / 3))
        multiple = params.get("multiple_of", 256)
        scaled = params.get("use_scaled_rope")
        factor = float(params.get("rope_scaling_factor") or (32.0 if tied else 8.0))
        high = float(params.get("rope_high_freq_factor") or 4.0)
        is_llama3 = vocab_size >= 128000
        return cls(
            vocab_size=vocab_size,
            hidden_size=width,
            intermediate_size=multiple * math.ceil(hidden / multiple),
            num_hidden_layers=params["n_layers"],
            num_attention_heads=heads,
            num_key_value_heads=params.get("n_kv_heads") or heads,
            head_dim=width // heads,
            max_position_embeddings=params.get("max_seq_len", 131072 if scaled else 8192 if is_llama3 else 4096),
            rms_norm_eps=params.get("norm_eps", 1e-5),
            rope_theta=float(params.get("rope_theta", 10000.0)),
            rope_scaling=RopeScaling(factor, 1.0, high, 8192) if scaled else None,
            tie_word_embeddings=tied,
            bos_token_id=128000 if is_llama3 else 1,
            eos_token_id=(128001,) if is_llama3 else (2,),
        )

    def to_dict(self) -> dict[str, Any]:
        """A `config.json` that transformers 4 and 5, vLLM and llama.cpp's converter read as a LlamaForCausalLM.

        RoPE is written in both forms: `rope_theta` + `rope_scaling` (official files) and `rope_parameters`.
        """
        config = asdict(self)
        eos = self.eos_token_id
        config["eos_token_id"] = None if not eos else eos[0] if len(eos) == 1 else list(eos)
        scaling = {"rope_type": "llama3", **asdict(self.rope_scaling)} if self.rope_scaling else None
        config["rope_scaling"] = scaling
        config["rope_parameters"] = {"rope_theta": self.rope_theta, **(scaling or {"rope_type": "default"})}
        return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", **config}


def _check_positive(name: str, value: object) -> None:
    if not isinstance(value, int) or value < 1:
        raise InputError(f"{name} is {value!r}; it must be a whole number of at least 1")


def read_config(folder: Path) -> LlamaConfig:
    path = folder / "config.json"
    return LlamaConfig.from_dict(read_json(path), str(path))


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """`eos_token_id` of the files (one id, a list, or None) as a tuple."""
    return () if value is None else (value,) if isinstance(value, int) else tuple(value)


def _refuse_unsupported(config: dict[str, Any], where: str) -> None:
    model_type = config.get("model_type")
    if model_type != "llama":
        raise InputError(f"{where}: model_type is {model_type!r}; only 'llama' can be run")
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise InputError(f"{where}: the files are quantised ({method}); give the unquantised model")
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise InputError(f"{where}: hidden_act is {config['hidden_act']!r}; only 'silu' can be run")
    sliding = config.get("sliding_window") is not None and config.get("use_sliding_window", True)
    if sliding or "sliding_attention" in (config.get("layer_types") or ()):
        raise InputError(f"{where}: sliding-window attention is set; only full attention can be run")


def _read_rope(config: dict[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    """Read either form: `rope_theta` + `rope_scaling` (official files), `rope_parameters` (transformers 5)."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise InputError(f"{where}: the RoPE settings are {rope!r}; expected an object with rope_type")
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise InputError(f"{where}: partial_rotary_factor is {partial}; only 1 can be run")
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise InputError(f"{where}: rope type is {kind!r}; only 'default' and 'llama3' can be run")
    try:
        factor, low, high, context = (float(rope[field.name]) for field in fields(RopeScaling))
        scaling = RopeScaling(factor, low, high, int(context))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{where}: the llama3 rope scaling lacks a usable {error}") from None
    if not (scaling.factor > 0 and scaling.high_freq_factor > scaling.low_freq_factor > 0):
        raise InputError(
            f"{where}: the llama3 rope scaling needs factor > 0 and high_freq_factor > low_freq_factor > 0"
        )
    return theta, scaling
