"""The steps of a study: text, models, experts, translations, fits and scores, with everything that each needs.

Steps are made on demand and identified by their keys, so an expert that two rows share is one step.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from corpora import language_name, prompt_names
from eval.study.config import Corpus, Model, Study
from eval.study.expressions import EXPRESSIONS, FINETUNING, FITTED, ORIGINAL, Expression, members
from eval.study.graph import Argument, Artifact, Input, Named, Step, Text
from minillama.errors import InputError

# The experts, and the side of the corpus that each is pre-trained on ("": none).
EXPERTS = {"S_MT": "", "S_srcMT": "source", "S_tgtMT": "target"}


@dataclass(frozen=True)
class StudyRow:
    """A line of the tables. decode: for each direction the step that translates the test text.

    large: label of the model L; the small model has its own rows.   fitted: label of the fit, if weights were fitted.
    """

    id: str
    large: str
    expression: Expression
    decode: Mapping[str, Step]
    fitted: str | None = None


@dataclass
class Steps:
    """The steps of one study. data: folder of the files that it names; here: folder of its TOML file."""

    study: Study
    data: Path
    here: Path
    made: dict[str, Step] = field(default_factory=dict)

    @cached_property
    def rows(self) -> list[StudyRow]:
        """In the order of the tables: the small model, then each large one."""
        study, rows = self.study, []
        for label in (study.small, *study.larges):
            rows.append(self._row(label, "original", ORIGINAL, partial(self._decode_alone, label, False)))
            if label in study.finetuning:
                rows.append(self._row(label, "finetuning", FINETUNING, partial(self._decode_alone, label, True)))
            if label == study.small:
                continue
            for name in study.expressions or EXPRESSIONS:
                rows.append(self._row(label, name, EXPRESSIONS[name], partial(self._decode_sum, label, name)))
            for fit in study.fit.fits:
                name, how, names = FITTED[fit]
                expression = Expression(f"Collab-MT, weights fitted ({how})", " + ".join(names), ())
                rows.append(self._row(label, name, expression, partial(self._decode_fitted, label, fit), how))
        return rows

    def _row(
        self, large: str, name: str, expression: Expression, decode: Callable[[str], Step], fitted: str | None = None
    ) -> StudyRow:
        steps = {direction: decode(direction) for direction in self.study.directions()}
        return StudyRow(f"{large}.{name}", large, expression, steps, fitted)

    @cached_property
    def scores(self) -> dict[tuple[str, str], Step]:
        """For each direction and each model, small or large, the step that scores all its rows."""
        return {
            (direction, large): self._score(direction, large)
            for direction in self.study.directions()
            for large in (self.study.small, *self.study.larges)
        }

    @cached_property
    def fits(self) -> dict[tuple[str, str, str], Step]:
        return {
            (direction, large, fit): self.fit(direction, large, fit)
            for direction in self.study.directions()
            for large in self.study.larges
            for fit in self.study.fit.fits
        }

    def targets(self) -> list[Step]:
        return [*self.scores.values(), *self.fits.values()]

    def part(self, corpus: str, name: str) -> Step:
        """The text of one purpose as one file for each language; `text` is one of the files."""
        part = self._corpus(corpus).parts()[name]
        languages = self._corpus(corpus).languages
        words: list[Argument] = ["eval.part", "--languages", *languages, "--pairs"]
        if part.split:
            words.append(part.split.format(seed=self.study.seed))
        else:
            words += [Input(self.data / part.files.format(language=language)) for language in languages]
        if part.lines:
            words += ["--lines", *map(str, part.lines)]
        return self._step(f"data {corpus} {name}", "data", (*words, "--output", "{step}/out"))

    def text(self, corpus: str, part: str, language: str) -> Artifact:
        return Artifact(self.part(corpus, part), f"out/{language}.txt")

    def model(self, corpus: str, label: str) -> Argument:
        """The folder of a model before the study trains experts from it."""
        model = self.study.models[label]
        if model.source:
            return Input(Path(model.source)) if Path(model.source).is_dir() else model.source
        if model.module:
            words: tuple[Argument, ...] = (model.module, "--output", "{step}/out")
            return Artifact(self._step(f"model {label}", "model", words))
        if model.first_layers_of:
            whole = self.model(corpus, model.first_layers_of)
            words = ("train.first_layers", "--model", whole, "--layers", str(model.layers), "--output", "{step}/out")
            cut = Artifact(self._step(f"model {label}", "model", words))
            return Artifact(self._pretrain(corpus, label, model, ("--model", cut))) if model.cpt else cut
        config = Text("config.json", json.dumps(self._config(corpus, model), indent=2) + "\n")
        start = ("--init", config, "--tokenizer", Artifact(self._tokenizer(corpus)))
        base = Artifact(self._pretrain(corpus, label, model, start))
        if not model.sft:
            return base
        languages = self._corpus(corpus).languages
        pairs = self._pairs(corpus, "general", languages)
        command = ("train.sft", "--model", base, *pairs, *self._valid(corpus, languages))
        options = {"both_directions": True, **model.sft}
        return Artifact(self._train(f"sft {corpus} {label}", command, label, options))

    def expert(self, direction: str, name: str) -> Artifact:
        """S_MT, S_srcMT or S_tgtMT of one direction."""
        corpus = self.study.directions()[direction]
        start = self.model(corpus, self.study.small)
        side = EXPERTS[name]
        if side:
            language = direction.split("-")[side == "target"]
            words = ("train.cpt", "--model", start, "--text", self.text(corpus, "cpt", language))
            title = f"cpt {corpus} {language}"
            start = Artifact(self._train(title, words, self.study.small, self.study.train.cpt))
        return self._tuned(direction, f"sft {direction} {name}", start, self.study.small, self.study.train.sft)

    def finetuned(self, direction: str, label: str) -> Artifact:
        """A model fine-tuned on the parallel text; of the small model that is S_MT."""
        if label == self.study.small:
            return self.expert(direction, "S_MT")
        start = self.model(self.study.directions()[direction], label)
        options = {**self.study.train.sft, **self.study.train.finetuning}
        ranks = self.study.train.ranks.get(label, 1)
        return self._tuned(direction, f"sft {direction} {label}", start, label, options, ranks)

    def member(self, direction: str, large: str, name: str) -> Argument:
        """The folder of a member of an expression, by its name there."""
        if name in EXPERTS:
            return self.expert(direction, name)
        return self.model(self.study.directions()[direction], self.study.small if name == "S_all" else large)

    def fit(self, direction: str, large: str, kind: str) -> Step:
        """Fits weights on the corpus's dev text: `weights.toml` in the step's folder."""
        corpus, (source, target) = self.study.directions()[direction], direction.split("-")
        _, _, names = FITTED[kind]
        words: list[Argument] = ["decode.tune", *self._models(direction, large, names), "--combine"]
        words += [EXPRESSIONS["collab"].combine if kind == "likelihood" else " + ".join(names)]
        words += ["--source", source, "--target", target, "--input", self.text(corpus, "dev", source)]
        words += ["--reference", self.text(corpus, "dev", target), "--output", "{step}/weights.toml"]
        if self.study.fit.l2:
            words += ["--l2", str(self.study.fit.l2)]
        for expression in (ORIGINAL, *EXPRESSIONS.values()):
            if set(members(expression.combine)) <= set(names):
                words += ["--against", expression.combine]
        title = f"fit {direction} {large} {kind}"
        return self._step(title, "fit", (*words, *self._dtype()), model=large)

    def _decode_alone(self, label: str, tuned: bool, direction: str) -> Step:
        """One model without experts, as it was or fine-tuned."""
        corpus = self.study.directions()[direction]
        folder = self.finetuned(direction, label) if tuned else self.model(corpus, label)
        words = ("--model", Named("L", folder), *([] if tuned else self._prompt_and_chat("L", label)))
        return self._decoded(direction, label, "finetuning" if tuned else "original", (*words, "--combine", "L"))

    def _decode_sum(self, large: str, name: str, direction: str) -> Step:
        combine = EXPRESSIONS[name].combine
        words = (*self._models(direction, large, members(combine)), "--combine", combine)
        return self._decoded(direction, large, name, words)

    def _decode_fitted(self, large: str, fit: str, direction: str) -> Step:
        name, _, names = FITTED[fit]
        weights = Artifact(self.fit(direction, large, fit), "weights.toml")
        return self._decoded(direction, large, name, (*self._models(direction, large, names), "--weights", weights))

    def _decoded(self, direction: str, large: str, name: str, words: tuple[Argument, ...]) -> Step:
        corpus, (source, target) = self.study.directions()[direction], direction.split("-")
        settings = self.study.decode
        words = ("decode.collab", *words, "--source", source, "--target", target)
        words = (*words, "--input", self.text(corpus, "test", source), "--output", "{step}/hyp.txt")
        words = (*words, "--max-new-tokens", str(settings.max_new_tokens), *self._dtype())
        unkeyed = ("--report", "{step}/run.json", "--resume", "--batch-size", str(settings.batch_size))
        title = f"decode {direction} {large}.{name}"
        return self._step(title, "decode", words, unkeyed, model=large)

    def _score(self, direction: str, large: str) -> Step:
        corpus, target = self.study.directions()[direction], direction.split("-")[1]
        rows = [row for row in self.rows if row.large == large]
        words: list[Argument] = ["eval.compare", "--reference", self.text(corpus, "test", target), "--target", target]
        for row in rows:
            words += ["--system", Named(row.id, Artifact(row.decode[direction], "hyp.txt"))]
        known = {row.id for row in rows}
        for name in ("proxy", "original"):
            if f"{large}.{name}" in known and len(rows) > 1:
                words += ["--against", f"{large}.{name}"]
        settings = self.study.score
        metrics = list(settings.metrics)
        if (encoder := settings.bertscore.get(target)) is not None:
            metrics.append("bertscore")
            words += ["--bertscore-model", str(encoder["model"])]
            words += ["--bertscore-layers", str(encoder["layers"])] if "layers" in encoder else []
        words += ["--metrics", ",".join(metrics), "--samples", str(settings.samples), "--output", "{step}/scores.json"]
        return self._step(f"score {direction} {large}", "score", tuple(words), model=large)

    def _models(self, direction: str, large: str, names: Sequence[str]) -> tuple[Argument, ...]:
        words: list[Argument] = []
        for name in names:
            words += ["--model", Named(name, self.member(direction, large, name))]
            if name in ("L", "S_all"):
                words += self._prompt_and_chat(name, large if name == "L" else self.study.small)
        return tuple(words)

    def _prompt_and_chat(self, member: str, label: str) -> list[Argument]:
        """Of a model that was not fine-tuned here; the folder of a fine-tuned one contains both."""
        model, train = self.study.models[label], self.study.train
        chat = model.chat or (train.chat if train.chat != "auto" else "")
        words: list[Argument] = ["--prompt", Named(member, self._prompt(model.prompt or train.prompt))]
        return [*words, "--chat", f"{member}={chat}"] if chat else words

    def _prompt(self, name: str) -> Argument:
        return name if name in prompt_names() else Input(self.here / name)

    def _tuned(
        self, direction: str, name: str, start: Argument, label: str, options: Mapping[str, Any], ranks: int = 1
    ) -> Artifact:
        corpus, languages = self.study.directions()[direction], direction.split("-")
        words = ("train.sft", "--model", start, *self._pairs(corpus, "train", languages))
        words = (*words, *self._valid(corpus, languages))
        return Artifact(self._train(name, words, label, options, ranks))

    def _pairs(self, corpus: str, part: str, languages: list[str]) -> tuple[Argument, ...]:
        files = [self.text(corpus, part, language) for language in languages]
        prompt = self._prompt(self.study.train.prompt)
        words: tuple[Argument, ...] = ("--train", *files, "--source", languages[0], "--target", languages[1])
        return (*words, "--prompt", prompt, "--chat", self.study.train.chat)

    def _valid(self, corpus: str, languages: list[str]) -> tuple[Argument, ...]:
        if self._corpus(corpus).valid is None:
            return ()
        return ("--valid", *(self.text(corpus, "valid", language) for language in languages))

    def _pretrain(self, corpus: str, label: str, model: Model, start: tuple[Argument, ...]) -> Step:
        """Pre-training of a model that is made here, on both languages."""
        text = [self.text(corpus, "base", language) for language in self._corpus(corpus).languages]
        words = ("train.cpt", *start, "--text", *text)
        return self._train(f"cpt {corpus} {label}", words, label, model.cpt)

    def _train(
        self, name: str, words: tuple[Argument, ...], model: str, options: Mapping[str, Any], processes: int = 1
    ) -> Step:
        """A run of `train.cpt` or `train.sft` with the options as command-line arguments."""
        options = {"seed": self.study.seed, **options}
        flags = []
        for key, value in options.items():
            option = key.replace("_", "-")
            if isinstance(value, bool):
                flags.append(f"--{option}" if value else f"--no-{option}")
            else:
                flags.append(f"--{option}={value}")
        kind = str(words[0]).removeprefix("train.")
        words = (*words, *flags, "--output", "{step}/out")
        return self._step(name, kind, words, ("--resume",), processes=processes, model=model, options=options)

    def _tokenizer(self, corpus: str) -> Step:
        here = self._corpus(corpus)
        parts = [name for name in ("base", "general") if name in here.parts()]
        text = [self.text(corpus, part, language) for part in parts for language in here.languages]
        words: tuple[Argument, ...] = ("train.bpe", "--vocab-size", str(here.vocabulary), "--whole")
        words = (*words, *map(language_name, here.languages), "--text", *text, "--output", "{step}/out")
        return self._step(f"tokenizer {corpus}", "tokenizer", words)

    def _config(self, corpus: str, model: Model) -> dict[str, Any]:
        vocabulary = self._corpus(corpus).vocabulary
        if not vocabulary:
            raise InputError(f"corpora.{corpus}.vocabulary is missing; models with a config of their own need it")
        fixed = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
        return {**fixed, "vocab_size": vocabulary, "bos_token_id": 0, "eos_token_id": 1, **model.config}

    def _dtype(self) -> tuple[str, ...]:
        return ("--dtype", self.study.decode.dtype) if self.study.decode.dtype else ()

    def _corpus(self, name: str) -> Corpus:
        return self.study.corpora[name]

    def _step(
        self, name: str, kind: str, arguments: tuple[Argument, ...], unkeyed: tuple[Argument, ...] = (), **more: Any
    ) -> Step:
        """The one Step object of its key."""
        step = Step(name, kind, arguments, unkeyed, **more)
        return self.made.setdefault(step.key, step)
