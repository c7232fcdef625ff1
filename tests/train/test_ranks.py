"""Two ranks and one: the same gradients, the same losses, checkpoints that either resumes from. gloo, on the CPU."""

import json
import signal
import time

import pytest
import rank_worker
import torch
from ranks import HERE, finish, start

from minillama import Llama
from train.distributed import DistributedContext


def run(ranks, *arguments):
    if ranks == 1:  # needs no process of its own
        rank_worker.run(DistributedContext(), *map(str, arguments))
    else:
        finish(start(ranks, [str(HERE / "rank_worker.py"), *map(str, arguments)]))


def losses(output):
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [(record["step"], record.get("loss", record.get("valid_loss"))) for record in records]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    output = tmp_path_factory.mktemp("ranks") / "one"
    run(1, "train", output, 0)
    return output


def assert_same_run(output, reference):
    found, expected = losses(output), losses(reference)
    assert [step for step, _ in found] == [step for step, _ in expected]
    assert max(abs(one - other) for (_, one), (_, other) in zip(found, expected)) < 1e-5
    # AdamW divides by the root of the second moment, so a weight whose gradient is almost zero moves by rounding alone
    for one, other in zip(*(Llama.from_pretrained(folder / "final").parameters() for folder in (output, reference))):
        assert (one - other).norm() < 1e-3 * other.norm()


@pytest.mark.parametrize(("first", "second"), [(2, 1), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_a_run_resumes_with_another_number_of_ranks(tmp_path, one_rank, first, second):
    run(first, "train", tmp_path / "run", 30)  # step 30 is one of validation, too
    saved = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert saved[-1] == "step-00000030"
    assert len(list((tmp_path / "run" / "checkpoints" / saved[-1]).glob("*.distcp"))) == first
    run(second, "train", tmp_path / "run", 0)
    assert_same_run(tmp_path / "run", one_rank)


@pytest.mark.slow
def test_an_optimizer_step_is_the_same_from_one_and_two_ranks(tmp_path):
    run(1, "gradients", tmp_path / "one.pt", 0)
    run(2, "gradients", tmp_path / "two.pt", 0)
    ones, twos = torch.load(tmp_path / "one.pt"), torch.load(tmp_path / "two.pt")
    for dtype, tolerance in (("torch.float64", 1e-6), ("torch.float32", 1e-5)):
        one, two = ones[dtype], twos[dtype]
        assert one.keys() == two.keys()
        differences = {name: float((one[name] - two[name]).norm() / one[name].norm()) for name in one}
        assert max(differences.values()) < tolerance


@pytest.mark.slow
def test_a_signal_to_every_rank_saves_once_and_ends_all(tmp_path, pairs_tsv, model_folders):
    output = tmp_path / "out"
    arguments = ["-m", "train.sft", "--model", str(model_folders["A"]), "--train", str(pairs_tsv / "train.tsv")]
    arguments += ["--prompt", "plain", "--device", "cpu", "--epochs", "500", "--checkpoint-every", "3"]
    processes = start(2, [*arguments, "--output", str(output)])
    while not list(output.glob("checkpoints/step-*")) and all(process.poll() is None for process in processes):
        time.sleep(0.02)
    for process in processes:
        process.send_signal(signal.SIGTERM)
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [130, 130], errors
    step = max(int(path.name[5:]) for path in output.glob("checkpoints/step-*"))
    assert f"stopped and saved at step {step} of 4000" in errors[0]
    assert "--resume --output" in errors[0]
