"""The counter of moved bytes, and what it says of eager PyTorch against the fused kernel."""

import json
import subprocess
import sys

import torch

from kernels.moved_bytes import count, fused_bytes, plain_eager, table


def test_each_operation_reads_its_arguments_and_writes_its_results():
    a, b = torch.zeros(100), torch.zeros(100)
    counter = count(lambda: a + b)
    assert (counter.read, counter.written, counter.operations) == (800, 400, 1)


def test_views_move_nothing_and_in_place_work_counts_as_written():
    a, b = torch.zeros(10, 10), torch.zeros(10)
    assert count(lambda: a[:, 2:].T).operations == 0
    counter = count(lambda: a.add_(b))
    assert (counter.read, counter.written) == (440, 400)


def test_a_gather_reads_what_it_returns():
    a, index = torch.zeros(4, 1000), torch.zeros(4, 1, dtype=torch.int64)
    counter = count(lambda: a.gather(1, index))
    assert (counter.read, counter.written) == (4 * 8 + 4 * 4, 4 * 4)


def test_an_expanded_tensor_is_read_from_one_place():
    counter = count(lambda: torch.zeros(1, 50).expand(20, 50) + torch.zeros(20, 50))
    assert counter.read == 200 + 4000


def test_the_fused_kernel_moves_at_least_five_times_fewer_bytes():
    shapes = [(batch, 128_256, 3, torch.bfloat16) for batch in (1, 16, 64)]
    rows = table(shapes)
    assert [row["batch"] for row in rows] == [1, 16, 64]
    assert all(row["ratio"] >= 5 for row in rows), rows
    # by hand, per entry: three casts of 2 + 4, three products of 4 + 4, two sums of 4 + 4 + 4, argmax 4, log_softmax 4
    # + 4
    by_hand = 128_256 * (3 * 6 + 3 * 8 + 2 * 12 + 4 + 8)
    assert abs(rows[0]["eager_bytes"] - by_hand) < 1000


def test_partial_results_are_a_small_part_of_what_the_kernel_moves():
    logits = 64 * 128_256 * 3 * 2
    assert logits <= fused_bytes(64, 128_256, [2, 2, 2]) <= 1.01 * logits


def test_plain_eager_is_what_it_is_measured_against():
    logits = [torch.randn(3, 50, generator=torch.Generator().manual_seed(n)) for n in range(2)]
    token_B, logprob_B = plain_eager(logits, torch.tensor([1.0, -0.5]))
    x_BV = logits[0] - 0.5 * logits[1]
    assert torch.equal(token_B, x_BV.argmax(dim=1))
    torch.testing.assert_close(logprob_B, torch.log_softmax(x_BV, dim=1).amax(dim=1))


def test_the_benchmark_runs_saves_and_draws(tmp_path):
    command = [sys.executable, "-m", "kernels.bench", "--output", str(tmp_path)]
    done = subprocess.run([*command, "--quick", "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    saved = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert saved == [printed]
    assert {"date", "device", "versions", "moved_bytes"} <= printed.keys()
    drawn = subprocess.run([*command, "--plot"], capture_output=True, text=True)
    assert drawn.returncode == 0, drawn.stderr
    assert (tmp_path / "share_of_roof.png").stat().st_size > 1000


def test_there_is_nothing_to_draw_without_results(tmp_path):
    command = [sys.executable, "-m", "kernels.bench", "--plot", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no results to draw" in done.stderr
