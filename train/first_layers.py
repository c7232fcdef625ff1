"""The first layers of a model as a smaller Llama with the same vocabulary, to train a draft model or an expert from.

Embedding, first N layers, last norm and output layer are the model's. Trained on the model's own output (`train.sft`),
it needs a fraction of the text that fresh weights need.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from minillama.cli import Parser
from minillama.errors import InputError, exit_code
from minillama.files import resolve_folder
from minillama.model import Llama
from train.config import DTYPES, check_output
from train.merge import save_like

EXAMPLES = """examples:
  python -m train.first_layers --model runs/smollm2 --layers 4 --output runs/drafter-start
"""


def first_layers(model: Llama, count: int) -> Llama:
    """A Llama of the model's first `count` layers; its weights are shared with the model, not copied.

    Raises InputError unless 1 <= count <= the model's layers.
    """
    layers = model.config.num_hidden_layers
    if not 1 <= count <= layers:
        raise InputError(f"--layers {count}: the model has {layers}, expected 1 to {layers}")
    with torch.device("meta"):
        cut = Llama(replace(model.config, num_hidden_layers=count))
    state = model.state_dict(keep_vars=True)
    cut.load_state_dict({name: state[name] for name in cut.state_dict()}, assign=True)
    cut.stop_tokens = model.stop_tokens
    return cut.eval()


def main(argv: Sequence[str] | None = None) -> int:
    description = "Save the first layers of a model as a normal folder, to train a draft model from."
    parser = Parser(prog="python -m train.first_layers", description=description, epilog=EXAMPLES)
    parser.add_argument("--model", required=True, metavar="DIR", help="a folder or hub id")
    parser.add_argument("--layers", required=True, type=int, metavar="N")
    parser.add_argument("--output", required=True, metavar="DIR")
    parser.add_argument("--save-dtype", default="", choices=DTYPES, help="of the file, if not the model's")
    arguments = parser.parse_args(argv)
    output = Path(arguments.output)
    check_output(output, resume=False)
    base = resolve_folder(arguments.model)
    model = first_layers(Llama.from_pretrained(base), arguments.layers)
    save_like(base, base, model, arguments.save_dtype, output)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{output}: {arguments.layers} layers of {arguments.model}, {parameters:,} parameters", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
