"""The benchmark of the kernels runs, prints its rows and saves them only on request."""

import json

import torch

from benchmarks import common, kernels


def test_it_runs_and_saves_what_it_prints(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    assert kernels.main(["--quick", "--json", "--save"]) == 0
    printed = json.loads(capsys.readouterr().out)
    (path,) = (tmp_path / "kernels").glob("*.json")
    assert json.loads(path.read_text()) == printed
    assert {"date", "device", "versions", "rows", "steal_share"} <= printed.keys()
    assert {row["kernel"] for row in printed["rows"]} >= {"fused_logits"}
    path.unlink()
    assert kernels.main(["--quick"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(printed["rows"])
    assert not list((tmp_path / "kernels").iterdir())


def test_plain_eager_is_the_weighted_sum():
    logits = [torch.randn(3, 50, generator=torch.Generator().manual_seed(n)) for n in range(2)]
    token_B, logprob_B = kernels.plain_eager(logits, torch.tensor([1.0, -0.5]))
    x_BV = logits[0] - 0.5 * logits[1]
    assert torch.equal(token_B, x_BV.argmax(dim=1))
    torch.testing.assert_close(logprob_B, torch.log_softmax(x_BV, dim=1).amax(dim=1))
