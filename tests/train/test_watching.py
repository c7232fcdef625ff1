"""What a run tells: timings beside the metrics, TensorBoard, pictures, and lines where there is no terminal."""

import json

import pytest
import torch
from random_examples import examples_of
from tiny import tiny_model

from minillama import InputError
from train import plot
from train.config import Settings
from train.metrics import JsonLines, Records, Reporter
from train.trainer import Trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "first"
    settings = Settings(epochs=6, lr=1e-2, batch_size=4, eval_every=5)
    Trainer(tiny_model(1), examples_of(16), examples_of(4, 9), settings, output).run(False, Reporter(silent=True))
    return output


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_clocks_and_memory_stand_beside_the_metrics_not_in_them(run):
    timing = records(run / "timing.jsonl")
    metrics = [record for record in records(run / "metrics.jsonl") if "loss" in record]
    assert [record["step"] for record in timing] == [record["step"] for record in metrics] == list(range(1, 25))
    for clock, record in zip(timing, metrics):
        assert clock["tokens_per_second"] == pytest.approx(record["tokens"] / clock["seconds"], rel=0.01)
        assert clock["peak_bytes"] > 50 << 20
        assert record.keys() == {"step", "loss", "grad_norm", "lr", "tokens", "targets"}


def test_each_step_can_be_read_as_soon_as_it_is_done(tmp_path):
    class Reading(Reporter):
        def step(self, step, loss, tokens):
            for name in ("metrics.jsonl", "timing.jsonl"):
                assert records(tmp_path / name)[-1]["step"] == step

    trainer = Trainer(tiny_model(1), examples_of(8), [], Settings(epochs=2), tmp_path)
    trainer.run(False, Reading(silent=True))


def test_a_line_that_a_kill_cut_off_is_taken_back(tmp_path):
    (tmp_path / "timing.jsonl").write_text('{"step": 1}\n{"st')
    written = Records(tmp_path, 0, 1, torch.device("cpu"), tensorboard=False)
    written.write({"step": 2, "loss": 1.0, "tokens": 10, "targets": 5})
    written.close()
    assert [record["step"] for record in records(tmp_path / "timing.jsonl")] == [1, 2]


def test_the_curves_of_several_runs_are_one_picture(run, tmp_path):
    from PIL import Image

    half = tmp_path / "half"
    half.mkdir()
    text = (run / "metrics.jsonl").read_text()
    (half / "metrics.jsonl").write_text(text[: len(text) // 2])  # still running: the last line is not whole
    output = tmp_path / "loss.png"
    assert plot.main([str(run), str(half), "--output", str(output), "--log"]) == 0
    with Image.open(output) as picture:
        assert picture.size[0] > 800
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 50


def test_a_curve_is_the_metrics(run):
    train, valid = plot.read_curves(run)
    assert len(train) == 24
    assert [step for step, _ in valid] == [5, 10, 15, 20, 24]
    assert plot.smooth([1.0, 2.0, 3.0, 6.0], 2) == [1.0, 1.5, 2.5, 4.5]


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"metrics\.jsonl"):
        plot.main([str(tmp_path), "--output", str(tmp_path / "x.png")])


def test_tensorboard_holds_the_curve(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = Trainer(tiny_model(1), examples_of(8), [], Settings(epochs=2), tmp_path, tensorboard=True)
    trainer.run(False, Reporter(silent=True))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    expected = [(record["step"], record["loss"]) for record in records(tmp_path / "metrics.jsonl")]
    assert found == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in expected]


def test_without_tensorboard_its_option_says_what_to_install(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    trainer = Trainer(tiny_model(1), examples_of(8), [], Settings(epochs=1), tmp_path, tensorboard=True)
    with pytest.raises(InputError, match="pip install tensorboard"):
        trainer.run(False, Reporter(silent=True))


def test_progress_without_a_terminal_is_a_line_with_loss_speed_and_time_left(tmp_path, capsys):
    trainer = Trainer(tiny_model(1), examples_of(8), [], Settings(epochs=2), tmp_path)
    trainer.run(False, Reporter())
    (line,) = capsys.readouterr().err.splitlines()
    for part in ("step 4/4", "loss ", "tokens/s", "s left"):
        assert part in line


def test_metrics_that_are_shorter_than_their_checkpoint_are_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match="3 bytes, but the checkpoint was saved with 100"):
        JsonLines(tmp_path / "metrics.jsonl", 100)
