"""The peak memory of two training steps, measured: `python tests/train/peak.py '{"hidden_size": 512, …}' '{…}' N`.

Each rank prints, in bytes, the highest resident memory of its process over what it held before the model was made,
after a small model had been trained to load what PyTorch loads on first use. N: positions of a forward pass. The C
library returns freed blocks at once (by its environment variables), so the peak is what was in use.
"""

import json
import sys
import tempfile
from pathlib import Path

from ranks import finish, start


def measured_peak(config: dict, settings: dict, positions: int, ranks: int = 1) -> int:
    """Bytes of the rank that held the most, each in a process of its own."""
    argv = [__file__, json.dumps(config), json.dumps(settings), str(positions)]
    give_back = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    return max(map(int, finish(start(ranks, argv, OMP_NUM_THREADS=str(2 // ranks), **give_back))))


def train(config: dict, settings: dict, positions: int, world) -> None:
    import torch

    from minillama import Llama, LlamaConfig
    from train.config import Settings
    from train.lora import add_adapters
    from train.metrics import Reporter
    from train.packing import Example
    from train.trainer import Trainer

    settings = Settings(epochs=2, checkpoint_every=1000, **settings)
    model = add_adapters(
        Llama(LlamaConfig.from_dict(config, "peak")).init_weights(0).to(getattr(torch, settings.dtype)), settings
    )
    share = -(-settings.batch_size // world.size)
    length = positions // min(settings.micro_batch_size or share, share)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config["vocab_size"], (settings.batch_size, length + 1), generator=generator).tolist()
    with tempfile.TemporaryDirectory() as output:
        trainer = Trainer(model, [Example(row, 1) for row in tokens], [], settings, Path(output), world)
        trainer.checkpoints.save = lambda *arguments: None  # the steps alone are measured
        trainer.run(False, Reporter(silent=True))


def memory(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise ValueError(field)


def main() -> None:
    from train.distributed import started

    config, settings = json.loads(sys.argv[1]), json.loads(sys.argv[2])
    small = {**config, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 100, "num_hidden_layers": 1}
    with started("cpu") as world:
        train(small, settings, 32, world)
        Path("/proc/self/clear_refs").write_text("5")  # the highest mark starts again from here
        before = memory("VmRSS")
        train(config, settings, int(sys.argv[3]), world)
        print(memory("VmHWM") - before)


if __name__ == "__main__":
    main()
