"""Weights in and out: Hugging Face's safetensors layout, and Meta's `consolidated.*.pth`.

`open_folder` reads the configuration and the shape of every tensor, no data. When all shapes fit, data is read tensor
by tensor from a memory map, which is reopened from time to time to release its pages.
"""

import json
import math
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from minillama.config import LlamaConfig, read_config, read_json, token_ids
from minillama.errors import InputError
from minillama.files import umask

# Mapped pages count as the process's memory; the map is reopened after this many bytes to release them.
MAPPED_BYTES = 8 << 20
# The dtypes that can be loaded, by safetensors' names.
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Checkpoint:
    """A model's folder before its data is read. What need not be loaded is in neither `shapes` nor `tensors`.

    dtype: the embedding's; tensors that are stored in another one are converted to it.
    tensors: yields (name, tensor) lazily, with Hugging Face's names.
    copy: tensors must be copied even where dtype and device fit, because a view would keep the whole map in memory.
    """

    folder: Path
    config: LlamaConfig
    stop_tokens: tuple[int, ...]
    dtype: torch.dtype
    shapes: dict[str, tuple[int, ...]]
    tensors: Callable[[], Iterator[tuple[str, Tensor]]]
    copy: bool = False

    @property
    def parameters(self) -> int:
        """The number of parameters, a tied output layer counted once."""
        return sum(map(math.prod, self.shapes.values()))


def open_folder(folder: Path) -> Checkpoint:
    """Read the configuration and all tensors' shapes; raises InputError where it is no Llama that can be run."""
    if (folder / "config.json").exists():
        return _open_hugging_face(folder)
    if (folder / "params.json").exists():
        return _open_meta(folder)
    raise InputError(f"{folder}: not a model: there is neither config.json (Hugging Face) nor params.json (Meta)")


def load_weights(
    model: nn.Module,
    checkpoint: Checkpoint,
    dtype: torch.dtype | None,
    device: torch.device | str,
    shard: Callable[[str, Tensor], Tensor] | None = None,
) -> None:
    """Fill a model that was built on the meta device; its shapes must fit, see `check_shapes`.

    dtype None: the checkpoint's.   shard: maps a whole tensor, by its name, to what this model holds of it.
    """
    copy = checkpoint.copy or shard is not None
    for name, tensor in checkpoint.tensors():
        owner, _, leaf = name.rpartition(".")
        tensor = tensor if shard is None else shard(name, tensor)
        tensor = tensor.to(device=device, dtype=dtype or checkpoint.dtype, copy=copy)
        setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor))


def check_shapes(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Raise InputError that names every missing, unexpected and misshapen tensor of the checkpoint."""
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    found = checkpoint.shapes
    faults = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "of another shape": [
            f"{name} {list(found[name])} instead of {list(expected[name])}"
            for name in sorted(expected.keys() & found.keys())
            if found[name] != expected[name]
        ],
    }
    if any(faults.values()):
        listed = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in faults.items() if names)
        raise InputError(f"{checkpoint.folder}: the tensors do not fit the configuration; {listed}")


def write_checkpoint(
    folder: Path, config: LlamaConfig, stop_tokens: tuple[int, ...], state: Mapping[str, Tensor], dtype: torch.dtype
) -> None:
    """Write config.json, generation_config.json and safetensors (sharded above 5 GB) into an existing folder."""
    from huggingface_hub import save_torch_state_dict

    name = str(dtype).removeprefix("torch.")
    # transformers 5 reads `dtype`, earlier releases and the converters `torch_dtype`.
    _write_json(folder / "config.json", {**config.to_dict(), "dtype": name, "torch_dtype": name})
    eos = list(stop_tokens)
    generation = {"bos_token_id": config.bos_token_id, "eos_token_id": eos[0] if len(eos) == 1 else eos or None}
    _write_json(folder / "generation_config.json", generation)
    whole = {name: tensor.detach().contiguous() for name, tensor in state.items()}
    # Views of one storage would be dropped as duplicates, so a view of a larger tensor is copied.
    owned = {name: x if x.untyped_storage().nbytes() == x.nbytes else x.clone() for name, x in whole.items()}
    save_torch_state_dict(owned, str(folder))
    for file in folder.glob("*.safetensors"):  # written readable by the owner only
        os.chmod(file, 0o666 & ~umask())


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_largest_first(
    shapes: Mapping[str, tuple[int, ...]], open_map: Callable[[], Any], read: Callable[[Any, str], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors from a memory map, the largest first, while little else is in memory."""
    remaining = sorted(shapes, key=lambda name: -math.prod(shapes[name]))
    while remaining:
        mapped, handle = 0, open_map()
        while remaining and mapped < MAPPED_BYTES:
            tensor = read(handle, remaining[0])
            mapped += tensor.nbytes
            yield remaining.pop(0), tensor
            del tensor
        del handle


def _refuse_quantised(path: Path, dtypes: Mapping[str, object], floats: Collection[object]) -> None:
    found = [f"{name} ({dtype})" for name, dtype in dtypes.items() if dtype not in floats]
    if found:
        raise InputError(f"{path}: quantised weights cannot be run; give the unquantised model: {', '.join(found)}")


def _open_hugging_face(folder: Path) -> Checkpoint:
    config = read_config(folder)
    stop_tokens = config.eos_token_id
    if (folder / "generation_config.json").exists():
        generation = read_json(folder / "generation_config.json")
        stop_tokens = tuple(dict.fromkeys(stop_tokens + token_ids(generation.get("eos_token_id"))))
    # Not loaded: RoPE tables of early checkpoints, and a tied output layer that was stored a second time.
    ignored = ("rotary_emb.inv_freq", *(("lm_head.weight",) if config.tie_word_embeddings else ()))
    files: dict[Path, dict[str, tuple[int, ...]]] = {}
    dtypes: dict[str, str] = {}
    for file in _weight_files(folder):
        with _open_safetensors(file) as handle:
            entries = {name: handle.get_slice(name) for name in handle.keys() if not name.endswith(ignored)}  # noqa: SIM118
            files[file] = {name: tuple(entry.get_shape()) for name, entry in entries.items()}
            dtypes |= {name: entry.get_dtype() for name, entry in entries.items()}
    _refuse_quantised(folder, dtypes, FLOATS)
    dtype = FLOATS[dtypes.get("model.embed_tokens.weight", "F32")]

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for file, shapes in files.items():
            yield from _read_largest_first(shapes, partial(_open_safetensors, file), safe_open.get_tensor)

    shapes = {name: shape for part in files.values() for name, shape in part.items()}
    return Checkpoint(folder, config, stop_tokens, dtype, shapes, tensors)


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise InputError(f"{index}: no weight_map")
        files = [folder / str(name) for name in sorted(set(weight_map.values()))]
        missing = [file.name for file in files if not file.exists()]
        if missing:
            raise InputError(f"{folder}: {index.name} names shards that are not there: {', '.join(missing)}")
        return files
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    raise InputError(f"{folder}: no model.safetensors and no {index.name}")


def _open_safetensors(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        size = os.path.getsize(file)
        raise InputError(f"{file}: truncated or damaged ({size:,} bytes; {error}); copy or download it again") from None


def _open_meta(folder: Path) -> Checkpoint:
    files = sorted(folder.glob("consolidated.*.pth"))
    if not files:
        raise InputError(f"{folder}: params.json without consolidated.*.pth")
    shards = [_map_pth(file) for file in files]
    meta_names = {_hugging_face_name(name): name for name in shards[0] if not name.startswith("rope.")}
    for name in meta_names.values():
        if incomplete := [file.name for shard, file in zip(shards, files) if name not in shard]:
            raise InputError(f"{folder}: {name} is missing from {', '.join(incomplete)}")
    if "tok_embeddings.weight" not in shards[0]:
        raise InputError(f"{files[0]}: no tok_embeddings.weight; is this a Llama checkpoint of Meta's?")
    without_data = [{name: tensor.to("meta") for name, tensor in shard.items()} for shard in shards]
    shapes = {name: tuple(_joined(meta_name, without_data).shape) for name, meta_name in meta_names.items()}
    tied = "lm_head.weight" not in shapes or _is_tied(shards)
    if tied:
        shapes.pop("lm_head.weight", None)
    params = folder / "params.json"
    config = LlamaConfig.from_meta(read_json(params), shapes["model.embed_tokens.weight"][0], tied, str(params))

    def read(shards: list[dict[str, Tensor]], name: str) -> Tensor:
        tensor = _joined(meta_names[name], shards)
        if not name.endswith(("q_proj.weight", "k_proj.weight")):
            return tensor
        # In a head, Meta's RoPE pairs channels (2c, 2c + 1), Hugging Face's (c, c + C/2).
        pairs = tensor.view(-1, config.head_dim // 2, 2, tensor.shape[1])
        return pairs.transpose(1, 2).reshape(tensor.shape)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        return _read_largest_first(shapes, lambda: [_map_pth(file) for file in files], read)

    dtype = shards[0]["tok_embeddings.weight"].dtype
    return Checkpoint(folder, config, config.eos_token_id, dtype, shapes, tensors, copy=True)


def _map_pth(file: Path) -> dict[str, Tensor]:
    try:
        tensors = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        reason = str(error).split("\n")[0]
        raise InputError(f"{file}: truncated, damaged or not a file of weights alone ({reason})") from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise InputError(f"{file}: not a Llama checkpoint of Meta's; expected a table of tensors by name")
    _refuse_quantised(file, {name: tensor.dtype for name, tensor in tensors.items()}, FLOATS.values())
    return tensors


META_NAMES = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def _hugging_face_name(name: str) -> str:
    """`layers.3.attention.wq.weight` -> `model.layers.3.self_attn.q_proj.weight`; unknown names stay as they are."""
    match = re.fullmatch(r"layers\.(\d+)\.(.+)\.weight", name)
    if match and match[2] in META_NAMES:
        return f"model.layers.{match[1]}.{META_NAMES[match[2]]}.weight"
    return META_NAMES.get(name, name)


def _joined(name: str, shards: list[dict[str, Tensor]]) -> Tensor:
    """Meta's model-parallel files split the inputs of wo and w2 and the outputs of the others (Llama 3)."""
    if len(shards) == 1 or shards[0][name].dim() != 2:  # vectors are in every file whole
        return shards[0][name]
    return torch.cat([shard[name] for shard in shards], dim=1 if name.endswith(("wo.weight", "w2.weight")) else 0)


def _is_tied(shards: list[dict[str, Tensor]]) -> bool:
    """Whether the output layer equals the embedding: the 1B and 3B checkpoints store the tied matrix twice."""
    return all(
        torch.equal(shard["output.weight"][:rows], shard["tok_embeddings.weight"][:rows])
        for rows in (64, None)  # most models differ in the first rows already
        for shard in shards
    )
