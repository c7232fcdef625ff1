"""A whole study of random text: every step is done once, and a run that was interrupted ends with the same results."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from corpora import sample
from eval.paper import main
from minillama.errors import exit_code

STUDIES = Path(__file__).resolve().parents[2] / "eval"
# What another run of the same study may have otherwise.
CLOCKS = {"seconds", "tokens_per_second", "peak_memory_bytes", "hypothesis_file", "steps", "date", "commit"}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """60 lines of shuffled words of the sample's sentences."""
    folder = tmp_path_factory.mktemp("words")
    draw, pairs = random.Random(5), sample()
    for language, lines in (("ja", pairs.source), ("en", pairs.target)):
        text = [" ".join(draw.choice(lines).split()[:5])[:24] for _ in range(60)]
        (folder / f"words.{language}.txt").write_text("".join(f"{line}\n" for line in text), encoding="utf-8")
    return folder


def run(words, work, *more):
    return exit_code(lambda: main([str(STUDIES / "tiny.toml"), "--data", str(words), "--work", str(work), *more]))


def figures(value):
    """Results without what a clock or a folder decides."""
    if isinstance(value, dict):
        return {key: figures(entry) for key, entry in value.items() if key not in CLOCKS}
    return [figures(entry) for entry in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def whole(words, tmp_path_factory):
    work = tmp_path_factory.mktemp("whole")
    assert run(words, work) == 0
    return work


def test_every_row_has_its_figures_and_the_report_stands(whole):
    results = json.loads((whole / "results.json").read_text())
    names = ["tiny.original", "tiny.finetuning", "small.original"]
    names += ["small.proxy", "small.half", "small.collab", "small.fitted"]
    assert [row["id"] for row in results["rows"]] == names
    for row in results["rows"]:
        cell = row["cells"]["ja-en"]
        assert {"bleu", "chrf"} <= {metric["key"] for metric in cell["metrics"]}
        assert (whole / cell["hypothesis_file"]).read_text(encoding="utf-8").count("\n") == 10
    collab = results["rows"][5]["cells"]["ja-en"]
    assert collab["weights"] == {"L": 1.0, "S_srcMT": 1.0, "S_tgtMT": 1.0}
    assert 0 < collab["p"]["proxy"]["bleu"] <= 1
    assert 0 < collab["p"]["large"]["chrf"] <= 1
    fit = results["fits"]["small"]["ja-en"]["likelihood"]
    assert fit["nats_per_token"] <= min(fit["fixed"].values()) + 1e-6
    assert collab["nats_per_token"] == pytest.approx(fit["fixed"]["L + S_srcMT + S_tgtMT"])
    written = {path.suffix for path in (whole / "report").iterdir()}
    assert {".md", ".tex", ".html"} <= written


def test_nothing_is_done_twice_and_a_change_redoes_what_depends_on_it(words, whole, tmp_path, capsys):
    before = {path: path.stat().st_mtime_ns for path in whole.glob("steps/*/done.json")}
    assert run(words, whole) == 0
    assert {path: path.stat().st_mtime_ns for path in whole.glob("steps/*/done.json")} == before
    changed = tmp_path / "tiny.toml"
    changed.write_text((STUDIES / "tiny.toml").read_text().replace("samples = 50", "samples = 60"))
    capsys.readouterr()
    arguments = [str(changed), "--data", str(words), "--work", str(whole), "--dry-run", "--steps"]
    assert main(arguments) == 0
    to_do = [line for line in capsys.readouterr().out.splitlines() if line.startswith("to do")]
    assert sorted(line.split()[3] for line in to_do) == ["score", "score"]


@pytest.mark.slow
def test_a_study_killed_twice_ends_with_the_same_results(words, whole, tmp_path):
    command = [sys.executable, "-m", "eval.paper", str(STUDIES / "tiny.toml"), "--data", str(words)]
    command += ["--work", str(tmp_path / "killed")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as the unbroken run has it
    for kind, seconds in ((signal.SIGKILL, 12), (signal.SIGTERM, 15)):
        process = subprocess.Popen(command, env=environment, cwd=STUDIES.parent)
        time.sleep(seconds)
        process.send_signal(kind)
        assert process.wait(120) in (-signal.SIGKILL, 130)
    subprocess.run(command, check=True, env=environment, cwd=STUDIES.parent)
    results = [json.loads((work / "results.json").read_text()) for work in (whole, tmp_path / "killed")]
    assert figures(results[0]) == figures(results[1])


def test_a_file_that_is_not_there_is_named(words, tmp_path, capsys):
    assert run(tmp_path, tmp_path / "work") == 2
    assert "words.ja.txt: No such file or directory; --data names the folder" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()
