"""Loading peaks at 1.1 times the model's size, for every dtype and layout of the files."""

import json
import subprocess
import sys

import pytest
import torch
from meta_names import meta_name

from minillama import Llama, LlamaConfig

# Peak of resident memory, mapped file pages included, above that of the imports. Every parameter is read, so that a
# model that is only a map of its file counts with its size.
MEASURE = """
import sys, torch
from pathlib import Path
from minillama import Llama, LlamaConfig

def resident(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))

torch.set_num_threads(1)
torch.ones(8, 8, dtype=torch.bfloat16).float() @ torch.ones(8, 8)
Path("/proc/self/clear_refs").write_text("5")  # reset the peak
before = resident("VmRSS")
model = Llama.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
loading = resident("VmHWM") - before
parts = (part for parameter in model.parameters() for part in parameter.detach().flatten().split(1 << 16))
total = sum(float(part.double().sum()) for part in parts)
size = sum(parameter.nbytes for parameter in model.parameters())
print(size, loading, resident("VmHWM") - before, total)
"""

CONFIG = LlamaConfig(vocab_size=48000, hidden_size=640, intermediate_size=2048, num_hidden_layers=16,
                     num_attention_heads=10, num_key_value_heads=5, head_dim=64, tie_word_embeddings=True)  # fmt: skip


def constant_model(dtype):
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            model = Llama(CONFIG)
    finally:
        torch.set_default_dtype(torch.float32)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.25)
    return model


def measure(folder, dtype):
    run = subprocess.run([sys.executable, "-c", MEASURE, folder, dtype], capture_output=True, text=True, check=True)
    size, loading, peak, total = run.stdout.split()
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in Llama(CONFIG).parameters())
    assert float(total) == 0.25 * count
    return int(size), int(loading), int(peak)


def save_in_metas_layout(model, folder):
    tensors = {meta_name(name): parameter.detach() for name, parameter in model.named_parameters()}
    torch.save(tensors, folder / "consolidated.00.pth")
    params = {"dim": 640, "n_layers": 16, "n_heads": 10, "n_kv_heads": 5, "multiple_of": 256, "ffn_dim_multiplier": 1.2}
    (folder / "params.json").write_text(json.dumps(params))


SAFETENSORS, META = "safetensors", "Meta's layout"


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.parametrize(
    ("layout", "stored", "loaded"),
    [
        (SAFETENSORS, "bfloat16", "float32"),
        slow(SAFETENSORS, "float32", "float32"),
        slow(SAFETENSORS, "float32", "float16"),
        slow(META, "bfloat16", "float32"),
        (META, "bfloat16", "bfloat16"),
    ],
)
def test_loading_peaks_at_the_models_size_and_one_tenth(layout, stored, loaded, tmp_path):
    model = constant_model(getattr(torch, stored))
    if layout == SAFETENSORS:
        model.save_pretrained(tmp_path)
    else:
        save_in_metas_layout(model, tmp_path)
    size, loading, peak = measure(tmp_path, loaded)
    assert size > 100e6
    assert peak > 0.9 * size  # the model is really in memory
    assert max(loading, peak) < 1.1 * size, f"{max(loading, peak) / size:.3f} of the model's size"
