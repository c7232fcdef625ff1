"""Merge an adapter into its model: `python -m train.merge --model DIR --adapter DIR --output DIR`."""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from corpora import Prompt
from minillama.cli import Parser
from minillama.errors import InputError, exit_code
from minillama.files import atomic_folder, resolve_folder
from minillama.model import Llama
from minillama.tokenizer import Tokenizer
from train.config import DTYPES, check_output
from train.lora import CONFIG, load_adapter, merge

EXAMPLES = """examples:
  python -m train.merge --model meta-llama/Llama-3.2-1B --adapter runs/S_src-lora --output runs/S_src
"""


def main(argv: Sequence[str] | None = None) -> int:
    description = "Merge a LoRA adapter (of train.sft or of peft) into its model and save a normal folder."
    parser = Parser(prog="python -m train.merge", description=description, epilog=EXAMPLES)
    parser.add_argument("--model", required=True, metavar="DIR", help="the adapter's base: a folder or hub id")
    parser.add_argument("--adapter", required=True, metavar="DIR", help="folder with adapter_config.json")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the merged model")
    parser.add_argument("--save-dtype", default="", choices=DTYPES, help="of the file, if not the model's")
    arguments = parser.parse_args(argv)
    adapter, output = Path(arguments.adapter), Path(arguments.output)
    if not (adapter / CONFIG).is_file():
        raise InputError(f"--adapter {adapter}: no {CONFIG} in it")
    check_output(output, resume=False)
    base = resolve_folder(arguments.model)
    model = Llama.from_pretrained(base)
    load_adapter(model, adapter)
    merge(model)
    save_like(base, adapter, model, arguments.save_dtype, output)
    print(f"{output}: {arguments.model} with {adapter} merged", file=sys.stderr)
    return 0


def save_like(base: Path, prompt: Path, model: Llama, save_dtype: str, output: Path) -> None:
    """Save a model with the tokenizer of `base` and, if there is one, the prompt of the folder `prompt`."""
    if save_dtype:
        model.to(getattr(torch, save_dtype))
    with atomic_folder(output) as folder:
        model.write_files(folder)
        Tokenizer.from_pretrained(base).save(folder)
        if (prompt / "prompt.toml").exists():
            Prompt.load(prompt).save(folder)


if __name__ == "__main__":
    sys.exit(exit_code(main))
