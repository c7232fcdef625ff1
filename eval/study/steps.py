"""What a study does, as steps: text, models, experts, translations, scores and fits, down to what each needs.

Steps are made on demand and known by their keys, so an expert that two rows share is one step.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from corpora import language_name, prompt_names
from eval.study.expressions import EXPRESSIONS, FINETUNING, FITTED, ORIGINAL, Expression, members
from eval.study.graph import File, Folder, Named, Out, Step, Text, Word
from eval.study.config import Corpus, Model, Study
from minillama.errors import InputError

# Members of the paper's sums that are experts: which text they were pre-trained on, "" for none.
EXPERTS = {"S_MT": "", "S_srcMT": "source", "S_tgtMT": "target"}


@dataclass(frozen=True)
class Row:
    """A line of the tables: its members' models are those of `direction`."""

    id: str
    large: str
    expression: Expression
    decode: Mapping[str, Step]
    fitted: str | None = None


@dataclass
class Steps:
    """The steps of one study. data: the folder that the files of its parts lie in; here: that of its TOML file."""

    study: Study
    data: Path
    here: Path
    made: dict[str, Step] = field(default_factory=dict)

    @cached_property
    def rows(self) -> list[Row]:
        """In the order of the tables: the small model, then each large one."""
        study, small = self.study, self.study.small
        rows = [Row(f"{small}.original", small, ORIGINAL, self._each(lambda d: self._alone(d, small)))]
        if small in study.finetuning:
            rows.append(
                Row(f"{small}.finetuning", small, FINETUNING, self._each(lambda d: self._alone(d, small, tuned=True)))
            )
        for large in study.larges:
            rows.append(Row(f"{large}.original", large, ORIGINAL, self._each(lambda d, x=large: self._alone(d, x))))
            if large in study.finetuning:
                tuned = self._each(lambda d, x=large: self._alone(d, x, tuned=True))
                rows.append(Row(f"{large}.finetuning", large, FINETUNING, tuned))
            for name in study.expressions or list(EXPRESSIONS):
                expression = EXPRESSIONS[name]
                decoded = self._each(
                    lambda d, x=large, e=expression, n=name: self._decode(d, x, n, members(e.combine), e.combine)
                )
                rows.append(Row(f"{large}.{name}", large, expression, decoded))
            for fit in study.fit.fits:
                name, how, names = FITTED[fit]
                decoded = self._each(lambda d, x=large, f=fit, n=name, m=names: self._fitted(d, x, f, n, m))
                expression = Expression(f"Collab-MT, weights fitted ({how})", " + ".join(names), ())
                rows.append(Row(f"{large}.{name}", large, expression, decoded, how))
        return rows

    @cached_property
    def scores(self) -> dict[tuple[str, str], Step]:
        """For each direction and each model, small or large, one step that scores all its rows."""
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

    def wanted(self) -> list[Step]:
        return [*self.scores.values(), *self.fits.values()]

    def part(self, corpus: str, name: str) -> Step:
        """Text of one purpose; `text` names its files."""
        part = self._corpus(corpus).parts()[name]
        languages = self._corpus(corpus).languages
        words: list[Word] = ["eval.part", "--languages", *languages, "--pairs"]
        if part.split:
            words.append(part.split.format(seed=self.study.seed))
        else:
            words += [File(self.data / part.files.format(language=language)) for language in languages]
        if part.lines:
            words += ["--lines", *map(str, part.lines)]
        return self._step(f"data {corpus} {name}", "data", (*words, "--output", "{step}/out"), corpus=corpus, part=name)

    def text(self, corpus: str, part: str, language: str) -> Out:
        return Out(self.part(corpus, part), f"out/{language}.txt")

    def model(self, corpus: str, label: str) -> Word:
        """The folder of a model as the study begins with it."""
        model = self.study.models[label]
        if model.source:
            return Folder(Path(model.source)) if Path(model.source).is_dir() else model.source
        if model.module:
            return Out(self._step(f"model {label}", "model", (model.module, "--output", "{step}/out"), model=label))
        if model.first_layers_of:
            words: tuple[Word, ...] = ("train.first_layers", "--model", self.model(corpus, model.first_layers_of))
            words = (*words, "--layers", str(model.layers), "--output", "{step}/out")
            cut = self._step(f"model {label}", "model", words, model=label)
            return Out(self._whole_cpt(corpus, label, model, ("--model", Out(cut)))) if model.cpt else Out(cut)
        config = Text("config.json", json.dumps(self._config(corpus, model), indent=2) + "\n")
        step = self._whole_cpt(corpus, label, model, ("--init", config, "--tokenizer", Out(self._tokenizer(corpus))))
        if not model.sft:
            return Out(step)
        pairs = self._pairs(corpus, "general", self._corpus(corpus).languages)
        words = ("train.sft", "--model", Out(step), *pairs, *self._valid(corpus, self._corpus(corpus).languages))
        options = {"both_directions": True, **model.sft}
        return Out(self._train(f"sft {corpus} {label}", "sft", words, options, model=label, part="general"))

    def expert(self, direction: str, name: str) -> Out:
        """S_MT, S_srcMT or S_tgtMT of one direction."""
        corpus = self.study.directions()[direction]
        start = self.model(corpus, self.study.small)
        side = EXPERTS[name]
        if side:
            language = direction.split("-")[side == "target"]
            words = ("train.cpt", "--model", start, "--text", self.text(corpus, "cpt", language))
            options = self.study.train.cpt
            step = self._train(f"cpt {corpus} {language}", "cpt", words, options, model=self.study.small, part="cpt")
            start = Out(step)
        return self._tuned(direction, f"sft {direction} {name}", start, self.study.small, self.study.train.sft)

    def finetuned(self, direction: str, label: str) -> Out:
        """A model trained on the parallel text itself; of the small one that is S_MT."""
        if label == self.study.small:
            return self.expert(direction, "S_MT")
        start = self.model(self.study.directions()[direction], label)
        options = {**self.study.train.sft, **self.study.train.finetuning}
        slots = self.study.train.ranks.get(label, 1)
        return self._tuned(direction, f"sft {direction} {label}", start, label, options, slots)

    def member(self, direction: str, large: str, name: str) -> Word:
        """The folder behind a name of an expression."""
        if name in EXPERTS:
            return self.expert(direction, name)
        return self.model(self.study.directions()[direction], self.study.small if name == "S_all" else large)

    def fit(self, direction: str, large: str, kind: str) -> Step:
        """Weights on the corpus's dev text: `weights.toml` in the step's folder."""
        corpus, (source, target) = self.study.directions()[direction], direction.split("-")
        _, _, names = FITTED[kind]
        words: list[Word] = ["decode.tune", *self._models(direction, large, list(names)), "--combine"]
        words += [EXPRESSIONS["collab"].combine if len(names) == 3 else " + ".join(names)]
        words += ["--source", source, "--target", target, "--input", self.text(corpus, "dev", source)]
        words += ["--reference", self.text(corpus, "dev", target), "--output", "{step}/weights.toml"]
        if self.study.fit.l2:
            words += ["--l2", str(self.study.fit.l2)]
        if kind == "bleu":
            words += ["--objective", "bleu"]
        else:
            against = [ORIGINAL, *EXPRESSIONS.values()]
            for expression in against:
                if set(members(expression.combine)) <= set(names):
                    words += ["--against", expression.combine]
        return self._step(
            f"fit {direction} {large} {kind}", "fit", (*words, *self._dtype()), direction=direction, model=large
        )

    def _alone(self, direction: str, label: str, tuned: bool = False) -> Step:
        corpus = self.study.directions()[direction]
        folder = self.finetuned(direction, label) if tuned else self.model(corpus, label)
        name = "finetuning" if tuned else "original"
        words: tuple[Word, ...] = ("--model", Named("L", folder))
        if not tuned:
            words = (*words, *self._reading("L", label))
        return self._decoded(direction, label, name, (*words, "--combine", "L"))

    def _decode(self, direction: str, large: str, name: str, names: list[str], combine: str) -> Step:
        words = (*self._models(direction, large, names), "--combine", combine)
        return self._decoded(direction, large, name, words)

    def _fitted(self, direction: str, large: str, fit: str, name: str, names: tuple[str, ...]) -> Step:
        weights = Out(self.fit(direction, large, fit), "weights.toml")
        words = (*self._models(direction, large, list(names)), "--weights", weights)
        return self._decoded(direction, large, name, words)

    def _decoded(self, direction: str, large: str, name: str, words: tuple[Word, ...]) -> Step:
        corpus, (source, target) = self.study.directions()[direction], direction.split("-")
        settings = self.study.decode
        words = ("decode.collab", *words, "--source", source, "--target", target)
        words = (*words, "--input", self.text(corpus, "test", source), "--output", "{step}/hyp.txt")
        words = (*words, "--max-new-tokens", str(settings.max_new_tokens), *self._dtype())
        own = ("--report", "{step}/run.json", "--resume", "--batch-size", str(settings.batch_size))
        title = f"decode {direction} {large}.{name}"
        return self._step(title, "decode", words, own, direction=direction, model=large, row=name)

    def _score(self, direction: str, large: str) -> Step:
        corpus, target = self.study.directions()[direction], direction.split("-")[1]
        rows = [row for row in self.rows if row.large == large]
        words: list[Word] = ["eval.compare", "--reference", self.text(corpus, "test", target), "--target", target]
        for row in rows:
            words += ["--system", Named(row.id, Out(row.decode[direction], "hyp.txt"))]
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
        return self._step(f"score {direction} {large}", "score", tuple(words), direction=direction, model=large)

    def _models(self, direction: str, large: str, names: list[str]) -> tuple[Word, ...]:
        words: list[Word] = []
        for name in names:
            words += ["--model", Named(name, self.member(direction, large, name))]
            if name in ("L", "S_all"):
                words += self._reading(name, large if name == "L" else self.study.small)
        return tuple(words)

    def _reading(self, member: str, label: str) -> list[Word]:
        """Prompt and chat format of a model that was not fine-tuned here; one that was has both in its folder."""
        model, train = self.study.models[label], self.study.train
        chat = model.chat or (train.chat if train.chat != "auto" else "")
        words: list[Word] = ["--prompt", Named(member, self._prompt(model.prompt or train.prompt))]
        return [*words, "--chat", f"{member}={chat}"] if chat else words

    def _prompt(self, name: str) -> Word:
        return name if name in prompt_names() else File(self.here / name)

    def _tuned(
        self, direction: str, name: str, start: Word, label: str, options: Mapping[str, Any], slots: int = 1
    ) -> Out:
        corpus, languages = self.study.directions()[direction], direction.split("-")
        words = ("train.sft", "--model", start, *self._pairs(corpus, "train", languages))
        words = (*words, *self._valid(corpus, languages))
        return Out(self._train(name, "sft", words, options, slots, direction=direction, model=label, part="train"))

    def _pairs(self, corpus: str, part: str, languages: list[str]) -> tuple[Word, ...]:
        files = [self.text(corpus, part, language) for language in languages]
        prompt = self._prompt(self.study.train.prompt)
        words: tuple[Word, ...] = ("--train", *files, "--source", languages[0], "--target", languages[1])
        return (*words, "--prompt", prompt, "--chat", self.study.train.chat)

    def _valid(self, corpus: str, languages: list[str]) -> tuple[Word, ...]:
        if self._corpus(corpus).valid is None:
            return ()
        return ("--valid", *(self.text(corpus, "valid", language) for language in languages))

    def _whole_cpt(self, corpus: str, label: str, model: Model, start: tuple[Word, ...]) -> Step:
        """Pre-training of a model made here, on both languages."""
        text = [self.text(corpus, "base", language) for language in self._corpus(corpus).languages]
        words = ("train.cpt", *start, "--text", *text)
        return self._train(f"cpt {corpus} {label}", "cpt", words, model.cpt, model=label, part="base")

    def _train(
        self, name: str, kind: str, words: tuple[Word, ...], options: Mapping[str, Any], slots: int = 1, **about: Any
    ) -> Step:
        settings = {"seed": self.study.seed, **options}
        chosen: list[Word] = []
        for key, value in settings.items():
            option = key.replace("_", "-")
            if isinstance(value, bool):
                chosen.append(f"--{option}" if value else f"--no-{option}")
            else:
                chosen.append(f"--{option}={value}")
        words = (*words, *chosen, "--output", "{step}/out")
        return self._step(name, kind, words, ("--resume",), slots, options=settings, **about)

    def _tokenizer(self, corpus: str) -> Step:
        here = self._corpus(corpus)
        parts = [name for name in ("base", "general") if name in here.parts()]
        text = [self.text(corpus, part, language) for part in parts for language in here.languages]
        words: tuple[Word, ...] = ("train.bpe", "--vocab-size", str(here.vocabulary), "--whole")
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

    def _each(self, make: Any) -> dict[str, Step]:
        return {direction: make(direction) for direction in self.study.directions()}

    def _step(
        self, name: str, kind: str, words: tuple[Word, ...], own: tuple[Word, ...] = (), slots: int = 1, **about: Any
    ) -> Step:
        """One object for each key, so that a step's name and the test of identity agree."""
        step = Step(name, kind, words, own, slots, about)
        return self.made.setdefault(step.key, step)
