"""The plan of a study before it runs: its steps, which are done, and the memory that each is predicted to need.

Training memory is `train.memory`'s prediction for the lengths that the study expects. Decoding and fitting count the
weights of all members, without caches.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from eval.study.config import Study
from eval.study.graph import Named, Step, Store
from eval.study.steps import Steps
from minillama import InputError, LlamaConfig
from train.config import Settings
from train.memory import GIB, memory_of, shape_of

WEIGHT_BYTES = {"": 4, "float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "auto": 2}


def plan_lines(steps: Steps, order: Sequence[Step], store: Store, gpu_memory: float | None, details: bool) -> list[str]:
    """Counts and the largest memory by kind of step; with `details` a line for each step too.

    gpu_memory: GiB of one device, against which every prediction is compared.
    """
    study = steps.study
    states = {step.key: store.state(step) for step in order}
    counts = [f"{list(states.values()).count(state)} {state}" for state in ("done", "begun", "to do")]
    lines = [
        f"{study.title}: {len(order)} steps, {', '.join(counts)}",
        f"work folder {store.work}, {len(study.run.devices) or study.run.jobs} step(s) at a time",
    ]
    memory = predicted_memory(study, order)
    for kind in dict.fromkeys(step.kind for step in order):
        of_kind = [step for step in order if step.kind == kind]
        done = sum(states[step.key] == "done" for step in of_kind)
        line = f"  {kind:10} {len(of_kind):4}  {done} done"
        predicted = [step for step in of_kind if step.key in memory]
        if predicted:
            largest = max(predicted, key=lambda step: memory[step.key])
            line += f"  at most {_gib(memory[largest.key], gpu_memory)}, {largest.processes} device(s): {largest.name}"
        lines.append(line)
    if details:
        for step in order:
            need = f"  {_gib(memory[step.key], gpu_memory)}" if step.key in memory else ""
            lines.append(f"{states[step.key]:6} {step.key[:10]}  {step.name}{need}")
    return lines


def _gib(need: float, limit: float | None) -> str:
    verdict = "" if limit is None else " (fits)" if need <= limit else " (does not fit)"
    return f"{need:,.1f} GiB{verdict}"


def predicted_memory(study: Study, order: Sequence[Step]) -> dict[str, float]:
    """GiB on each device at the peak, by the step's key, of the steps whose models have a known shape."""
    shapes = {label: shape for label in study.models if (shape := _shape(study, label)) is not None}
    weights = {label: _parameters(shape) * WEIGHT_BYTES.get(study.decode.dtype, 4) for label, shape in shapes.items()}
    found = {}
    for step in order:
        if step.kind in ("cpt", "sft") and step.model in shapes:
            found[step.key] = _training_gib(study, step, shapes[step.model])
        elif step.kind in ("decode", "fit"):
            named = [word for option, word in pairwise(step.arguments) if option == "--model"]
            names = [word.name for word in named if isinstance(word, Named)]
            members = [study.small if name.startswith("S_") else step.model for name in names]
            if all(member in shapes for member in members):
                found[step.key] = sum(weights[member] for member in members) / GIB
    return found


def _shape(study: Study, label: str) -> LlamaConfig | None:
    """A model's configuration; None where it is known only when the model is made."""
    model = study.models[label]
    if model.config:
        vocabulary = max(corpus.vocabulary for corpus in study.corpora.values())
        return LlamaConfig.from_dict({"model_type": "llama", "vocab_size": vocabulary, **model.config}, label)
    try:
        shape = shape_of(model.shape or model.source or study.models[model.first_layers_of].shape)
    except InputError:
        return None
    return replace(shape, num_hidden_layers=model.layers) if model.first_layers_of else shape


def _training_gib(study: Study, step: Step, shape: LlamaConfig) -> float:
    options = {key: value for key, value in step.options.items() if key in Settings.__dataclass_fields__}
    settings = Settings(**options)
    length = study.expect.text_tokens if step.kind == "cpt" else study.expect.pair_tokens
    positions = length * (settings.micro_batch_size or settings.batch_size)
    return memory_of(shape, settings, positions, positions, step.processes, "cuda").peak / GIB


def _parameters(shape: LlamaConfig) -> int:
    import torch

    from minillama import Llama

    with torch.device("meta"):
        return sum(p.numel() for p in Llama(shape).parameters())
