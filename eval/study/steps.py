"""The steps of a study: text, models, experts, translations, fits and scores, with everything that each needs.

Steps are made on demand and identified by their keys, so an expert that two rows share is one step.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from corpora import language_name, prompt_names
from eval.study.config import Model, Study
from eval.study.expressions import EXPRESSIONS, FINETUNING, FITTED, ORIGINAL, Expression
from eval.study.graph import Argument, Artifact, Input, Named, Step, Text
from minillama.errors import InputError

# The experts, and the side of the corpus that each is pre-trained on ("": none).
EXPERTS = {"S_MT": "", "S_srcMT": "source", "S_tgtMT": "target"}
OUTPUT = ("--output", "{step}/out")


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
            rows.append(self._row(label, "original", ORIGINAL))
            if label in study.finetuning:
                rows.append(self._row(label, "finetuning", FINETUNING))
            if label != study.small:
                rows += [self._row(label, name, EXPRESSIONS[name]) for name in study.expressions or EXPRESSIONS]
                for kind in study.fit.fits:
                    name, how, names = FITTED[kind]
                    expression = Expression(f"Collab-MT, weights fitted ({how})", " + ".join(names), ())
                    rows.append(self._row(label, name, expression, kind))
        return rows

    @cached_property
    def scores(self) -> dict[tuple[str, str], Step]:
        """For each direction and each model, small or large, the step that scores all its rows."""
        keys = product(self.study.directions(), (self.study.small, *self.study.larges))
        return {key: self._score(*key) for key in keys}

    @cached_property
    def fits(self) -> dict[tuple[str, str, str], Step]:
        """For each direction, large model and kind of fit."""
        keys = product(self.study.directions(), self.study.larges, self.study.fit.fits)
        return {key: self._fit(*key) for key in keys}

    def targets(self) -> list[Step]:
        return [*self.scores.values(), *self.fits.values()]

    def part(self, corpus: str, name: str) -> Step:
        """The text of one purpose as one file for each language."""
        here = self.study.corpora[corpus]
        if name not in here.parts():
            raise InputError(f"corpora.{corpus}.{name} is missing; a model of the study is made from it")
        part = here.parts()[name]
        words: list[Argument] = ["eval.part", "--languages", *here.languages, "--pairs"]
        if part.split:
            words.append(part.split.format(seed=self.study.seed))
        else:
            words += [Input(self.data / part.files.format(language=language)) for language in here.languages]
        if part.lines:
            words += ["--lines", *map(str, part.lines)]
        return self._step(f"data {corpus} {name}", "data", [*words, *OUTPUT])

    def _texts(self, corpus: str, part: str, languages: Sequence[str]) -> list[Argument]:
        return [Artifact(self.part(corpus, part), f"out/{language}.txt") for language in languages]

    def _model(self, corpus: str, label: str) -> Argument:
        """The folder of a model before the study trains experts from it."""
        model, languages = self.study.models[label], self.study.corpora[corpus].languages
        if model.source:
            return Input(Path(model.source)) if Path(model.source).is_dir() else model.source
        if model.module:
            return Artifact(self._step(f"model {label}", "model", [model.module, *OUTPUT]))
        words: list[Argument]
        if model.first_layers_of:
            whole = self._model(corpus, model.first_layers_of)
            words = ["train.first_layers", "--model", whole, "--layers", str(model.layers), *OUTPUT]
            cut = Artifact(self._step(f"model {label}", "model", words))
            if not model.cpt:
                return cut
            words = ["train.cpt", "--model", cut]
        else:
            config = Text("config.json", json.dumps(self._config(corpus, model), indent=2) + "\n")
            words = ["train.cpt", "--init", config, "--tokenizer", self._tokenizer(corpus)]
        words += ["--text", *self._texts(corpus, "base", languages)]
        base = self._train(f"cpt {corpus} {label}", words, label, model.cpt)
        if not model.sft:
            return base
        options = {"both_directions": True, **model.sft}
        return self._sft(f"sft {corpus} {label}", base, corpus, "general", languages, label, options)

    def _expert(self, direction: str, name: str) -> Argument:
        """S_MT, S_srcMT or S_tgtMT of one direction."""
        study, corpus, languages = self.study, self.study.directions()[direction], direction.split("-")
        start = self._model(corpus, study.small)
        if side := EXPERTS[name]:
            language = languages[side == "target"]
            words: list[Argument] = ["train.cpt", "--model", start, "--text", *self._texts(corpus, "cpt", [language])]
            start = self._train(f"cpt {corpus} {language}", words, study.small, study.train.cpt)
        return self._sft(f"sft {direction} {name}", start, corpus, "train", languages, study.small, study.train.sft)

    def _finetuned(self, direction: str, label: str) -> Argument:
        """A model fine-tuned on the parallel text; of the small model that is S_MT."""
        train, corpus = self.study.train, self.study.directions()[direction]
        if label == self.study.small:
            return self._expert(direction, "S_MT")
        start, options = self._model(corpus, label), {**train.sft, **train.finetuning}
        return self._sft(f"sft {direction} {label}", start, corpus, "train", direction.split("-"), label, options)

    def _row(self, large: str, name: str, expression: Expression, fit: str = "") -> StudyRow:
        """fit: the kind of fit whose weights replace those of the expression."""
        decode = {}
        for direction in self.study.directions():
            words: list[Argument]
            if expression is FINETUNING:
                words = ["--model", Named("L", self._finetuned(direction, large))]
            else:
                words = self._members(direction, large, list(expression.weights))
            if fit:
                words += ["--weights", Artifact(self._fit(direction, large, fit), "weights.toml")]
            else:
                words += ["--combine", expression.combine]
            decode[direction] = self._decode(direction, large, name, words)
        return StudyRow(f"{large}.{name}", large, expression, decode, FITTED[fit][1] if fit else None)

    def _decode(self, direction: str, large: str, name: str, words: list[Argument]) -> Step:
        """Translates the test text; `words` are the members and their weights."""
        corpus, (source, target), settings = self.study.directions()[direction], direction.split("-"), self.study.decode
        words = ["decode.collab", *words, "--source", source, "--target", target]
        words += ["--input", *self._texts(corpus, "test", [source]), "--output", "{step}/hyp.txt"]
        words += ["--max-new-tokens", str(settings.max_new_tokens), *self._dtype()]
        unkeyed = ["--report", "{step}/run.json", "--resume", "--batch-size", str(settings.batch_size)]
        return self._step(f"decode {direction} {large}.{name}", "decode", words, unkeyed, model=large)

    def _fit(self, direction: str, large: str, kind: str) -> Step:
        """Fits weights on the corpus's dev text: `weights.toml` in the step's folder."""
        corpus, (source, target) = self.study.directions()[direction], direction.split("-")
        _, _, names = FITTED[kind]
        input_text, reference = self._texts(corpus, "dev", [source, target])
        words = ["decode.tune", *self._members(direction, large, names), "--combine"]
        words += [EXPRESSIONS["collab"].combine if kind == "likelihood" else " + ".join(names)]
        words += ["--source", source, "--target", target, "--input", input_text, "--reference", reference]
        words += ["--output", "{step}/weights.toml"]
        if self.study.fit.l2:
            words += ["--l2", str(self.study.fit.l2)]
        for expression in (ORIGINAL, *EXPRESSIONS.values()):
            if set(expression.weights) <= set(names):
                words += ["--against", expression.combine]
        return self._step(f"fit {direction} {large} {kind}", "fit", [*words, *self._dtype()], model=large)

    def _score(self, direction: str, large: str) -> Step:
        corpus, target = self.study.directions()[direction], direction.split("-")[1]
        rows = [row for row in self.rows if row.large == large]
        words = ["eval.compare", "--reference", *self._texts(corpus, "test", [target]), "--target", target]
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
        return self._step(f"score {direction} {large}", "score", words, model=large)

    def _members(self, direction: str, large: str, names: Sequence[str]) -> list[Argument]:
        """Options for the members of an expression. The folder of a model that was fine-tuned here has its prompt."""
        words: list[Argument] = []
        for name in names:
            if name in EXPERTS:
                words += ["--model", Named(name, self._expert(direction, name))]
                continue
            label = large if name == "L" else self.study.small
            model, train = self.study.models[label], self.study.train
            words += ["--model", Named(name, self._model(self.study.directions()[direction], label))]
            words += ["--prompt", Named(name, self._prompt(model.prompt or train.prompt))]
            if chat := model.chat or (train.chat if train.chat != "auto" else ""):
                words += ["--chat", f"{name}={chat}"]
        return words

    def _prompt(self, name: str) -> Argument:
        return name if name in prompt_names() else Input(self.here / name)

    def _sft(
        self,
        name: str,
        start: Argument,
        corpus: str,
        part: str,
        languages: list[str],
        label: str,
        options: Mapping[str, Any],
    ) -> Artifact:
        """The model `start`, fine-tuned on pairs of the corpus's `part`; `languages`: source and target."""
        source, target = languages
        train = self.study.train
        words = ["train.sft", "--model", start, "--train", *self._texts(corpus, part, languages)]
        words += ["--source", source, "--target", target, "--prompt", self._prompt(train.prompt), "--chat", train.chat]
        if self.study.corpora[corpus].valid is not None:
            words += ["--valid", *self._texts(corpus, "valid", languages)]
        return self._train(name, words, label, options)

    def _train(self, name: str, words: list[Argument], label: str, options: Mapping[str, Any]) -> Artifact:
        """The model of a run of `train.cpt` or `train.sft`, with the options as command-line arguments."""
        options = {"seed": self.study.seed, **options}
        for key, value in options.items():
            option = key.replace("_", "-")
            flag = f"--{option}" if value else f"--no-{option}"
            words.append(flag if isinstance(value, bool) else f"--{option}={value}")
        kind = str(words[0]).removeprefix("train.")
        processes = self.study.train.ranks.get(label, 1) if kind == "sft" else 1
        more = {"processes": processes, "model": label, "options": options}
        return Artifact(self._step(name, kind, [*words, *OUTPUT], ["--resume"], **more))

    def _tokenizer(self, corpus: str) -> Argument:
        here = self.study.corpora[corpus]
        parts = [name for name in ("base", "general") if name in here.parts()]
        words: list[Argument] = ["train.bpe", "--vocab-size", str(here.vocabulary), "--whole"]
        words += [*map(language_name, here.languages), "--text"]
        words += [text for part in parts for text in self._texts(corpus, part, here.languages)]
        return Artifact(self._step(f"tokenizer {corpus}", "tokenizer", [*words, *OUTPUT]))

    def _config(self, corpus: str, model: Model) -> dict[str, Any]:
        vocabulary = self.study.corpora[corpus].vocabulary
        if not vocabulary:
            raise InputError(f"corpora.{corpus}.vocabulary is missing; models with a config of their own need it")
        fixed = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
        return {**fixed, "vocab_size": vocabulary, "bos_token_id": 0, "eos_token_id": 1, **model.config}

    def _dtype(self) -> list[str]:
        return ["--dtype", self.study.decode.dtype] if self.study.decode.dtype else []

    def _step(
        self, name: str, kind: str, arguments: Sequence[Argument], unkeyed: Sequence[Argument] = (), **more: Any
    ) -> Step:
        """The one Step object of its key."""
        step = Step(name, kind, tuple(arguments), tuple(unkeyed), **more)
        return self.made.setdefault(step.key, step)
