"""Sequences of every kind for one engine, and what each gives in an engine of its own."""

import dataclasses
import math
import random

from decode.engine.engine import Engine
from decode.engine.sequence import SamplingParams, Sequence

COMBINE = "L + 0.5*S - 0.25*A"
CAPACITY = 90
NEW = 10
KINDS = ("greedy", "sampled", "sampled", "truncated", "beams", "targets")


def random_prompt(generator, longest):
    return [generator.randrange(2, 60) for _ in range(generator.randint(1, longest))]


def mixed(seed, count, kinds=KINDS, longest=24, new=NEW):
    """Sequences of these kinds, with weights and stop tokens of their own."""
    generator = random.Random(seed)
    sequences = []
    for key in range(count):
        prompts = tuple(random_prompt(generator, longest) for _ in range(3))
        weights = generator.choice((None, None, (1.0, 0.0, 0.0), (0.0, 1.5, -0.5), (0.7, 0.3, 0.1), (1.0, -0.4, 0.0)))
        fields = {"weights": weights, "key": key, "max_new_tokens": generator.randint(1, new)}
        fields["stop_tokens"] = generator.choice((None, None, frozenset(), frozenset({5, 7, 9, 30})))
        kind = generator.choice(kinds)
        if kind in ("sampled", "truncated"):
            truncation = (generator.randint(0, 9), generator.choice((0.8, 0.95))) if kind == "truncated" else (0, 1.0)
            fields["params"] = SamplingParams(generator.uniform(0.3, 1.5), *truncation, generator.randint(-9, 9))
        elif kind == "beams":
            beams = generator.randint(2, 4)
            penalty = generator.choice((0.0, 1.0, 1.3))
            fields["params"] = SamplingParams(beams=beams, length_penalty=penalty, nbest=generator.randint(0, beams))
        elif kind == "targets":
            fields["targets"] = random_prompt(generator, 15)
            fields["keep_hidden"] = generator.random() < 0.2
        if kind in ("greedy", "sampled"):
            fields["top_logprobs"] = generator.choice((0, 0, 2, 5))
        if weights is None and kind != "targets":
            fields["explain"] = generator.random() < 0.3
        sequences.append(Sequence(prompts, **fields))
    return sequences


def again(sequence):
    """The same request, not yet decoded."""
    names = "prompts params max_new_tokens stop_tokens weights key explain top_logprobs targets keep_hidden"
    return Sequence(**{name: getattr(sequence, name) for name in names.split()})


def plain_values(completion):
    """A completion that can be compared with ==: without tensors, and None for the NaN of members that are left out."""
    fields = {field.name: getattr(completion, field.name) for field in dataclasses.fields(completion)}
    own = [[None if math.isnan(value) else value for value in values] for values in completion.member_logprobs]
    return fields | {"hidden": [hidden_TD.tolist() for hidden_TD in completion.hidden], "member_logprobs": own}


def run_to_the_end(engine):
    """Completions by id, and the tokens that the updates brought."""
    completions, tokens = {}, {}
    while engine.has_work:
        for update in engine.step():
            tokens.setdefault(update.id, []).extend(update.tokens)
            if update.completion is not None:
                assert update.id not in completions
                completions[update.id] = update.completion
    return completions, tokens


def alone(ensemble, sequence):
    """What the sequence gives in an engine that decodes nothing else."""
    engine = Engine(ensemble, sequence.params.beams, CAPACITY)
    number = engine.add(again(sequence))
    return run_to_the_end(engine)[0][number]
