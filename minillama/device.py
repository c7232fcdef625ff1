"""`--device` of every command line, as a torch.device."""

import torch

from minillama.errors import InputError


def pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device {name}: unknown; use cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {name}: not supported; use cpu, cuda or cuda:N")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            raise InputError(f"--device {name}: no CUDA device here; use --device cpu")
        if (device.index or 0) >= count:
            raise InputError(f"--device {name}: there are {count} CUDA devices, cuda:0 to cuda:{count - 1}")
    return device
