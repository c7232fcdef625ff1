"""A sentence's result in any company: 200 sentences of the demo, alone, in batches, shuffled, on two processes,
speculating, with `--invariant` to the bit and without it but for ties.

    pytest -m slow -s tests/decode/test_invariance.py

COLLAB_INVARIANCE_INPUT names a file of Japanese sentences, of which the first 200 are taken (default: the sample's).
The quick version, with random models, is in test_speculation.py and test_shared_work.py.
"""

import json
import os
import random
from pathlib import Path

import pytest
import torch
from processes import code_of, start_ranks

from corpora import sample
from decode.bench_shapes import Models, prepare, sentence_prompts
from decode.collab import main
from decode.engine.expression import parse
from minillama import Llama

COUNT = 200
SAMPLE = sample().source
EXPRESSIONS = ("L + S_src + S_tgt", "L + S_mt - 0.5*S_base")
PLAIN = ("--batch-size", "16")
# What is done to the same sentences: arguments, number of processes, whether they come in another order.
WAYS = {
    "alone": (("--batch-size", "1"), 1, False),
    "B=3": (("--batch-size", "3"), 1, False),
    "B=64": (("--batch-size", "64"), 1, False),
    "B=16 shuffled": (PLAIN, 1, True),
    "B=16, 2 ranks": (PLAIN, 2, False),
    "alone, speculate 3": (("--batch-size", "1", "--speculate", "3"), 1, False),
    "B=16, speculate 3": ((*PLAIN, "--speculate", "3"), 1, False),
    "B=16, speculate auto, 2 ranks": ((*PLAIN, "--speculate", "auto"), 2, False),
    "B=64, speculate 7, shuffled": (("--batch-size", "64", "--speculate", "7"), 1, True),
}
ROUNDINGS, ABSOLUTE = 16, 1e-5  # of a tie: docs/bench.md


def sentences():
    given = os.environ.get("COLLAB_INVARIANCE_INPUT")
    lines = Path(given).read_text(encoding="utf-8").splitlines() if given else _more(SAMPLE)
    return lines[:COUNT]


def _more(lines):
    return [*lines, *(f"{first}{second}" for first in lines for second in lines[20:40])]


def decoded(models, lines, folder, way, invariant):
    """Tokens and log-probabilities of every line, in the order of `lines`."""
    arguments, world, shuffled = way
    order = list(range(len(lines)))
    if shuffled:
        random.Random(5).shuffle(order)
    source, details = folder / "src.txt", folder / "details.jsonl"
    source.write_text("".join(f"{lines[index]}\n" for index in order), encoding="utf-8")
    argv = [f"--model={name}={place}" for name, place in models.folders.items()]
    argv += ["--combine", models.combine, "--source", "ja", "--target", "en", "--input", str(source)]
    argv += ["--output", str(folder / "hyp.txt"), "--details", str(details), "--max-new-tokens", "64", "--no-resume"]
    argv += [*arguments, "--invariant" if invariant else "--no-invariant"]
    if world == 1:
        assert main(argv) == 0
    else:
        codes = [code_of(process, 600) for process in start_ranks(argv, world, folder)]
        assert codes == [0] * world, (folder / "rank0.log").read_text()
    found = [None] * len(lines)
    for index, line in zip(order, details.read_text().splitlines()):
        entry = json.loads(line)
        found[index] = (entry["tokens"], entry["logprobs"])
    return found


class Judge:
    """How far apart two tokens are: the members' own forward passes in float64."""

    def __init__(self, models: Models, lines):
        self.prompts, self.stops = sentence_prompts(models, lines, "ja", "en")
        self.weights = parse(models.combine, models.folders)
        self.models = {name: Llama.from_pretrained(models.folders[name], torch.float64) for name in self.weights}

    @torch.no_grad()
    def tie(self, index, one, other):
        """(position, margin, whether that is within float32 rounding) where two translations first differ."""
        at = next((i for i, pair in enumerate(zip(one, other)) if pair[0] != pair[1]), min(len(one), len(other)))
        parts = [
            weight * self.models[name](torch.tensor([self.prompts[name][index] + one[:at]]))[0, -1]
            for name, weight in self.weights.items()
        ]
        x_V = torch.stack(parts).sum(0)
        first, second = (x_V[row[at]] if at < len(row) else x_V[self.stops].max() for row in (one, other))
        magnitude = float(torch.stack(parts).abs().sum(0).max())
        margin = float(first - second)
        return at, margin, abs(margin) <= ABSOLUTE + ROUNDINGS * 2.0**-23 * magnitude


@pytest.mark.slow
@pytest.mark.parametrize("combine", EXPRESSIONS)
def test_every_way_of_decoding_gives_a_sentence_its_own_result(combine, tmp_path):
    models = prepare(["demo"], 1, tmp_path).combined(combine)
    lines = sentences()
    assert len(lines) == COUNT
    judge = Judge(models, lines)
    reference = decoded(models, lines, tmp_path, (PLAIN, 1, False), True)
    count = sum(len(logprobs) for _, logprobs in reference)
    print(f"\n{combine}: {COUNT} sentences, {count} tokens; against B=16 under --invariant, plain")
    for name, way in WAYS.items():
        found = decoded(models, lines, tmp_path, way, True)
        tokens = sum(one[0] == other[0] for one, other in zip(found, reference))
        bits = sum(a == b for one, other in zip(found, reference) for a, b in zip(one[1], other[1]))
        print(f"  --invariant     {name:30} {tokens} of {COUNT} equal, {bits} of {count} log-probabilities", flush=True)
        assert found == reference
    for name, way in {"B=16": (PLAIN, 1, False), **WAYS}.items():
        found = decoded(models, lines, tmp_path, way, False)
        differing = [index for index in range(COUNT) if found[index][0] != reference[index][0]]
        largest = max(
            abs(a - b)
            for index in range(COUNT)
            if index not in differing
            for a, b in zip(found[index][1], reference[index][1])
        )
        ties = [(index, *judge.tie(index, reference[index][0], found[index][0])) for index in differing]
        print(
            f"  --no-invariant  {name:30} {COUNT - len(differing)} of {COUNT} equal, "
            f"log-probabilities within {largest:.1e}",
            flush=True,
        )
        for index, at, margin, tie in ties:
            print(f"    sentence {index + 1}, token {at + 1}: margin {margin:.1e}{', a tie' if tie else ''}")
        assert all(tie for *_, tie in ties)
        assert largest < 1e-4
