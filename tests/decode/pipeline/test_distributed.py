"""Several processes share a file's sentences: the output is that of one, and none hangs when another dies."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import LINES, STORES, arguments, code_of, kill, outcome, start_ranks, uninterrupted, wait_for_lines

from decode.collab import main
from decode.pipeline.distributed import chunks
from minillama.errors import exit_code

# Seconds until a run counts as hanging: some hundred exchanges between processes that share a busy machine.
PATIENCE = 300


@given(st.lists(st.integers(1, 500), max_size=300), st.integers(1, 9), st.integers(1, 16))
def test_every_sentence_is_in_one_chunk_the_longest_first(costs, ranks, batch_size):
    found = chunks(costs, ranks, batch_size)
    assert sorted(index for chunk in found for index in chunk) == list(range(len(costs)))
    in_order = [costs[index] for chunk in found for index in chunk]
    assert in_order == sorted(costs, reverse=True)
    assert all(len(chunk) >= batch_size for chunk in found[:-1])


@settings(max_examples=25)
@given(st.lists(st.integers(20, 500), min_size=400, max_size=600), st.integers(2, 4), st.data())
def test_no_rank_waits_long_even_where_one_is_half_as_fast(costs, ranks, data):
    """Ranks take the next chunk when they are free: the last to end ends within two batches of the ideal."""
    speeds = [data.draw(st.sampled_from([1.0, 0.5])) for _ in range(ranks)]
    free = [0.0] * ranks
    for chunk in chunks(costs, ranks, 8):
        rank = min(range(ranks), key=free.__getitem__)
        free[rank] += sum(costs[index] for index in chunk) / speeds[rank]
    ideal = sum(costs) / sum(speeds)
    assert max(free) <= max(1.16 * ideal, ideal + 2 * 8 * max(costs) / min(speeds))


def test_the_output_and_every_log_probability_are_those_of_one_process(model_folders, source):
    details = source / "details.jsonl"
    assert main(arguments(model_folders, source, "--details", str(details))) == 0
    alone, expected = details.read_bytes(), outcome(source)
    for file in ("hyp.txt", "run.json", "details.jsonl"):
        (source / file).unlink()
    processes = start_ranks(arguments(model_folders, source, "--details", str(details)), 3, source)
    assert [code_of(process) for process in processes] == [0] * 3
    assert outcome(source) == expected
    assert details.read_bytes() == alone
    assert json.loads((source / "run.json").read_text())["processes"] == 3
    assert not list(source.glob("*.journal*"))


def test_when_the_main_process_dies_what_others_finish_is_kept(model_folders, source):
    expected = uninterrupted(model_folders, source)
    processes = start_ranks(arguments(model_folders, source), 2, source)
    wait_for_lines([source / "hyp.txt.journal"], 5)
    kill(processes[0])
    assert code_of(processes[1]) == 0
    assert main(arguments(model_folders, source, "--resume")) == 0
    assert outcome(source) == expected
    assert json.loads((source / "run.json").read_text())["resumed_sentences"] > 5


def test_when_the_store_is_lost_all_end_and_resume_does_the_rest(model_folders, source):
    expected = uninterrupted(model_folders, source)
    processes = start_ranks(arguments(model_folders, source, "--batch-size", "1"), 2, source)
    wait_for_lines([source / "hyp.txt.journal", source / "hyp.txt.journal.rank1"], 2)
    STORES.clear()
    assert [code_of(process) for process in processes] == [1, 1]
    for rank in range(2):
        log = (source / f"rank{rank}.log").read_text()
        assert "Traceback" not in log
        assert "store does not answer" in log
        assert "--resume does the rest" in log
    assert main(arguments(model_folders, source, "--resume")) == 0
    assert outcome(source) == expected


def test_when_a_rank_dies_torchrun_ends_the_others_and_resume_does_the_rest(model_folders, source):
    expected = uninterrupted(model_folders, source)
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "decode.collab"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (
        open(source / "log", "w") as log,
        subprocess.Popen(
            [sys.executable, *launch, *arguments(model_folders, source, "--batch-size", "1")],
            stderr=log,
            env=environment,
        ) as torchrun,
    ):
        wait_for_lines([source / "hyp.txt.journal.rank1"], 3)
        os.kill(_child(torchrun.pid, rank=1), signal.SIGKILL)
        assert torchrun.wait(120) == 1
    assert "--resume continues from there" in (source / "log").read_text()
    assert main(arguments(model_folders, source, "--resume")) == 0
    assert outcome(source) == expected


def _child(parent, rank):
    """The process id of a rank below torchrun."""
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                with open(f"/proc/{entry.name}/stat") as stat, open(f"/proc/{entry.name}/environ", "rb") as environ:
                    if re.match(rf".*\) \w {parent} ", stat.read()) and f"\0RANK={rank}\0".encode() in environ.read():
                        return int(entry.name)
            except OSError:
                continue
    raise AssertionError("no such rank")


def test_an_interruption_or_a_restart_of_all_ranks_keeps_what_each_finished(model_folders, source):
    expected = uninterrupted(model_folders, source)
    journals = source / "hyp.txt.journal", source / "hyp.txt.journal.rank1"
    processes = start_ranks(arguments(model_folders, source, "--batch-size", "1"), 2, source)
    wait_for_lines(journals, 3)
    for process in processes:
        os.kill(process.pid, signal.SIGTERM)
    assert [code_of(process) for process in processes] == [130, 130]
    assert f"in {journals[1]}: --resume continues" in (source / "rank1.log").read_text()
    # torchrun --max-restarts starts all ranks again, without --resume.
    processes = start_ranks(arguments(model_folders, source), 2, source, TORCHELASTIC_RESTART_COUNT="1")
    assert [code_of(process) for process in processes] == [0, 0]
    assert outcome(source) == expected


@pytest.mark.parametrize("extra", [("--output", "-"), ("--combine", "A + X")])
def test_what_the_main_process_refuses_is_said_once(model_folders, source, extra):
    processes = start_ranks(arguments(model_folders, source, *extra), 2, source)
    assert [code_of(process) for process in processes] == [2, 2]
    assert (source / "rank0.log").read_text().startswith("error: ")
    assert (source / "rank1.log").read_text() == ""


@pytest.mark.parametrize(
    ("shared", "world"),
    [("A=2", 2), pytest.param("2", 2, marks=pytest.mark.slow), pytest.param("2", 4, marks=pytest.mark.slow)],
)
def test_processes_that_share_a_member_write_what_one_process_writes(model_folders, source, shared, world):
    (source / "src.txt").write_text("\n".join(LINES[24:36]) + "\n", encoding="utf-8")  # two of them blank
    expected = uninterrupted(model_folders, source)
    command = arguments(model_folders, source, "--tensor-parallel", shared, "--batch-size", "6")
    processes = start_ranks(command, world, source)
    assert [code_of(process, PATIENCE) for process in processes] == [0] * world, (source / "rank0.log").read_text()
    assert outcome(source) == expected
    report = json.loads((source / "run.json").read_text())
    assert (report["processes"], report["tensor_parallel"]) == (world, 2)
    assert not list(source.glob("*.journal*"))


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_when_a_process_that_shares_a_member_dies_the_other_ends(model_folders, source, victim):
    expected = uninterrupted(model_folders, source)
    command = arguments(model_folders, source, "--tensor-parallel", "2", "--resume")
    processes = start_ranks([*command, "--batch-size", "1"], 2, source)
    wait_for_lines([source / "hyp.txt.journal"], 4)
    kill(processes[victim])
    assert code_of(processes[1 - victim], PATIENCE) == 1
    log = (source / f"rank{1 - victim}.log").read_text()
    assert "Traceback" not in log
    assert "does not answer" in log
    processes = start_ranks([*command, "--batch-size", "60"], 2, source)
    assert [code_of(process, PATIENCE) for process in processes] == [0, 0]
    assert outcome(source) == expected
    assert json.loads((source / "run.json").read_text())["resumed_sentences"] >= 4


def test_what_cannot_be_shared_is_refused_once_and_before_weights_are_read(model_folders, source, capsys):
    for extra, world, named in (
        (("--tensor-parallel", "3"), 2, "--tensor-parallel 3: 2 processes are running"),
        (("--tensor-parallel", "4"), 4, "A has 2 key and value heads, which 4 processes cannot share evenly"),
    ):
        processes = start_ranks(arguments(model_folders, source, *extra), world, source)
        assert [code_of(process, PATIENCE) for process in processes] == [2] * world
        logs = [(source / f"rank{rank}.log").read_text() for rank in range(world)]
        assert named in logs[0]
        assert logs[1:] == [""] * (world - 1)
    assert exit_code(lambda: main(arguments(model_folders, source, "--tensor-parallel", "2"))) == 2
    assert "1 process is running; start a multiple of 2 with torchrun" in capsys.readouterr().err
