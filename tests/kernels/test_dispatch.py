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


def test_the_import_is_light_and_a_machine_without_triton_can_use_the_cpu_path():
    code = (
        "import sys, torch; sys.modules['triton'] = None\n"
        "import kernels\n"
        "print([name for name in ('minillama', 'kernels.reference', 'matplotlib') if name in sys.modules])\n"
        "r = kernels.fused_logits([torch.tensor([[0.0, 2.0, 1.0]])], [1.0], top_k=2)\n"
        "h = kernels.fused_head([torch.ones(1, 2)], [torch.ones(3, 2)], [1.0])\n"
        "print(r.token.item(), h.token.item())"
    )
    done = in_a_fresh_process(code)
    assert done.stdout.split() == ["[]", "1", "0"], done.stderr


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


def test_tensors_and_the_environment_pick_a_path(monkeypatch):
    monkeypatch.delenv("COLLAB_KERNELS", raising=False)
    assert backend(torch.device("cpu")) == "cpu"
    assert backend(torch.device("cuda")) == "triton"
    for name in ("cpu", "eager"):
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
    monkeypatch.setenv("COLLAB_KERNELS", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        fused_logits([torch.zeros(1, 5)], [1.0])
