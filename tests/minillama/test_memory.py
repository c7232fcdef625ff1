"""Loading peaks at 1.1 times the model's size, for every dtype and layout of the files."""

import json
import subprocess
import sys

import pytest
import torch

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

CONFIG = LlamaConfig(
    vocab_size=48000,
    hidden_size=640,
    intermediate_size=2048,
    num_hidden_layers=16,
    num_attention_heads=10,
    num_key_value_heads=5,
    head_dim=64,
    tie_word_embeddings=True,
)


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
    print(
        f"size {int(size):,}, peak of loading {int(loading) / int(size):.3f}, with all read {int(peak) / int(size):.3f}"
    )
    return int(size), int(loading), int(peak)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.parametrize(
    ("stored", "loaded"),
    [
        ("bfloat16", "float32"),
        pytest.param("float32", "float32", marks=pytest.mark.slow),
        pytest.param("float32", "float16", marks=pytest.mark.slow),
    ],
)
def test_loading_safetensors_peaks_at_the_models_size_and_one_tenth(stored, loaded, tmp_path):
    constant_model(getattr(torch, stored)).save_pretrained(tmp_path)
    size, loading, peak = measure(tmp_path, loaded)
    assert size > 200e6
    assert peak > 0.9 * size  # the model is really in memory
    assert max(loading, peak) < 1.1 * size, f"{max(loading, peak) / size:.3f} of the model's size"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.parametrize(
    ("stored", "loaded"), [pytest.param("bfloat16", "float32", marks=pytest.mark.slow), ("bfloat16", "bfloat16")]
)
def test_loading_metas_layout_peaks_at_the_models_size_and_one_tenth(stored, loaded, tmp_path):
    model = constant_model(getattr(torch, stored))
    names = {"self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
             "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
             "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm", "model.": "",
             "post_attention_layernorm": "ffn_norm", "embed_tokens": "tok_embeddings"}  # fmt: skip
    tensors = {}
    for name, parameter in model.named_parameters():
        for ours, metas in names.items():
            name = name.replace(ours, metas)
        tensors[name] = parameter.detach()
    torch.save(tensors, tmp_path / "consolidated.00.pth")
    params = {"dim": 640, "n_layers": 16, "n_heads": 10, "n_kv_heads": 5, "multiple_of": 256, "ffn_dim_multiplier": 1.2}
    (tmp_path / "params.json").write_text(json.dumps(params))
    size, loading, peak = measure(tmp_path, loaded)
    assert peak > 0.9 * size
    assert max(loading, peak) < 1.1 * size, f"{max(loading, peak) / size:.3f} of the model's size"
