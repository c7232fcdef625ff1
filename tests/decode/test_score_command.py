"""Log-probabilities of given texts against the plain models in float64, and `python -m decode.score` as used."""

import copy
import json
import math

import pytest
import torch
from processes import code_of, start_with_pipes
from tiny import TINY, tiny_model

from corpora import sample
from decode import Ensemble, translate
from decode.engine import likelihood
from decode.engine.generate import score
from decode.pipeline.members import open_members
from decode.pipeline.scoring import COLUMNS
from decode.score import main
from minillama import InputError, Llama
from minillama.errors import exit_code

WEIGHTS = {"L": 1.0, "S": 0.5, "A": -0.25}
PAIRS = sample()


@pytest.fixture(scope="module")
def models():
    sizes = {"max_position_embeddings": 1200}
    return {name: tiny_model(seed, eos_token_id=(1, 2, 3), **sizes) for seed, name in enumerate(WEIGHTS)}


def tokens_of(seed, lengths):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, TINY.vocab_size, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def in_float64(models, weights, prompts, target, stops):
    """(combined, by member): log-probabilities of the target's tokens and of any stop token after it."""
    logits = {}
    for name in weights:
        model = copy.deepcopy(models[name]).double()
        logits[name] = model(torch.tensor([[*prompts[name], *target]]))[0, len(prompts[name]) - 1 :]
    every = [sum(weight * logits[name] for name, weight in weights.items()), *logits.values()]
    found = []
    for logits_TV in every:
        logprob_TV = logits_TV.log_softmax(-1)
        of_tokens = [float(logprob_TV[position, token]) for position, token in enumerate(target)]
        found.append([*of_tokens, float(logprob_TV[-1, sorted(stops)].logsumexp(0))])
    return found[0], found[1:]


# Shorter and longer than what is scored at once and than what a pass reads; an empty text has an end.
LENGTHS = (5, 0, 1, 40, 700, 33, 32, 31)


def test_log_probabilities_are_those_of_the_plain_models_in_float64(models):
    prompts = {name: tokens_of(seed, (7, 3, 1, 20, 450, 9, 2, 30)) for seed, name in enumerate(WEIGHTS, 10)}
    prompts["S"] = [prompt[:1] for prompt in prompts["S"]]
    targets = tokens_of(20, LENGTHS)
    ensemble = Ensemble(models, WEIGHTS)
    found = dict(score(ensemble, list(zip(*(prompts[name] for name in WEIGHTS))), targets, batch_size=3))
    assert sorted(found) == list(range(len(targets)))
    for index, target in enumerate(targets):
        own = {name: prompts[name][index] for name in WEIGHTS}
        combined, members = in_float64(models, WEIGHTS, own, target, ensemble.stop_tokens)
        assert found[index].logprobs == pytest.approx(combined, abs=1e-4)
        for mine, expected in zip(found[index].member_logprobs, members, strict=True):
            assert mine == pytest.approx(expected, abs=1e-4)


def test_a_text_has_the_same_bits_alone_and_in_any_batch(models):
    ensemble = Ensemble(models, WEIGHTS)
    prompts = [(prompt,) * 3 for prompt in tokens_of(30, (4, 9, 2, 30, 17, 5))]
    targets = tokens_of(31, (3, 0, 50, 20, 1, 8))
    alone = [next(score(ensemble, [prompt], [target]))[1] for prompt, target in zip(prompts, targets)]
    for batch_size in (1, 2, 6):
        for index, completion in score(ensemble, prompts, targets, batch_size):
            assert completion == alone[index]


def test_no_more_than_a_few_positions_have_logits_at_once(models, monkeypatch):
    rows = []
    fused_logits = likelihood.fused_logits
    monkeypatch.setattr(
        likelihood,
        "fused_logits",
        lambda logits, *args, **kwargs: rows.append(len(logits[0])) or fused_logits(logits, *args, **kwargs),
    )
    list(score(Ensemble(models, WEIGHTS), [([5] * 10,) * 3] * 4, tokens_of(32, (100, 200, 300, 400))))
    assert sum(rows) == 1004
    assert max(rows) == likelihood.ROWS_AT_ONCE


def test_scores_of_a_greedy_translation_are_its_own_log_probabilities(models):
    ensemble = Ensemble(models, WEIGHTS)
    prompts = tokens_of(33, (4, 9, 2))
    result = translate(ensemble, prompts, 20, ignore_eos=True)
    for index, completion in score(ensemble, [(prompt,) * 3 for prompt in prompts], result.tokens):
        assert completion.logprobs[:-1] == pytest.approx(result.logprobs[index], abs=1e-5)


def test_without_stop_tokens_a_text_has_no_end():
    models = {"L": tiny_model(0, eos_token_id=())}
    _, completion = next(score(Ensemble(models), [([5, 6],)], [[7, 8, 9]]))
    expected, _ = in_float64(models, {"L": 1.0}, {"L": [5, 6]}, [7, 8, 9], [0])
    assert completion.logprobs == pytest.approx(expected[:-1], abs=1e-4)


def test_texts_that_do_not_fit_are_refused(models):
    ensemble = Ensemble(models, WEIGHTS)
    with pytest.raises(InputError, match="prompt 2 and its 1000 tokens"):
        list(score(ensemble, [([5],) * 3, ([5] * 201,) * 3], [[6], [6] * 1000]))
    with pytest.raises(InputError, match="prompt 1 is empty"):
        list(score(ensemble, [([5], [], [5])], [[6]]))


@pytest.fixture
def texts(tmp_path):
    """Five lines, the second blank on both sides, the third without a translation."""
    sources = [PAIRS.source[0], "", *PAIRS.source[1:4]]
    targets = ["i see him .", "", "", "yes .", "it is a dog !"]
    (tmp_path / "src.txt").write_text("\n".join(sources) + "\n", encoding="utf-8")
    (tmp_path / "hyp.txt").write_text("\n".join(targets) + "\n", encoding="utf-8")
    return tmp_path


def arguments(folders, texts, *extra, source="src.txt", translation="hyp.txt"):
    models = [part for name in "AC" for part in ("--model", f"{name}={folders[name]}")]
    files = ["--input", source if source == "-" else str(texts / source)]
    if translation:
        files += ["--translation", translation if translation == "-" else str(texts / translation)]
    return [*models, "--combine", "A - 0.5*C", "--source", "ja", "--target", "en", *files, *extra]


def test_figures_are_those_of_the_plain_models_line_by_line(model_folders, texts):
    out = texts / "scores"
    assert main(arguments(model_folders, texts, "--json", "--output", str(out), "--prompt", "C=paper-user")) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["line"] for row in rows] == [1, 2, 3, 4, 5]
    assert rows[1] == {"line": 2, "tokens": 0}
    members = open_members({name: str(model_folders[name]) for name in "AC"}, {"A": None, "C": "paper-user"}, None)
    models = {name: Llama.from_pretrained(model_folders[name]) for name in "AC"}
    stops = Ensemble(models).stop_tokens
    sources, targets = ((texts / name).read_text(encoding="utf-8").split("\n") for name in ("src.txt", "hyp.txt"))
    for line in (0, 2, 3, 4):
        prompts = {member.name: member.encode(sources[line], "ja", "en") for member in members}
        target = members[0].tokenizer.encode(targets[line])
        combined, (of_a, of_c) = in_float64(models, {"A": 1.0, "C": -0.5}, prompts, target, stops)
        row = rows[line]
        assert row["logprobs"] == pytest.approx(combined, abs=1e-4)
        assert row["tokens"] == len(target) + 1
        assert row["logprob"] == pytest.approx(math.fsum(combined), abs=1e-3)
        assert row["perplexity"] == pytest.approx(math.exp(-math.fsum(combined) / (len(target) + 1)), rel=1e-3)
        assert row["members"]["A"]["logprobs"] == pytest.approx(of_a, abs=1e-4)
        assert row["members"]["C"]["logprob"] == pytest.approx(math.fsum(of_c), abs=1e-3)

    assert main(arguments(model_folders, texts, "--output", str(out), "--prompt", "C=paper-user")) == 0
    header, *lines = [line.split("\t") for line in out.read_text().splitlines()]
    assert header == [*COLUMNS, "A", "C"]
    assert lines[1] == ["2", "0", "", "", "", "", ""]
    for fields, row in zip(lines, rows):
        if row["tokens"]:
            assert [float(field) for field in fields] == pytest.approx(
                [row[name] for name in COLUMNS] + [row["members"][name]["logprob"] for name in "AC"], rel=1e-5
            )


def test_pairs_on_standard_input_are_answered_line_by_line_before_it_ends(model_folders, texts):
    out = texts / "scores"
    assert main(arguments(model_folders, texts, "--output", str(out))) == 0
    expected = out.read_text().splitlines()
    sources, targets = ((texts / name).read_text(encoding="utf-8").split("\n") for name in ("src.txt", "hyp.txt"))
    command = arguments(model_folders, texts, source="-", translation=None)
    with start_with_pipes(command, texts, main) as (process, stdin, stdout):
        for number in range(5):
            stdin.write(f"{sources[number]}\t{targets[number]}\n".encode())
            if number == 0:
                assert stdout.readline().decode().rstrip("\n") == expected[0]
            assert stdout.readline().decode().rstrip("\n") == expected[number + 1]
        stdin.write(b"no tab here\n")
        stdin.close()
        assert stdout.read() == b""
        assert code_of(process) == 2
    assert "<stdin>:6: expected 2 columns, found 1" in (texts / "log").read_text()


def test_translations_may_come_from_standard_input(model_folders, texts):
    out = texts / "scores"
    assert main(arguments(model_folders, texts, "--output", str(out))) == 0
    with start_with_pipes(arguments(model_folders, texts, translation="-"), texts, main) as (process, stdin, stdout):
        stdin.write((texts / "hyp.txt").read_bytes())
        stdin.close()
        assert stdout.read() == out.read_bytes()
        assert code_of(process) == 0
    assert "4 of 5 lines" in (texts / "log").read_text()


@pytest.mark.parametrize(
    ("change", "extra", "named"),
    [
        (lambda t: (t / "hyp.txt").write_text("one\n"), (), "hyp.txt ends before line 2 of"),
        (lambda t: (t / "hyp.txt").write_text("x\n" * 6), (), "hyp.txt does not"),
        (lambda t: (t / "hyp.txt").write_text("x\n" * 3 + "dog " * 200 + "\nx\n"), (), "hyp.txt:4: prompt and trans"),
        (lambda t: (t / "src.txt").write_text("長い" * 300 + "\n" + "x\n" * 4, encoding="utf-8"), (), "hyp.txt:1"),
        (lambda t: (t / "hyp.txt").unlink(), (), "hyp.txt: no such file"),
        (lambda t: None, ("--combine", "A"), "C is given"),
        (lambda t: None, ("--batch-size", "0"), "--batch-size 0"),
        (lambda t: None, ("--output", "/no/such/folder/x"), "cannot be written"),
        (lambda t: None, ("--input", "-", "--translation", "-"), "both standard input"),
    ],
)
def test_bad_input_is_refused_in_one_line(model_folders, texts, capsys, change, extra, named):
    change(texts)
    code = exit_code(lambda: main(arguments(model_folders, texts, "--output", str(texts / "scores"), *extra)))
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert code == 2
    assert error.startswith("error: ")
    assert named in error


def test_lines_that_are_too_long_can_be_skipped(model_folders, texts):
    (texts / "hyp.txt").write_text("x\n\nx\n" + "dog " * 200 + "\nx\n")
    out = texts / "scores"
    assert main(arguments(model_folders, texts, "--output", str(out), "--too-long", "skip")) == 0
    tokens = [line.split("\t")[1] for line in out.read_text().splitlines()[1:]]
    assert [count == "0" for count in tokens] == [False, True, False, True, False]
