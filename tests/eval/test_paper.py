"""A whole study of random text: every step runs once, and a run that was interrupted ends with the same results."""

import importlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from corpora import sample
from eval.paper import main
from eval.study.runner import Runner
from minillama.errors import exit_code

STUDIES = Path(__file__).resolve().parents[2] / "eval"
COMMANDS = ["eval.part", "eval.compare", "train.bpe", "train.cpt", "train.sft", "decode.collab", "decode.tune"]
# Imported late by some of them; also before the fork.
LATE_IMPORTS = ["torch._dynamo", "tokenizers.implementations", "sacrebleu.metrics"]
# What two runs of one study may have otherwise.
CLOCKS = {"seconds", "tokens_per_second", "peak_memory_bytes", "hypothesis_file", "steps", "date", "commit"}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """60 lines of shuffled words of the sample's sentences."""
    folder = tmp_path_factory.mktemp("words")
    generator, pairs = random.Random(5), sample()
    for language, lines in (("ja", pairs.source), ("en", pairs.target)):
        text = [" ".join(generator.choice(lines).split()[:5])[:24] for _ in range(60)]
        (folder / f"words.{language}.txt").write_text("".join(f"{line}\n" for line in text), encoding="utf-8")
    return folder


def run(words, work, *more):
    return exit_code(lambda: main([str(STUDIES / "tiny.toml"), "--data", str(words), "--work", str(work), *more]))


def run_command(command, log):
    """What `python -m` does, in a process that has imported PyTorch before it was forked."""
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    module = importlib.import_module(command[0])
    sys.exit(exit_code(lambda: module.main(command[1:])))


def execute_forked(runner, command, slots, log, lock):
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=run_command, args=(command, log))
    process.start()
    process.join()
    return process.exitcode, 1


def figures(value):
    """Results without what depends on clocks and folders."""
    if isinstance(value, dict):
        return {key: figures(entry) for key, entry in value.items() if key not in CLOCKS}
    return [figures(entry) for entry in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def finished(words, tmp_path_factory):
    """The work folder of a whole run. Its commands are forked, not started, which saves importing PyTorch 24 times."""
    work = tmp_path_factory.mktemp("work")
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__, *COMMANDS, *LATE_IMPORTS])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runner, "_execute", execute_forked)
        assert run(words, work) == 0
    return work


def test_every_row_has_its_figures_and_the_report_is_written(finished):
    results = json.loads((finished / "results.json").read_text())
    names = ["tiny.original", "tiny.finetuning", "small.original"]
    names += ["small.proxy", "small.half", "small.collab", "small.fitted"]
    assert [row["id"] for row in results["rows"]] == names
    for row in results["rows"]:
        cell = row["cells"]["ja-en"]
        assert {"bleu", "chrf"} <= {metric["key"] for metric in cell["metrics"]}
        assert (finished / cell["hypothesis_file"]).read_text(encoding="utf-8").count("\n") == 10
    collab = results["rows"][5]["cells"]["ja-en"]
    assert collab["weights"] == {"L": 1.0, "S_srcMT": 1.0, "S_tgtMT": 1.0}
    assert 0 < collab["p"]["proxy"]["bleu"] <= 1
    assert 0 < collab["p"]["large"]["chrf"] <= 1
    fit = results["fits"]["small"]["ja-en"]["likelihood"]
    assert fit["nats_per_token"] <= min(fit["fixed"].values()) + 1e-6
    assert collab["nats_per_token"] == pytest.approx(fit["fixed"]["L + S_srcMT + S_tgtMT"])
    assert {path.name for path in (finished / "report").iterdir()} >= {"report.md", "report.tex"}


def test_no_step_runs_twice_and_a_change_reruns_what_depends_on_it(words, finished, tmp_path, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.glob("steps/*/done.json")}
    assert run(words, finished) == 0
    assert {path: path.stat().st_mtime_ns for path in finished.glob("steps/*/done.json")} == before
    changed = tmp_path / "tiny.toml"
    changed.write_text((STUDIES / "tiny.toml").read_text().replace("samples = 50", "samples = 60"))
    capsys.readouterr()
    arguments = [str(changed), "--data", str(words), "--work", str(finished), "--dry-run", "--steps"]
    assert main(arguments) == 0
    to_do = [line for line in capsys.readouterr().out.splitlines() if line.startswith("to do")]
    assert sorted(line.split()[3] for line in to_do) == ["score", "score"]


@pytest.mark.slow
def test_a_study_killed_twice_ends_with_the_same_results(words, finished, tmp_path):
    command = [sys.executable, "-m", "eval.paper", str(STUDIES / "tiny.toml"), "--data", str(words)]
    command += ["--work", str(tmp_path / "killed")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as the uninterrupted run has it
    for kind, seconds in ((signal.SIGKILL, 12), (signal.SIGTERM, 15)):
        process = subprocess.Popen(command, env=environment, cwd=STUDIES.parent)
        time.sleep(seconds)
        process.send_signal(kind)
        assert process.wait(120) in (-signal.SIGKILL, 130)
    subprocess.run(command, check=True, env=environment, cwd=STUDIES.parent)
    results = [json.loads((work / "results.json").read_text()) for work in (finished, tmp_path / "killed")]
    assert figures(results[0]) == figures(results[1])


def test_the_plan_predicts_memory_and_compares_it_with_a_device(tmp_path, capsys):
    arguments = [str(STUDIES / "paper.toml"), "--dry-run", "--work", str(tmp_path / "work")]
    assert main(arguments) == 0
    without = capsys.readouterr().out
    assert "fit " in without
    assert "fits)" not in without
    assert main([*arguments, "--gpu-memory", "80", "--steps"]) == 0
    lines = capsys.readouterr().out.splitlines()
    # Three models in bf16 take 2 bytes a weight: 8.03e9 + 2 * 1.24e9 weights.
    [line] = [line for line in lines if "decode ja-en 8B.collab" in line and line.startswith("to do")]
    assert line.endswith("19.6 GiB (fits)")
    # Fine-tuning 1B takes at least its weights, gradients and two moments, 2 bytes each.
    [line] = [line for line in lines if line.endswith("(fits)") and "sft ja-en S_MT" in line and line[0] == "t"]
    assert float(line.split()[-3]) > 4 * 2 * 1.24e9 / 2**30
    assert main([*arguments, "--gpu-memory", "8"]) == 0
    assert "(does not fit)" in capsys.readouterr().out
    assert not (tmp_path / "work").exists()


def test_a_missing_file_is_named(tmp_path, capsys):
    assert run(tmp_path, tmp_path / "work") == 2
    assert "words.ja.txt: No such file or directory; --data names the folder" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()
