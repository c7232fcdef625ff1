"""Low-rank adapters (Hu et al., "LoRA", ICLR 2022): y = W x + (alpha / r) · B A x, W frozen, A and B trained.

Saved as `peft` saves them, so its `PeftModel.from_pretrained` reads them; a merged model is an ordinary one.
A and B are float32 whatever W is: bfloat16 would round their updates away.
"""

import json
import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minillama.config import read_json
from minillama.errors import InputError
from minillama.model import Linear, Llama
from train.config import Settings
from train.optim import hash_of

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# peft's prefix of module names, in front of our names of tensors
PREFIX = "base_model.model."


class LoraLinear(Linear):
    """A linear layer with an adapter. `weight` and `bias` are the frozen layer's and keep their names."""

    def __init__(self, base: nn.Linear, rank: int, scale: float) -> None:
        with torch.device("meta"):
            super().__init__(base.in_features, base.out_features, bias=base.bias is not None)
            self.lora_A = Linear(base.in_features, rank, bias=False)
            self.lora_B = Linear(rank, base.out_features, bias=False)
        self.weight, self.bias, self.scale = base.weight, base.bias, scale
        for adapter in (self.lora_A, self.lora_B):
            zeros = torch.zeros(adapter.weight.shape, dtype=torch.float32, device=base.weight.device)
            adapter.weight = nn.Parameter(zeros)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        low = F.linear(x.to(self.lora_A.weight.dtype), self.lora_A.weight)
        return y + (F.linear(low, self.lora_B.weight) * self.scale).to(y.dtype)

    def merged(self) -> Linear:
        """The ordinary layer that computes the same."""
        with torch.device("meta"):
            result = Linear(self.in_features, self.out_features, bias=self.bias is not None)
        update = self.lora_B.weight.double() @ self.lora_A.weight.double() * self.scale
        weight = (self.weight.double() + update).to(self.weight.dtype)
        result.weight, result.bias = nn.Parameter(weight.detach()), self.bias
        return result


def add_adapters(model: Llama, settings: Settings) -> Llama:
    """With a `lora_rank`, freeze the model and add adapters to the settings' layers: A random from the seed, B zero.

    Returns the model. Raises InputError for a layer number that it does not have.
    """
    if not settings.lora_rank:
        return model
    model.requires_grad_(False)
    scale = alpha_of(settings) / settings.lora_rank
    for number in layer_numbers(settings.lora_layers, model.config.num_hidden_layers):
        for local_name, linear in list(model.model.layers[number].named_modules()):
            if local_name.rpartition(".")[2] not in settings.targets or not isinstance(linear, nn.Linear):
                continue
            name = f"model.layers.{number}.{local_name}"
            layer = LoraLinear(linear, settings.lora_rank, scale)
            _replace(model, name, layer)
            generator = torch.Generator().manual_seed(settings.seed ^ hash_of(name))
            bound = 1 / math.sqrt(layer.in_features)  # kaiming_uniform with a = sqrt(5), as peft's
            fresh = torch.empty(layer.lora_A.weight.shape).uniform_(-bound, bound, generator=generator)
            with torch.no_grad():
                layer.lora_A.weight.copy_(fresh)
    return model


def alpha_of(settings: Settings) -> float:
    return settings.lora_alpha or 2.0 * settings.lora_rank


def layer_numbers(text: str, count: int) -> list[int]:
    """`0-3,12` as numbers, `all` as 0..count - 1. Raises InputError for numbers outside that range."""
    if text == "all":
        return list(range(count))
    numbers: set[int] = set()
    for part in text.replace(" ", "").split(","):
        first, _, last = part.partition("-")
        if not re.fullmatch(r"\d+(-\d+)?", part):
            raise InputError(f"--lora-layers {text}: {part!r} is no number and no range; expected for example 0-3,12")
        numbers.update(range(int(first), int(last or first) + 1))
    if not numbers or max(numbers) >= count:
        raise InputError(f"--lora-layers {text}: the model has the layers 0-{count - 1}")
    return sorted(numbers)


def merge(model: Llama) -> None:
    """Merge every adapter into its layer's weight, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLinear):
            _replace(model, name, module.merged())


def write_adapter(model: Llama, settings: Settings, base: str, folder: Path) -> None:
    """adapter_model.safetensors and adapter_config.json, as peft 0.1x writes and reads them, into a private folder."""
    tensors = {
        PREFIX + name: tensor.detach().cpu().contiguous()
        for name, tensor in model.state_dict().items()
        if ".lora_A." in name or ".lora_B." in name
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    alpha = alpha_of(settings)
    layers = layer_numbers(settings.lora_layers, model.config.num_hidden_layers)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": settings.lora_rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "target_modules": settings.targets,
        "layers_to_transform": None if settings.lora_layers == "all" else layers,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_adapter(model: Llama, folder: Path) -> None:
    """Add the adapter of a folder of peft's or `write_adapter`'s. Raises InputError if it does not fit the model."""
    config = read_json(folder / CONFIG)
    unsupported = [key for key in ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save") if config.get(key)]
    if config.get("bias", "none") != "none":
        unsupported.append("bias")
    if config.get("peft_type") != "LORA" or unsupported:
        what = ", ".join(unsupported) or f"peft_type {config.get('peft_type')}"
        raise InputError(f"{folder}: {what} cannot be merged; only plain LoRA can")
    if not all(isinstance(config.get(key), int | float) and config[key] > 0 for key in ("r", "lora_alpha")):
        raise InputError(f"{folder / CONFIG}: r and lora_alpha must be numbers above 0")
    rank = config["r"]
    scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder / WEIGHTS}: cannot be read ({error})") from None
    names = {key.removeprefix(PREFIX).rsplit(".lora_", 1)[0] for key in tensors}
    for name in sorted(names):
        linear = dict(model.named_modules()).get(name)
        if not isinstance(linear, nn.Linear):
            raise InputError(f"{folder}: the adapter has {name}, which the model does not have")
        layer = LoraLinear(linear, rank, scale)
        for part in ("lora_A", "lora_B"):
            adapter, tensor = getattr(layer, part), tensors.get(f"{PREFIX}{name}.{part}.weight")
            if tensor is None or tensor.shape != adapter.weight.shape:
                found = "missing" if tensor is None else str(list(tensor.shape))
                raise InputError(f"{folder}: {name}.{part} is {found}; expected {list(adapter.weight.shape)}")
            adapter.weight = nn.Parameter(tensor.float().to(layer.weight.device))
        _replace(model, name, layer)


def _replace(model: Llama, name: str, module: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, module)
