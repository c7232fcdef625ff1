"""A step's key says all that decides its result and nothing else; the runner does each step once, inputs first."""

import json
import multiprocessing
import os
import signal
import threading
import time
from dataclasses import replace

import pytest

from eval.study.config import Run
from eval.study.graph import Artifact, Input, Named, Step, Store, Text, in_order
from eval.study.runner import Runner
from minillama.errors import InputError, Interrupted

WRITER = """
import pathlib, sys, time
time.sleep(float(sys.argv[3]) if len(sys.argv) > 3 else 0)
target = pathlib.Path(sys.argv[1])
target.write_text(sys.argv[2] + "".join(pathlib.Path(name).read_text() for name in sys.argv[4:]))
with open(target.parents[1] / "order", "a") as order:
    order.write(sys.argv[2] + "\\n")
"""


@pytest.fixture
def store(tmp_path, monkeypatch):
    (tmp_path / "writer.py").write_text(WRITER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return Store(tmp_path / "work")


def step(name, seconds="0", inputs=(), **more):
    words = ("writer", "{step}/out", name, seconds, *(Artifact(before) for before in inputs))
    return Step(name, "data", words, **more)


def order(store):
    return (store.work / "steps" / "order").read_text().split()


def test_the_key_follows_every_input_and_no_path(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("one")
    first = Step("x", "data", ("m", Input(text)))
    key = first.key
    assert Step("another name", "data", ("m", Input(text))).key == key
    assert replace(first, unkeyed=("--batch-size", "3")).key == key
    assert replace(first, arguments=("m", Input(text), "--more")).key != key
    assert replace(first, kind="sft").key != key
    moved = tmp_path / "b.txt"
    moved.write_text("one")
    assert Step("x", "data", ("m", Input(moved))).key == key
    text.write_text("two")
    other = Step("x", "data", ("m", Input(text)))
    assert other.key != key
    assert (
        Step("y", "sft", ("m", Named("L", Artifact(first)))).key
        != Step("y", "sft", ("m", Named("L", Artifact(other)))).key
    )
    assert (
        Step("y", "sft", ("m", Named("L", Artifact(first)))).key
        != Step("y", "sft", ("m", Named("S", Artifact(first)))).key
    )
    assert Step("y", "sft", (Text("c", "1"),)).key != Step("y", "sft", (Text("c", "2"),)).key


def test_equal_steps_are_one_and_inputs_come_first():
    base = step("base")
    left, same, right = step("left", inputs=[base]), step("left", inputs=[step("base")]), step("right", inputs=[base])
    top = step("top", inputs=[left, right])
    names = [found.name for found in in_order([top, same])]
    assert names == ["base", "left", "right", "top"]


@pytest.mark.parametrize("jobs", [1, 3])
def test_each_step_runs_once_after_its_inputs(store, jobs):
    a, b = step("a"), step("b")
    steps = in_order([step("d", inputs=[step("c", inputs=[a, b]), a])])
    Runner(store, Run(jobs=jobs)).run(steps)
    assert sorted(order(store)) == ["a", "b", "c", "d"]
    assert order(store).index("c") > max(order(store).index("a"), order(store).index("b"))
    assert store.path(Artifact(steps[-1])).read_text() == "dcaba"
    done = store.done(steps[-1])
    assert done["key"] == steps[-1].key
    assert done["peak_memory_bytes"] > 0
    Runner(store, Run(jobs=jobs)).run(steps)
    assert len(order(store)) == 4


def test_a_step_that_fails_stops_what_needs_it_and_keeps_the_rest(store):
    good, bad = step("good"), Step("bad", "data", ("no_such_module",))
    steps = in_order([good, step("after", inputs=[bad]), step("other", inputs=[good])])
    with pytest.raises(InputError, match=r"bad: exit code 1 \(.*no_such_module.*\); see .*log.txt"):
        Runner(store, Run(jobs=1)).run(steps)
    assert store.is_done(good)
    assert not store.is_done(bad)
    assert "after" not in order(store)


def test_an_interruption_ends_the_command_and_tells_how_to_resume(store):
    steps = in_order([step("slow", "60")])
    started = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    started.start()
    with pytest.raises(Interrupted, match="0 of 1 steps done; the same command resumes"):
        Runner(store, Run()).run(steps)
    assert not store.is_done(steps[0])


def _run(work, steps):
    Runner(Store(work), Run()).run(steps)


def test_two_runs_at_once_do_a_step_once(store):
    steps = in_order([step("slow", "1", inputs=[step("first")])])
    others = [multiprocessing.get_context("fork").Process(target=_run, args=(store.work, steps)) for _ in range(2)]
    for other in others:
        other.start()
    for other in others:
        other.join(60)
        assert other.exitcode == 0
    assert sorted(order(store)) == ["first", "slow"]


def test_the_command_keeps_the_lock_of_a_runner_that_was_killed(store):
    """So a run that resumes waits for it instead of writing into the same folder."""
    steps = in_order([step("slow", "1")])
    other = multiprocessing.get_context("fork").Process(target=_run, args=(store.work, steps))
    other.start()
    lock = store.folder(steps[0]) / ".lock"
    while not (store.folder(steps[0]) / "log.txt").exists():
        time.sleep(0.05)
    os.kill(other.pid, signal.SIGKILL)
    other.join()
    assert lock.exists()
    Runner(store, Run()).run(steps)
    assert order(store) == ["slow", "slow"]
    assert json.loads((store.folder(steps[0]) / "done.json").read_text())["seconds"] >= 1
