"""Scores are sacrebleu's own: checked against its command line, signatures and p-values included."""

import io
import json
import random
import re
import subprocess
import sys

import pytest

from corpora import sample
from corpora.metrics import bleu_tokenizers
from eval.score import main, score
from eval.significance import compare_means
from minillama.errors import InputError, exit_code

REFERENCE = {"en": sample().target, "ja": sample().source}


def damaged(lines, seed, share):
    """Translations that are worse: words (or characters) left out at random."""
    generator = random.Random(seed)
    worse = []
    for line in lines:
        parts = line.split() if " " in line else list(line)
        kept = [part for part in parts if generator.random() > share]
        worse.append((" " if " " in line else "").join(kept))
    return worse


@pytest.fixture
def files(tmp_path):
    paths = {}
    for target, reference in REFERENCE.items():
        systems = {"ref": reference, "good": damaged(reference, 1, 0.15), "bad": damaged(reference, 2, 0.4)}
        for name, lines in systems.items():
            paths[name, target] = tmp_path / f"{name}.{target}"
            paths[name, target].write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return paths


def sacrebleu_cli(*arguments):
    command = [sys.executable, "-m", "sacrebleu", *map(str, arguments), "-f", "json", "-w", "10"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, encoding="utf-8").stdout)


def sacrebleu_paired(reference, baseline, system, *options):
    """Scores and p-value as sacrebleu's table has them (its JSON output cannot hold chrF's float32)."""
    command = [sys.executable, "-m", "sacrebleu", reference, "-i", baseline, system, *options]
    command += ["--paired-bs", "--paired-bs-n", "200", "-f", "text", "-w", "6"]
    done = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True, encoding="utf-8")
    numbers = re.findall(r"([\d.]+) \([\d.]+ ± [\d.]+\)", done.stdout)
    [p_value] = re.findall(r"\(p = ([\d.]+)\)", done.stdout)
    return {"baseline": numbers[0], "system": numbers[1], "p_value": p_value}


def run(capsys, *arguments):
    code = exit_code(lambda: main([str(argument) for argument in arguments]))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize(("target", "tokenizer"), [("en", "13a"), ("ja", "13a"), ("ja", "ja-mecab")])
def test_scores_and_signatures_are_sacrebleus(files, capsys, target, tokenizer):
    good, ref = files["good", target], files["ref", target]
    code, out, _ = run(
        capsys,
        "--hypothesis",
        good,
        "--reference",
        ref,
        "--target",
        target,
        "--metrics",
        "bleu,chrf,chrf++,ter",
        "--json",
    )
    report = json.loads(out)
    assert code == 0
    assert report["sentences"] == 40
    bleu = sacrebleu_cli(ref, "-i", good, "-m", "bleu", "-tok", tokenizer)
    key = "bleu" if tokenizer == "13a" else "bleu_ja_mecab"
    chrf = sacrebleu_cli(ref, "-i", good, "-m", "chrf")
    chrf_words = sacrebleu_cli(ref, "-i", good, "-m", "chrf", "--chrf-word-order", "2")
    ter = sacrebleu_cli(ref, "-i", good, "-m", "ter")
    for ours, theirs in [(key, bleu), ("chrf", chrf), ("chrf++", chrf_words), ("ter", ter)]:
        assert report[ours] == pytest.approx(theirs["score"], abs=1e-8)
        assert report[f"{ours}_signature"] == theirs["signature"]


def test_p_values_are_sacrebleus_paired_bootstrap(files, capsys):
    good, bad, ref = (files[name, "ja"] for name in ("good", "bad", "ref"))
    _, out, _ = run(
        capsys,
        "--hypothesis",
        bad,
        "--baseline",
        good,
        "--reference",
        ref,
        "--target",
        "ja",
        "--samples",
        200,
        "--json",
    )
    report = json.loads(out)
    [baseline] = report["baselines"]
    for key, options in [
        ("bleu", ["-m", "bleu"]),
        ("bleu_ja_mecab", ["-m", "bleu", "-tok", "ja-mecab"]),
        ("chrf", ["-m", "chrf"]),
    ]:
        theirs = sacrebleu_paired(ref, good, bad, *options)
        [row] = [row for row in baseline["metrics"] if row["key"] == key]
        assert f"{row['p_value']:.4f}" == theirs["p_value"]
        assert f"{row['score']:.6f}" == theirs["baseline"]
        assert f"{report[key]:.6f}" == theirs["system"]
        assert row["difference"] == pytest.approx(report[key] - row["score"])
        assert "bs:200|seed:12345" in report[f"{key}_signature"]


def test_the_seed_decides_the_p_values_and_nothing_else(monkeypatch):
    reference = REFERENCE["en"]
    systems = {"hypotheses": damaged(reference, 1, 0.2), "baselines": {"b": damaged(reference, 5, 0.22)}}
    monkeypatch.setenv("SACREBLEU_SEED", "99")
    first = score(references=reference, **systems)
    assert first == score(references=reference, **systems)
    other = score(references=reference, seed=1, **systems)
    assert other["bleu"] == first["bleu"]
    assert other["baselines"] != first["baselines"]
    assert "seed:12345" in first["bleu_signature"]


def test_a_system_does_not_differ_from_itself():
    reference = REFERENCE["en"]
    hypotheses = damaged(reference, 1, 0.2)
    [baseline] = score(hypotheses, reference, baselines={"same": list(hypotheses)})["baselines"]
    assert {row["p_value"] for row in baseline["metrics"]} == {1.0}
    assert {row["difference"] for row in baseline["metrics"]} == {0.0}
    assert compare_means([[0.5, 0.25], [0.5, 0.25]], 100, 1) == [1.0]


def test_means_are_compared_as_sacrebleu_compares_corpora():
    from sacrebleu.metrics.base import Metric, Score, Signature
    from sacrebleu.significance import PairedTest

    generator = random.Random(3)
    systems = [[generator.random() + shift for _ in range(60)] for shift in (0.0, 0.04, 0.3)]

    class Mean(Metric):
        """The mean of numbers, each written as a hypothesis, as a sacrebleu metric."""

        _SIGNATURE_TYPE = Signature

        def __init__(self):
            super().__init__()
            self.num_refs = 1

        def _extract_corpus_statistics(self, hypotheses, references):
            return [[float(hypothesis), 1.0] for hypothesis in hypotheses]

        def _compute_score_from_stats(self, stats):
            return Score("Mean", float(stats[0]) / float(stats[1]))

        def _aggregate_and_compute(self, stats):
            return self._compute_score_from_stats([sum(column) for column in zip(*stats)])

        def _preprocess_segment(self, sent):
            return sent

        def _compute_segment_statistics(self, hypothesis, ref_kwargs):
            raise NotImplementedError

        def _extract_reference_info(self, refs):
            raise NotImplementedError

        def _compute_f_score(self, *values):
            raise NotImplementedError

    named = [(str(number), [repr(value) for value in system]) for number, system in enumerate(systems)]
    _, results = PairedTest(named, {"mean": Mean()}, None, test_type="bs", n_samples=1000)()
    assert compare_means(systems, 1000, 12345) == pytest.approx([row.p_value for row in results["Mean"][1:]], abs=2e-3)


def test_languages_without_spaces_are_scored_both_ways():
    assert bleu_tokenizers(None) == ["13a"]
    assert bleu_tokenizers("de") == ["13a"]
    assert bleu_tokenizers("ja") == ["13a", "ja-mecab"]
    assert bleu_tokenizers("zh-CN") == ["13a", "zh"]
    assert bleu_tokenizers("ko")[0] == "13a"


def test_standard_input_is_a_hypothesis(files, capsys, monkeypatch):
    ref = files["ref", "ja"]
    content = io.BufferedReader(io.BytesIO(files["good", "ja"].read_bytes()))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(content, encoding="utf-8"))
    code, out, _ = run(capsys, "--hypothesis", "-", "--reference", ref, "--json")
    assert code == 0
    assert json.loads(out)["hypothesis"] == "<stdin>"
    assert json.loads(out)["bleu"] == score(damaged(REFERENCE["ja"], 1, 0.15), REFERENCE["ja"])["bleu"]


def test_the_table_has_every_score_and_every_signature(files, capsys):
    arguments = ["--hypothesis", files["good", "en"], "--reference", files["ref", "en"], "--target", "ja"]
    code, out, err = run(capsys, *arguments, "--baseline", files["bad", "en"], "--baseline", files["ref", "en"])
    assert code == 0
    header, good, bad, same, *signatures = out.splitlines()
    assert [word in header for word in ("BLEU 13a", "BLEU ja-mecab", "chrF2")] == [True] * 3
    assert str(files["good", "en"]) in good
    assert bad.count("p=") == 3
    assert same.count("100.00") == 3
    assert sum("version:" in line for line in signatures) == 3
    assert "scoring 40 sentences" in err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--hypothesis": "short"}, "short has 3 lines and {ref} has 40, expected the same number"),
        ({"--baseline": "short"}, "short has 3 lines and {ref} has 40, expected the same number"),
        ({"--hypothesis": "empty", "--reference": "empty"}, "empty: no sentences to score"),
        ({"--hypothesis": "absent"}, "absent: no such file"),
        ({"--hypothesis": "latin1"}, "latin1:2: not valid UTF-8"),
        ({"--metrics": "bleu,bluert"}, "unknown metric 'bluert', expected some of bleu,chrf,chrf++,ter,bertscore"),
        ({"--metrics": ","}, "unknown metric ''"),
        ({"--target": "xx"}, "unknown language 'xx'"),
        ({"--samples": "0"}, "0 resamples"),
        ({"--hypothesis": "-", "--reference": "-"}, "'-' is given more than once"),
    ],
)
def test_bad_input_ends_with_one_line_and_code_2(files, tmp_path, capsys, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short").write_text("a\nb\nc\n")
    (tmp_path / "empty").write_text("")
    (tmp_path / "latin1").write_bytes(b"fine\nf\xfcr\n")
    arguments = {"--hypothesis": files["good", "en"], "--reference": files["ref", "en"]} | change
    code, out, err = run(capsys, *[part for pair in arguments.items() for part in pair])
    assert (code, out) == (2, "")
    assert message.format(ref=files["ref", "en"]) in err.splitlines()[-1]
    assert sum(line.startswith("error:") for line in err.splitlines()) == 1


def test_help_does_not_import_torch():
    check = "import sys, eval.score; eval.score._parser().format_help(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_unequal_lengths_in_python_name_both_counts():
    with pytest.raises(InputError, match="the hypothesis has 1 lines and the reference has 2"):
        score(["a"], ["a", "b"])
    with pytest.raises(InputError, match="old has 3 lines and the reference has 2"):
        score(["a", "b"], ["a", "b"], baselines={"old": ["a", "b", "c"]})


def test_the_command_line_prints_json_and_nothing_else(files):
    command = [
        sys.executable,
        "-m",
        "eval.score",
        "--hypothesis",
        files["good", "en"],
        "--reference",
        files["ref", "en"],
    ]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["bleu"] > 0
    assert len(done.stderr.splitlines()) == 1
    failed = subprocess.run([*command, "--metrics", "none"], capture_output=True, text=True, check=False)
    assert (failed.returncode, failed.stdout) == (2, "")
