"""Which implementation is picked, and what importing the package must not do."""

import os
import subprocess
import sys

import pytest
import torch

import kernels
from kernels import backend, fused_logits


def in_a_fresh_process(code, **environment):
    clean = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "COLLAB_KERNELS")}
    return subprocess.run([sys.executable, "-c", code], env=clean | environment, capture_output=True, text=True)


def test_a_machine_without_triton_can_use_the_cpu_path():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, kernels\n"
        "r = kernels.fused_logits([torch.tensor([[0.0, 2.0, 1.0]])], [1.0], top_k=2)\n"
        "h = kernels.fused_head([torch.ones(1, 2)], [torch.ones(3, 2)], [1.0])\n"
        "print(r.token.item(), h.token.item(), 'matplotlib' in sys.modules)"
    )
    done = in_a_fresh_process(code)
    assert done.stdout.split() == ["1", "0", "False"], done.stderr


def test_the_import_is_light():
    code = (
        "import sys, torch\n"
        "torch.backends.mkldnn.is_available = torch.backends.cpu.get_cpu_capability = None  # calling them would fail\n"
        "import kernels\n"
        "print([name for name in ('triton', 'minillama', 'kernels.reference') if name in sys.modules])"
    )
    done = in_a_fresh_process(code)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_package_has_no_version_for_transformers_to_mistake():
    assert not hasattr(kernels, "__version__")
    code = (
        "import kernels\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "c = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_attention_heads=2)\n"
        "import torch; print(tuple(LlamaForCausalLM(c)(torch.tensor([[1, 2]])).logits.shape))"
    )
    done = in_a_fresh_process(code)
    assert done.stdout.strip() == "(1, 2, 8)", done.stderr


@pytest.mark.parametrize("name", ["cpu", "eager"])
def test_the_environment_forces_a_path(monkeypatch, name):
    monkeypatch.setenv("COLLAB_KERNELS", name)
    assert backend(torch.device("cpu")) == name
    assert fused_logits([torch.tensor([[0.0, 1.0]])], [1.0]).token.item() == 1


def test_an_unknown_or_impossible_path_is_refused(monkeypatch):
    monkeypatch.setenv("COLLAB_KERNELS", "fast")
    with pytest.raises(ValueError, match="triton, cpu or eager"):
        backend(torch.device("cpu"))
    monkeypatch.setenv("COLLAB_KERNELS", "cpu")
    with pytest.raises(ValueError, match="cannot read"):
        backend(torch.device("cuda"))


def test_tensors_choose_where_nothing_is_forced(monkeypatch):
    monkeypatch.delenv("COLLAB_KERNELS", raising=False)
    assert backend(torch.device("cpu")) == "cpu"
    assert backend(torch.device("cuda")) == "triton"
