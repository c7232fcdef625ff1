"""The benchmark of the kernels runs and saves what it prints; the formula of moved bytes is that of its operations."""

import json
import subprocess
import sys

import torch

from benchmarks.kernels import moved_bytes, plain_eager


def test_it_runs_and_saves_what_it_prints(tmp_path):
    command = [sys.executable, "-m", "benchmarks.kernels", "--quick", "--json", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    (path,) = tmp_path.glob("*.json")
    assert json.loads(path.read_text()) == printed
    assert {"date", "device", "versions", "moved_bytes", "steal_share"} <= printed.keys()


def test_the_fused_kernel_moves_at_least_five_times_fewer_bytes():
    for members in (1, 2, 3):
        for dtype in (torch.bfloat16, torch.float32):
            row = moved_bytes(16, members, dtype)
            assert row["fused_bytes"] <= 1.01 * 16 * 128_256 * members * dtype.itemsize
            assert row["ratio"] >= (5 if dtype == torch.bfloat16 else 4.9), row
    # by hand, per entry: three casts of 2 + 4, three products of 4 + 4, two sums of 4 + 4 + 4, argmax 4, log_softmax 8
    assert moved_bytes(1, 3, torch.bfloat16)["eager_bytes"] == 128_256 * (3 * 6 + 3 * 8 + 2 * 12 + 4 + 8)


def test_plain_eager_is_the_weighted_sum():
    logits = [torch.randn(3, 50, generator=torch.Generator().manual_seed(n)) for n in range(2)]
    token_B, logprob_B = plain_eager(logits, torch.tensor([1.0, -0.5]))
    x_BV = logits[0] - 0.5 * logits[1]
    assert torch.equal(token_B, x_BV.argmax(dim=1))
    torch.testing.assert_close(logprob_B, torch.log_softmax(x_BV, dim=1).amax(dim=1))
