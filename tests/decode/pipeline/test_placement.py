"""Members are placed as requested, and a run that memory has no room for is refused with the numbers."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import arguments, outcome

from decode.collab import main
from decode.engine.kv_slots import KVSlots
from decode.engine.sequence import Sequence
from decode.pipeline.members import EnsembleSpec, open_members
from decode.pipeline.memory import MemoryBudget, available, format_size, parse_size
from decode.pipeline.placement import Placement, fastest_weight_dtype, placements
from minillama import InputError, Llama
from minillama.errors import exit_code

CPU = Placement(torch.device("cpu"), "float32")


def gpus(monkeypatch, count):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)


def ensemble_spec(model_folders, where):
    folders = {name: str(model_folders[name]) for name in where}
    return EnsembleSpec(folders, dict.fromkeys(where, 1.0), where, open_members(folders, None, None))


def test_one_device_for_all_or_one_by_name(monkeypatch):
    assert set(placements("cpu", None, ["L", "S"]).values()) == {CPU}
    assert placements("L=cpu,S=cpu", "bfloat16", ["L", "S"])["S"] == Placement(torch.device("cpu"), "bfloat16")
    gpus(monkeypatch, 2)
    on_gpu = Placement(torch.device("cuda:1"), "bfloat16")
    assert placements("S=cuda:1,cpu", None, ["L", "S"]) == {"L": CPU, "S": on_gpu}
    for rank, device in enumerate(("cuda:0", "cuda:1", "cuda:0")):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert {str(placement.device) for placement in placements("auto", "auto", ["L", "S"]).values()} == {device}
        assert str(placements("cuda", "auto", ["L"])["L"].device) == device
        assert str(placements("cuda:1", "auto", ["L"])["L"].device) == "cuda:1"


@pytest.mark.parametrize(
    ("device", "named"), [("L=cpu,X=cpu", "X is no model"), ("cpu,cpu", "two values"), ("L=abacus", "abacus")]
)
def test_devices_that_name_nothing_are_refused(device, named):
    with pytest.raises(InputError, match=named):
        placements(device, "auto", ["L", "S"])


def test_tensor_parallel_sizes_are_for_all_members_or_by_name(monkeypatch):
    def placements_of(text, device="cpu"):
        return placements(device, None, ["L", "S"], tensor_parallel=text)

    for text, sizes in (("1", [1, 1]), ("4", [4, 4]), ("L=2", [2, 1])):
        assert [placement.tp_size for placement in placements_of(text).values()] == sizes
    for text, named in (
        ("L=2,S=4", "one number"),
        ("0", "0 is no number"),
        ("L=", "nothing is"),
        ("X=2", "X is no model"),
    ):
        with pytest.raises(InputError, match=named):
            placements_of(text)
    gpus(monkeypatch, 2)
    assert placements_of("L=2", "L=cuda,S=cuda:1")["L"].tp_size == 2
    with pytest.raises(InputError, match="2 processes share S, each with a GPU of its own"):
        placements_of("S=2", "L=cuda,S=cuda:1")


def test_a_folder_named_twice_is_read_once_for_each_placement(model_folders, monkeypatch):
    folders = {"A": str(model_folders["A"]), "B": str(model_folders["A"])}
    spec = EnsembleSpec(folders, {"A": 1.0, "B": 0.5}, {"A": CPU, "B": CPU}, open_members(folders, None, None))
    read = []
    load = Llama.from_pretrained
    monkeypatch.setattr(Llama, "from_pretrained", lambda *args: read.append(args) or load(*args))
    ensemble, _ = spec.load()
    assert len(read) == 1
    assert ensemble.members[0].model is ensemble.members[1].model
    ensemble, _ = replace(spec, placements={"A": CPU, "B": replace(CPU, weight_dtype="int8")}).load()
    assert len(read) == 3
    assert [member.model.weight_dtype for member in ensemble.members] == ["float32", "int8"]


def test_sizes_are_read_and_formatted():
    assert [parse_size(text) for text in ("24G", "24gb", "1.5GiB", "2k", "7")] == [24e9, 24e9, 1.5 * 2**30, 2000, 7]
    assert [format_size(count) for count in (7, 2000, 1.5e9)] == ["7 B", "2.00 kB", "1.50 GB"]
    for text in ("", "much", "-1G", "1 X", "5i"):
        with pytest.raises(InputError, match="expected a size"):
            parse_size(text)
    assert 0 < available(torch.device("cpu"), 2) <= available(torch.device("cpu")) * 0.6


def test_the_budget_counts_the_weights_and_caches_that_are_made(model_folders):
    spec = ensemble_spec(model_folders, {"A": CPU, "C": replace(CPU, weight_dtype="int8")})
    ensemble, _ = spec.load()
    models = [member.model for member in ensemble.members]
    weights = MemoryBudget(spec, "0").weight_bytes[CPU.device]
    assert weights == pytest.approx(sum(model.nbytes for model in models), rel=0.02)

    @settings(max_examples=20)
    @given(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=6), st.integers(1, 40))
    def check(lengths, new):
        sequences = [Sequence(([2] * first, [2] * second), max_new_tokens=new) for first, second in lengths]
        positions = MemoryBudget(spec, "0").max_positions(sequences)
        slot = sum(cache.entries_LBSEKC.nbytes for cache in KVSlots(models, 1, positions, [[], []]).caches)

        def fit(budget, batch_size, may_lower):
            return MemoryBudget(spec, str(budget), may_lower=may_lower).fit(sequences, batch_size)

        budget = weights + 6 * slot  # one of them is for the shared prefix
        assert fit(budget, 4, may_lower=False)[0] == 4
        batch_size, described = fit(budget, 9, may_lower=True)
        assert batch_size == 5
        assert format_size(weights) in described
        with pytest.raises(InputError, match="--batch-size 5 fits"):
            fit(budget, 6, may_lower=False)
        with pytest.raises(InputError, match="do not fit --memory"):
            fit(weights + 2 * slot - 1, 9, may_lower=True)

    check()


def test_a_process_that_holds_half_of_a_member_needs_half_of_its_memory(model_folders):
    specs = [ensemble_spec(model_folders, {"A": replace(CPU, tp_size=size)}) for size in (1, 2)]
    whole, half = (MemoryBudget(spec, "1G") for spec in specs)
    assert half.weight_bytes[CPU.device] == whole.weight_bytes[CPU.device] // 2
    assert half.slot_bytes(CPU.device, [64]) == whole.slot_bytes(CPU.device, [64]) // 2


def test_the_batch_is_lowered_where_the_user_gave_none_and_refused_where_he_did(model_folders, source, capsys):
    assert main(arguments(model_folders, source)) == 0
    expected = outcome(source)
    command = arguments(model_folders, source, "--memory", "700k", "--device", "A=cpu,C=cpu")
    at = command.index("--batch-size")
    assert main(command[:at] + command[at + 2 :]) == 0
    assert outcome(source) == expected
    report = json.loads((source / "run.json").read_text())
    assert report["batch_size"] < 16
    assert report["device"].startswith("cpu (")
    assert "weights" in capsys.readouterr().err
    for extra in (("--memory", "700k", "--batch-size", "16"), ("--memory", "100k")):
        assert exit_code(lambda extra=extra: main(arguments(model_folders, source, *extra))) == 2
        error = capsys.readouterr().err
        assert f"do not fit --memory {extra[1]}" in error
        assert error.count("\n") == 1
    assert outcome(source) == expected


def test_dtype_auto_is_the_fastest_of_this_processor(monkeypatch):
    monkeypatch.setattr("decode.pipeline.placement.has_bfloat16_instructions", lambda: True)
    assert [fastest_weight_dtype(size) for size in (1, 16)] == ["bfloat16", "bfloat16"]
    monkeypatch.setattr("decode.pipeline.placement.has_bfloat16_instructions", lambda: False)
    monkeypatch.setattr("decode.pipeline.placement.has_float16_product", lambda: True)
    found = [fastest_weight_dtype(size) for size in (1, 2, 3, 16, 17)]
    assert found == ["int8", "int8", "float16", "float16", "float32"]
    assert placements("cpu", "float16", ["L"])["L"].packed_dtype == "float16"
    monkeypatch.setattr("decode.pipeline.placement.has_float16_product", lambda: False)
    assert [fastest_weight_dtype(size) for size in (1, 8, 16)] == ["int8", "int8", "float32"]
    assert placements("cpu", "float16", ["L"])["L"].packed_dtype == "float32"
    gpus(monkeypatch, 1)
    with pytest.raises(InputError, match="int8: only on a CPU"):
        placements("cuda:0", "int8", ["L"])
