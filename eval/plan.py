"""What a study will take before it begins: steps, what is there already, hours and memory on named hardware.

Nothing is measured here. Training counts 6 floating-point operations a parameter and token (Kaplan et al. 2020, 2.1),
decoding the bytes of all members' weights a step; the shares of a device that these reach are settings of the study.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from eval.expressions import tables
from eval.graph import Named, Step, Store, in_order
from eval.steps import Steps
from eval.study import Hardware, Study
from minillama import InputError, LlamaConfig
from train.config import Settings
from train.memory import GIB, memory_of, shape_of

BYTES = {"": 4, "float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "auto": 2}


@dataclass(frozen=True)
class Cost:
    """Of one step on one device of a kind: hours, and GiB at the peak; None where nothing heavy is done."""

    hours: float
    gib: float | None


def shapes(study: Study) -> dict[str, LlamaConfig | None]:
    """The configuration of every model; None where it is known only when the model is made."""
    found: dict[str, LlamaConfig | None] = {}
    for label, model in study.models.items():
        if model.config:
            vocabulary = max(corpus.vocabulary for corpus in study.corpora.values())
            found[label] = LlamaConfig.from_dict(
                {"model_type": "llama", "vocab_size": vocabulary, **model.config}, label
            )
            continue
        try:
            whole = shape_of(model.shape or model.source or study.models[model.first_layers_of].shape)
            found[label] = replace(whole, num_hidden_layers=model.layers) if model.first_layers_of else whole
        except InputError:
            found[label] = None
    return found


def parameters(config: LlamaConfig) -> int:
    import torch

    from minillama import Llama

    with torch.device("meta"):
        return sum(p.numel() for p in Llama(config).parameters())


@dataclass
class Costs:
    """Hours and memory of each step of a study on one kind of device."""

    steps: Steps
    hardware: Hardware

    def __post_init__(self) -> None:
        self.shapes = shapes(self.steps.study)
        self.parameters = {label: parameters(config) if config else 0 for label, config in self.shapes.items()}

    def of(self, step: Step) -> Cost:
        if step.kind in ("cpt", "sft"):
            return self._training(step)
        if step.kind in ("decode", "fit"):
            return self._decoding(step)
        return Cost(0.0, None)

    def _training(self, step: Step) -> Cost:
        study, label = self.steps.study, step.about["model"]
        expect, options = study.expect, step.about["options"]
        part = step.about["part"]
        sentences = self._sentences(step, part)
        tokens = sentences * (expect.text_tokens if step.kind == "cpt" else expect.pair_tokens)
        epochs = int(options.get("epochs", 5 if step.kind == "cpt" else 3))
        flops = 6 * self.parameters[label] * tokens * epochs
        hours = flops / (self.hardware.tflops * 1e12 * self.hardware.training_share) / 3600
        return Cost(hours, self.training_gib(step, step.slots))

    def training_gib(self, step: Step, ranks: int) -> float | None:
        """GiB on each of so many devices at the peak of a training step; None where the model's shape is not known."""
        config, options = self.shapes[step.about["model"]], step.about["options"]
        if config is None:
            return None
        known = set(Settings.__dataclass_fields__)
        settings = Settings(**{key: value for key, value in options.items() if key in known})
        expect = self.steps.study.expect
        length = expect.text_tokens if step.kind == "cpt" else expect.pair_tokens
        positions = length * (settings.micro_batch_size or settings.batch_size)
        return memory_of(config, settings, positions, positions, ranks, "cuda").peak / GIB

    def _decoding(self, step: Step) -> Cost:
        study, expect = self.steps.study, self.steps.study.expect
        labels = [study.small if name.startswith("S_") else step.about["model"] for name in _members(step)]
        weights = sum(self.parameters[label] for label in labels)
        sentences = self._sentences(step, "dev" if step.kind == "fit" else "test")
        size = BYTES.get(study.decode.dtype, 4)
        if step.kind == "fit":
            flops = 2 * weights * sentences * (expect.prompt_tokens + expect.output_tokens)
            hours = flops / (self.hardware.tflops * 1e12 * self.hardware.training_share) / 3600
        else:
            passes = sentences * expect.output_tokens / study.decode.batch_size
            hours = passes * weights * size / (self.hardware.bandwidth_gbs * 1e9 * self.hardware.decoding_share) / 3600
        return Cost(hours, weights * size / GIB)

    def _sentences(self, step: Step, part: str) -> int:
        corpus = step.about.get("corpus") or self.steps.study.directions().get(step.about.get("direction", ""), "")
        corpora = self.steps.study.corpora
        corpus = corpus or next(name for name in corpora if name in step.name.split())
        lines = corpora[corpus].parts()[part].lines
        if lines:
            return lines[1] - lines[0] + 1
        return self.steps.study.expect.pairs.get(f"{corpus}.{part}", 1000)


def _members(step: Step) -> list[str]:
    return [
        word.name for before, word in zip(step.words, step.words[1:]) if isinstance(word, Named) and before == "--model"
    ]


def show(steps: Steps, order: Sequence[Step], store: Store, details: bool) -> list[str]:
    """The plan as lines: totals by kind of step, hours and memory on each kind of hardware."""
    study = steps.study
    states = {step.key: store.state(step) for step in order}
    counts = {state: list(states.values()).count(state) for state in ("done", "begun", "to do")}
    lines = [
        f"{study.title}: {len(order)} steps, {counts['done']} done, {counts['begun']} begun, {counts['to do']} to do"
    ]
    lines.append(f"work folder {store.work}, {len(study.run.devices) or study.run.jobs} step(s) at a time")
    kinds = list(dict.fromkeys(step.kind for step in order))
    for kind in kinds:
        of_kind = [step for step in order if step.kind == kind]
        done = sum(states[step.key] == "done" for step in of_kind)
        lines.append(f"  {kind:10} {len(of_kind):4}  {done} done")
    figures = sum(len(row.decode) for row in steps.rows if 6 in row.expression.tables or row.id.endswith("original"))
    lines.append(f"  rows {len(steps.rows)}, in {len(study.directions())} directions; Table 6 has {figures} figures")
    for name, hardware in study.hardware.items():
        costs = Costs(steps, hardware)
        of_steps = {step.key: costs.of(step) for step in order}
        left = [cost.hours for key, cost in of_steps.items() if states[key] != "done"]
        lines.append(
            f"on {name} ({hardware.memory_gib:g} GiB, {hardware.tflops:g} TFLOP/s, {hardware.bandwidth_gbs:g} GB/s on "
            f"paper; {hardware.training_share:.0%} and {hardware.decoding_share:.0%} of them expected; computed, not "
            f"measured): {sum(left):.1f} hours of one device"
        )
        for kind in ("cpt", "sft", "decode", "fit"):
            costed = [(step, of_steps[step.key]) for step in order if step.kind == kind]
            if not costed:
                continue
            largest = max(costed, key=lambda pair: pair[1].gib or 0.0)
            need = largest[1].gib or 0.0
            fits = "fits" if need <= hardware.memory_gib else f"does not fit{_advice(costs, largest[0])}"
            lines.append(
                f"  {kind:10} {sum(cost.hours for _, cost in costed):6.2f} h; most memory {need:,.1f} GiB "
                f"({largest[0].name}, {largest[0].slots} device(s)): {fits}"
            )
        lines.append("  of that " + ", ".join(_hours_by_table(steps, costs)))
    if details:
        lines += [f"{states[step.key]:6} {step.key[:10]}  {step.name}" for step in order]
    return lines


def _hours_by_table(steps: Steps, costs: Costs) -> list[str]:
    """What each of the paper's tables takes alone, from nothing."""
    larges = (steps.study.small, steps.study.larges[0])
    found = []
    for number in (2, 3, 4, 6):
        rows = [row for row in steps.rows if number in tables(row.expression, row.large in larges)]
        wanted = [step for row in rows for direction, step in row.decode.items() if _stands(number, direction)]
        if wanted:
            hours = sum(costs.of(step).hours for step in in_order(wanted))
            found.append(f"Table {number} alone {hours:.1f} h")
    return found


def _stands(number: int, direction: str) -> bool:
    """Tables 3 and 4 are of Japanese and English only, Table 3 of one sentence."""
    return number in (2, 6) or (set(direction.split("-")) == {"ja", "en"} and (number == 4 or direction == "ja-en"))


def _advice(costs: Costs, step: Step) -> str:
    """On how many devices a training step fits, if on any."""
    if step.kind not in ("cpt", "sft"):
        return ""
    for ranks in (2, 4, 8, 16, 32):
        need = costs.training_gib(step, ranks)
        if need is not None and need <= costs.hardware.memory_gib:
            return f", but on {ranks} devices: {need:,.1f} GiB each (train.ranks.{step.about['model']} = {ranks})"
    return " on 32 devices either; see python -m train.plan"
