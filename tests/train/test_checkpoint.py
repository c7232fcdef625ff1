"""Checkpoints: written atomically, refused by name if damaged, and a run ends in the same bytes after any end."""

import json
import resource
import signal
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from kills import kill_and_resume
from random_examples import examples_of
from tiny import tiny_model

from minillama import InputError
from minillama.errors import Interrupted, exit_code
from train import sft
from train.checkpoint import Checkpoints, Progress
from train.config import Settings
from train.distributed import DistributedContext
from train.metrics import Reporter
from train.trainer import StopRequest, Trainer

EVERY = {"checkpoint_every": 3, "eval_every": 2, "keep": "best", "keep_checkpoints": 3}
RUN = Settings(epochs=3, lr=1e-3, batch_size=4, schedule="cosine", **EVERY)


class StopAt(Reporter):
    """Asks for the run's end at a step, as a signal does; or, with `crash`, ends it there."""

    def __init__(self, at=0, crash=False):
        super().__init__(silent=True)
        self.at, self.crash, self.notes = at, crash, []

    def step(self, step, loss, tokens):
        if step == self.at:
            if self.crash:
                raise RuntimeError("crash")
            self.trainer.stop.made = True

    def note(self, text):
        self.notes.append(text)


def train(output, resume=False, settings=RUN, reporter=None, seed=2):
    """One run over 16 examples, 4 held out; the trained weights. A resumed run starts from other weights."""
    reporter = reporter or StopAt()
    trainer = Trainer(tiny_model(seed), examples_of(16), examples_of(4, 9), settings, output)
    reporter.trainer = trainer
    trainer.run(resume, reporter)
    return [parameter.detach().clone() for parameter in trainer.model.parameters()]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    output = tmp_path_factory.mktemp("unbroken")
    return output, train(output)


def assert_equal_runs(output, weights, unbroken):
    assert (output / "metrics.jsonl").read_bytes() == (unbroken[0] / "metrics.jsonl").read_bytes()
    assert all(torch.equal(one, other) for one, other in zip(weights, unbroken[1]))


def steps_of(output):
    return sorted(int(path.name[5:]) for path in (output / "checkpoints").iterdir())


@pytest.mark.parametrize("at", [2, 10])
def test_a_run_that_crashed_resumes_to_the_same_bits(tmp_path, unbroken, at):
    with pytest.raises(RuntimeError, match="crash"):
        train(tmp_path, reporter=StopAt(at, crash=True))
    # from other weights, if there is a checkpoint: everything must come from it
    assert_equal_runs(tmp_path, train(tmp_path, resume=True, seed=2 if at == 2 else 7), unbroken)


def test_resuming_with_other_settings_is_refused_by_name(tmp_path):
    with pytest.raises(Interrupted):
        train(tmp_path, reporter=StopAt(2))
    with pytest.raises(InputError, match=r"lr \(was 0\.001, now 0\.01\)"):
        train(tmp_path, resume=True, settings=replace(RUN, lr=0.01))


@pytest.mark.parametrize("at", [1, 4, 12])
def test_a_run_that_is_asked_to_stop_saves_that_step_and_goes_on_from_it(tmp_path, unbroken, at):
    with pytest.raises(Interrupted, match=f"stopped and saved at step {at} of 12.*--resume --output {tmp_path}"):
        train(tmp_path, reporter=StopAt(at))
    assert at in steps_of(tmp_path)
    assert_equal_runs(tmp_path, train(tmp_path, resume=True, seed=7), unbroken)


def test_the_last_checkpoints_are_kept_and_the_best_that_they_refer_to(tmp_path):
    checkpoints = Checkpoints(tmp_path, 2, DistributedContext())
    for step, best in ((1, 1), (2, 1), (3, 3), (4, 3), (5, 3), (6, 3)):
        checkpoints.save(Progress(step=step, best_step=best), {}, {"x": torch.tensor([step])}, wait=step % 2 == 0)
    checkpoints.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000005", "step-00000006"]
    tensor = torch.zeros(1, dtype=torch.int64)
    checkpoints.load(3, {"x": tensor})
    assert tensor.item() == 3


def test_a_checkpoint_holds_the_values_of_the_moment_it_was_asked_for(tmp_path):
    checkpoints = Checkpoints(tmp_path, 2, DistributedContext())
    weights = torch.zeros(500_000)
    checkpoints.save(Progress(step=1), {}, {"x": weights}, wait=False)
    weights.fill_(7.0)  # as the next step does, while the file is written
    checkpoints.wait()
    read = torch.ones(500_000)
    checkpoints.load(1, {"x": read})
    assert not read.any()


def damage_bytes(folder):
    file = folder / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    return file.name


def damage_state(folder):
    (folder / "state.json").write_text("{}")
    return "state.json"


def damage_manifest(folder):
    (folder / "manifest.json").unlink()
    return folder.name


@pytest.mark.parametrize("damage", [damage_bytes, damage_state, damage_manifest])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(tmp_path, unbroken, capsys, damage):
    with pytest.raises(RuntimeError, match="crash"):
        train(tmp_path, reporter=StopAt(11, crash=True))
    last = steps_of(tmp_path)[-1]
    name = damage(tmp_path / "checkpoints" / f"step-{last:08d}")
    weights = train(tmp_path, resume=True, seed=7)
    (line,) = capsys.readouterr().err.splitlines()
    assert f"step-{last:08d}" in line
    assert name in line
    assert "damaged" in line
    assert_equal_runs(tmp_path, weights, unbroken)


def test_a_damaged_checkpoint_is_not_one_of_those_that_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, 1, DistributedContext())
    for step in (1, 2):
        checkpoints.keep = step
        checkpoints.save(Progress(step=step), {"a": 1}, {"x": torch.zeros(9)}, wait=True)
    damage_state(tmp_path / "step-00000002")
    assert checkpoints.newest()["progress"]["step"] == 1
    checkpoints.keep = 1
    checkpoints.save(Progress(step=2), {"a": 1}, {"x": torch.ones(9)}, wait=True)
    assert checkpoints.newest()["progress"]["step"] == 2


def test_a_checkpoint_whose_best_is_damaged_is_no_whole_one(tmp_path, capsys):
    checkpoints = Checkpoints(tmp_path, 3, DistributedContext())
    for step, best in ((1, 1), (2, 2), (3, 2)):
        checkpoints.save(Progress(step=step, best_step=best), {"a": 1}, {"x": torch.zeros(9)}, wait=True)
    damage_bytes(tmp_path / "step-00000002")
    found = Checkpoints(tmp_path, 3, DistributedContext()).newest()
    assert found["progress"]["step"] == 1
    assert capsys.readouterr().err.count("step-00000002") == 2


def test_where_no_checkpoint_is_intact_the_run_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match="crash"):
        train(tmp_path, reporter=StopAt(8, crash=True))
    for folder in (tmp_path / "checkpoints").iterdir():
        damage_bytes(folder)
    with pytest.raises(InputError, match="no checkpoint is intact"):
        train(tmp_path, resume=True)


@contextmanager
def largest_file(size):
    """No file may grow beyond `size` bytes: to a writer the same as a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_ends_the_run_in_one_line_with_the_checkpoint_before_it_intact(tmp_path, unbroken):
    with pytest.raises(Interrupted):
        train(tmp_path, reporter=StopAt(5))
    kept = {path.name: path.read_bytes() for path in (tmp_path / "checkpoints" / "step-00000005").iterdir()}
    with largest_file(100_000), pytest.raises(InputError) as refusal:
        train(tmp_path, resume=True)
    message = str(refusal.value)
    assert "\n" not in message
    assert "could not be written (File too large); the one of step 5 is intact" in message
    assert {path.name: path.read_bytes() for path in (tmp_path / "checkpoints" / "step-00000005").iterdir()} == kept
    assert not list((tmp_path / "checkpoints").glob(".step-*"))
    assert_equal_runs(tmp_path, train(tmp_path, resume=True, seed=7), unbroken)


def test_a_disk_that_is_full_for_the_metrics_says_so_too(tmp_path):
    with largest_file(300), pytest.raises(InputError, match=r"metrics\.jsonl: cannot be written \(File too large\)"):
        train(tmp_path, settings=Settings(epochs=40, batch_size=4, checkpoint_every=1000))


def test_a_loss_that_is_not_finite_names_its_examples_and_keeps_the_last_good_checkpoint(tmp_path):
    class Poison(StopAt):
        def step(self, step, loss, tokens):
            if step == 4:
                with torch.no_grad():
                    self.trainer.model.model.norm.weight[0] = float("nan")

    settings = Settings(epochs=3, batch_size=4, micro_batch_size=2, checkpoint_every=2)
    with pytest.raises(InputError, match=r"step 5: loss nan in micro-batch 1 of 2 \(examples \d+, \d+\)"):
        train(tmp_path, settings=settings, reporter=Poison())
    assert steps_of(tmp_path)[-1] == 4
    found = Checkpoints(tmp_path / "checkpoints", 2, DistributedContext()).newest()
    assert found["progress"]["step"] == 4


def test_a_spike_of_the_gradient_norm_is_reported_and_recorded(tmp_path):
    class Jolt(StopAt):
        def step(self, step, loss, tokens):
            if step in (13, 14):
                with torch.no_grad():
                    self.trainer.model.model.norm.weight.mul_(50.0 if step == 13 else 0.02)

    reporter = Jolt()
    train(tmp_path, settings=Settings(epochs=5, batch_size=4, clip=1.0), reporter=reporter)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    spikes = {record["step"]: record["spike"] for record in records if "spike" in record}
    assert spikes[14] > 4
    assert any(note.startswith("step 14: gradient norm") for note in reporter.notes)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_how_to_resume(tmp_path, pairs_tsv, model_folders, monkeypatch, capsys, number):
    monkeypatch.setattr(Reporter, "step", lambda self, step, *_: signal.raise_signal(number) if step == 5 else None)
    argv = ["--model", str(model_folders["A"]), "--train", str(pairs_tsv / "train.tsv"), "--prompt", "plain"]
    assert exit_code(lambda: sft.main([*argv, "--device", "cpu", "--output", str(tmp_path / "out")])) == 130
    assert steps_of(tmp_path / "out") == [5]
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("stopped and saved at step 5 of 24; to resume from step 5")
    assert line.endswith(f"--resume --output {tmp_path / 'out'}")


def test_a_second_signal_interrupts_at_once():
    stop = StopRequest()
    with stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # within a second it is the same request
        assert stop.made
        stop.time -= 10
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_run_that_is_killed_while_it_writes_a_checkpoint_ends_in_the_same_bytes(pairs_tsv):
    kill_and_resume(pairs_tsv, kills=1, writes=1, seed=1)


@pytest.mark.slow
def test_a_run_that_is_killed_twenty_five_times_ends_in_the_same_bytes(pairs_tsv):
    found = kill_and_resume(pairs_tsv, kills=25, writes=8, seed=2)
    assert sum(kill.writing for kill in found) >= 5
