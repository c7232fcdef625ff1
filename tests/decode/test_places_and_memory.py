"""Members stand where they are told to, and a run that memory has no room for is refused with the numbers."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_resume import arguments, outcome, source  # noqa: F401 (a fixture)

from decode.collab import main
from decode.pipeline.members import load_ensemble, open_readers
from decode.pipeline.memory import Budget, available, capacities, parse_size, spell_size
from decode.pipeline.placement import Place, fastest_storage, places
from decode.engine.kv_slots import Rows
from minillama import InputError, Llama
from minillama.errors import exit_code

CPU = Place(torch.device("cpu"), "float32")


def test_one_device_for_all_or_one_by_name(monkeypatch):
    assert set(places("cpu", None, ["L", "S"]).values()) == {CPU}
    assert places("L=cpu,S=cpu", "bfloat16", ["L", "S"])["S"] == Place(torch.device("cpu"), "bfloat16")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert places("S=cuda:1,cpu", None, ["L", "S"]) == {"L": CPU, "S": Place(torch.device("cuda:1"), "bfloat16")}
    for rank, device in enumerate(("cuda:0", "cuda:1", "cuda:0")):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert {str(place.device) for place in places("auto", "auto", ["L", "S"]).values()} == {device}
        assert str(places("cuda", "auto", ["L"])["L"].device) == device
        assert str(places("cuda:1", "auto", ["L"])["L"].device) == "cuda:1"


@pytest.mark.parametrize(
    ("device", "named"), [("L=cpu,X=cpu", "X is no model"), ("cpu,cpu", "two values"), ("L=abacus", "abacus")]
)
def test_devices_that_name_nothing_are_refused(device, named):
    with pytest.raises(InputError, match=named):
        places(device, "auto", ["L", "S"])


def test_members_by_name_on_the_cpu_translate_as_together(model_folders, source):  # noqa: F811
    assert main(arguments(model_folders, source)) == 0
    expected = outcome(source)
    assert main(arguments(model_folders, source, "--device", "A=cpu,C=cpu")) == 0
    assert outcome(source) == expected
    assert json.loads((source / "run.json").read_text())["device"].startswith("cpu (")


def test_a_folder_named_twice_is_read_once_for_each_place(model_folders, monkeypatch):
    readers = open_readers({"A": str(model_folders["A"]), "B": str(model_folders["A"])}, None, None)
    read = []
    load = Llama.from_pretrained
    monkeypatch.setattr(Llama, "from_pretrained", lambda *place: read.append(place) or load(*place))
    weights = {"A": 1.0, "B": 0.5}
    ensemble, _ = load_ensemble(readers, weights, {"A": CPU, "B": CPU})
    assert len(read) == 1
    assert ensemble.members[0].model is ensemble.members[1].model
    ensemble, _ = load_ensemble(readers, weights, {"A": CPU, "B": replace(CPU, storage="int8")})
    assert len(read) == 3
    assert [member.model.storage for member in ensemble.members] == ["float32", "int8"]


def test_sizes_are_read_and_spelled():
    assert [parse_size(text) for text in ("24G", "24gb", "1.5GiB", "2k", "7")] == [24e9, 24e9, 1.5 * 2**30, 2000, 7]
    assert [spell_size(count) for count in (7, 2000, 1.5e9)] == ["7 B", "2.00 kB", "1.50 GB"]
    for text in ("", "much", "-1G", "1 X", "5i"):
        with pytest.raises(InputError, match="expected a size"):
            parse_size(text)
    assert 0 < available(torch.device("cpu"), 2) <= available(torch.device("cpu")) * 0.6


@given(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=6), st.integers(1, 40))
def test_the_numbers_are_those_of_the_caches_and_weights_that_are_made(model_folders, lengths, new):
    readers = open_readers({name: str(model_folders[name]) for name in ("A", "C")}, None, None)
    where = {"A": CPU, "C": replace(CPU, storage="int8")}
    ensemble, _ = load_ensemble(readers, {"A": 1.0, "C": 1.0}, where)
    prompts = [([2] * first, [2] * second) for first, second in lengths]
    positions = capacities(prompts, readers, new)
    row = sum(cache.entries_LBSEKC.nbytes for cache in Rows(ensemble, 1, positions).caches)
    budget = Budget.of(readers, where, "0")
    weights = sum(budget.weights[CPU.device].values())
    assert weights == pytest.approx(sum(member.model.nbytes for member in ensemble.members), rel=0.02)
    budget = Budget.of(readers, where, str(weights + 6 * row))  # one of them is shared
    assert budget.rows(positions, 4, may_lower=False) == 4
    assert budget.rows(positions, 9, may_lower=True) == 5
    assert spell_size(weights) in budget.describe(positions, 5)
    with pytest.raises(InputError, match=r"5 rows fit \(--batch-size 5\)"):
        budget.rows(positions, 6, may_lower=False)
    with pytest.raises(InputError, match="do not fit --memory"):
        Budget.of(readers, where, str(weights + 2 * row - 1)).rows(positions, 9, may_lower=True)


def test_rows_are_lowered_where_the_user_named_none_and_refused_where_he_did(model_folders, source, capsys):  # noqa: F811
    assert main(arguments(model_folders, source)) == 0
    expected = outcome(source)
    without_rows = arguments(model_folders, source, "--memory", "700k")
    at = without_rows.index("--batch-size")
    del without_rows[at : at + 2]
    assert main(without_rows) == 0
    assert outcome(source) == expected
    assert json.loads((source / "run.json").read_text())["batch_size"] < 16
    assert "weights" in capsys.readouterr().err
    for extra in (("--memory", "700k", "--batch-size", "16"), ("--memory", "100k")):
        assert exit_code(lambda extra=extra: main(arguments(model_folders, source, *extra))) == 2
        error = capsys.readouterr().err
        assert f"do not fit --memory {extra[1]}" in error
        assert error.count("\n") == 1
    assert outcome(source) == expected


def test_auto_takes_what_this_processor_is_fast_at(monkeypatch):
    monkeypatch.setattr("decode.pipeline.placement.has_bfloat16_instructions", lambda: True)
    assert [fastest_storage(rows) for rows in (1, 16)] == ["bfloat16", "bfloat16"]
    monkeypatch.setattr("decode.pipeline.placement.has_bfloat16_instructions", lambda: False)
    monkeypatch.setattr("decode.pipeline.placement.has_float16_product", lambda: True)
    assert [fastest_storage(rows) for rows in (1, 2, 3, 16, 17)] == ["int8", "int8", "float16", "float16", "float32"]
    assert places("cpu", "float16", ["L"])["L"].packed == "float16"
    monkeypatch.setattr("decode.pipeline.placement.has_float16_product", lambda: False)
    assert [fastest_storage(rows) for rows in (1, 8, 16)] == ["int8", "int8", "float32"]
    assert places("cpu", "float16", ["L"])["L"].packed == "float32"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(InputError, match="int8: only on a CPU"):
        places("cuda:0", "int8", ["L"])
