"""Several processes share a file's sentences: the same output with any number of them, and none hangs when one dies."""

import json
import os
import signal
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from processes import code_of, start_ranks
from test_resume import arguments, outcome, source, unbroken  # noqa: F401 (a fixture)

from decode.collab import main
from decode.pipeline.distributed import Ranks, shares


@given(st.lists(st.integers(1, 500), max_size=300), st.integers(1, 9), st.integers(1, 16))
def test_every_sentence_is_in_one_share_the_longest_first(costs, ranks, rows):
    found = shares(costs, ranks, rows)
    assert sorted(index for share in found for index in share) == list(range(len(costs)))
    in_order = [costs[index] for share in found for index in share]
    assert in_order == sorted(costs, reverse=True)
    assert all(len(share) >= rows for share in found[:-1])


@given(st.lists(st.integers(20, 500), min_size=400, max_size=600), st.integers(2, 4), st.data())
def test_no_rank_waits_long_even_where_one_is_half_as_fast(costs, ranks, data):
    """Ranks claim the next share when they are free: the last to end ends within two batches of the ideal."""
    speeds = [data.draw(st.sampled_from([1.0, 0.5])) for _ in range(ranks)]
    free = [0.0] * ranks
    for share in shares(costs, ranks, 8):
        rank = min(range(ranks), key=free.__getitem__)
        free[rank] += sum(costs[index] for index in share) / speeds[rank]
    ideal = sum(costs) / sum(speeds)
    assert max(free) <= max(1.16 * ideal, ideal + 2 * 8 * max(costs) / min(speeds))


@pytest.mark.parametrize("world", [2, 3])
def test_the_output_and_every_log_probability_are_those_of_one_process(model_folders, source, world):  # noqa: F811
    details = source / "details.jsonl"
    assert main(arguments(model_folders, source, "--details", str(details))) == 0
    alone, expected = details.read_bytes(), outcome(source)
    for file in ("hyp.txt", "run.json", "details.jsonl"):
        (source / file).unlink()
    processes = start_ranks(arguments(model_folders, source, "--details", str(details)), world, source)
    assert [code_of(process) for process in processes] == [0] * world
    assert outcome(source) == expected
    first, second = ([json.loads(line) for line in content.splitlines()] for content in (alone, details.read_bytes()))
    assert [entry["tokens"] for entry in first] == [entry["tokens"] for entry in second]
    for one, other in zip(first, second):
        assert one["logprobs"] == pytest.approx(other["logprobs"], abs=1e-5)
    assert json.loads((source / "run.json").read_text())["processes"] == world
    assert not list(source.glob("*.journal*"))


@pytest.mark.parametrize("victim", [0, 1])
def test_when_a_rank_dies_the_others_end_and_resume_does_the_rest(model_folders, source, victim):  # noqa: F811
    expected = unbroken(model_folders, source)
    processes = start_ranks(arguments(model_folders, source), 2, source, LOST_SECONDS="2.5")
    part = source / ("hyp.txt.journal" if victim == 0 else "hyp.txt.journal.rank1")
    while not (part.exists() and part.read_bytes().count(b"\n") > 5):
        time.sleep(0.002)
        assert processes[victim].is_alive()
    os.kill(processes[victim].pid, signal.SIGKILL)
    assert code_of(processes[victim]) == -signal.SIGKILL
    assert code_of(processes[1 - victim]) == 1
    survivor = (source / f"rank{1 - victim}.log").read_text()
    assert "Traceback" not in survivor
    assert ("rank 1 has not been heard of" if victim == 1 else "store does not answer") in survivor
    assert "--resume does the rest" in survivor
    assert main(arguments(model_folders, source, "--resume")) == 0
    assert outcome(source) == expected
    assert json.loads((source / "run.json").read_text())["resumed_sentences"] > 5


def test_an_interruption_of_all_ranks_keeps_what_each_finished(model_folders, source):  # noqa: F811
    expected = unbroken(model_folders, source)
    processes = start_ranks(arguments(model_folders, source), 2, source)
    while not all(part.exists() and part.read_bytes().count(b"\n") > 3 for part in _parts(source)):
        time.sleep(0.002)
    for process in processes:
        os.kill(process.pid, signal.SIGTERM)
    assert [code_of(process) for process in processes] == [130, 130]
    assert "rank 1: interrupted; what it finished is in" in (source / "rank1.log").read_text()
    processes = start_ranks(arguments(model_folders, source, "--resume"), 2, source)
    assert [code_of(process) for process in processes] == [0, 0]
    assert outcome(source) == expected


def test_a_group_that_torchrun_starts_again_resumes_by_itself(model_folders, source):  # noqa: F811
    expected = unbroken(model_folders, source)
    processes = start_ranks(arguments(model_folders, source), 2, source)
    while not all(part.exists() and part.read_bytes().count(b"\n") > 3 for part in _parts(source)):
        time.sleep(0.002)
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
        code_of(process)
    processes = start_ranks(arguments(model_folders, source), 2, source, TORCHELASTIC_RESTART_COUNT="1")
    assert [code_of(process) for process in processes] == [0, 0]
    assert outcome(source) == expected


def test_what_rank_0_refuses_is_said_once(model_folders, source):  # noqa: F811
    for extra in (("--output", "-"), ("--combine", "A + X")):
        processes = start_ranks(arguments(model_folders, source, *extra), 2, source)
        assert [code_of(process) for process in processes] == [2, 2]
        assert (source / "rank0.log").read_text().startswith("error: ")
        assert (source / "rank1.log").read_text() == ""


def _parts(folder):
    return folder / "hyp.txt.journal", folder / "hyp.txt.journal.rank1"


def test_a_heartbeat_under_way_ends_before_the_process_does(monkeypatch):
    """A thread that comes back from the store while Python shuts down ends the process by SIGABRT."""

    class SlowStore:
        def add(self, key, amount):
            beating.set()
            time.sleep(0.3)
            return 1

    beating = threading.Event()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("torch.distributed.rendezvous", lambda *_, **__: iter([(SlowStore(), 1, 2)]))
    ranks = Ranks()
    assert beating.wait(10)
    ranks.leave()
    assert not ranks.heart.is_alive()
