"""A model that several processes hold together decodes as it does whole; processes are real, gloo on the CPU."""

import json
import os
import signal
import time

import parallel_worker
import pytest
import torch
from processes import CONTEXT, code_of, free_port, start_ranks
from test_resume import LINES, arguments, outcome, source, unbroken  # noqa: F401 (a fixture)
from tiny import TINY, tiny_model

from decode.collab import main
from decode.pipeline.members import open_readers
from decode.pipeline.memory import Budget
from decode.pipeline.placement import Place, places, splits
from decode.model.packed_llama import PreparedLlama
from minillama import InputError, Llama
from minillama.errors import exit_code

# Odd vocabularies do not divide; S shares nothing but its vocabulary with L.
SHAPES = {
    "L": {"vocab_size": 401, "attention_bias": True, "mlp_bias": True},
    "S": {"vocab_size": 401, "num_hidden_layers": 1, "tie_word_embeddings": False, "hidden_size": 48},
}
# Seconds until a run counts as hanging: some hundred exchanges between processes that share a busy machine.
PATIENCE = 300


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {}
    for seed, (name, fields) in enumerate(SHAPES.items()):
        model = tiny_model(seed, **fields)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if parameter_name.endswith(("bias", "norm.weight")):
                    parameter += torch.randn(parameter.shape, generator=generator) * 0.2
        found[name] = tmp_path_factory.mktemp("parts") / name
        model.save_pretrained(found[name])
    return found


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randint(2, TINY.vocab_size, (n,), generator=generator).tolist() for n in (3, 17, 9, 30, 1)]
    return [[4, 5, *prompt] for prompt in draw]


@pytest.fixture(scope="module")
def group(folders, prompts):
    return found_by_two(folders, prompts)


def found_by_two(folders, prompts, on_gpu=False):
    """What each of two processes found."""
    queue, port = CONTEXT.Queue(), free_port()
    given = (2, port, folders, prompts, queue, on_gpu)
    processes = [CONTEXT.Process(target=parallel_worker.run, args=(rank, *given)) for rank in range(2)]
    for process in processes:
        process.start()
    found = dict(queue.get(timeout=300) for _ in processes)
    assert [code_of(process) for process in processes] == [0, 0]
    return [found[0], found[1]]


def test_a_models_logits_are_those_of_the_whole(folders, group):
    for name, folder in folders.items():
        expected = parallel_worker.logits_of(Llama.from_pretrained(folder))
        for found in group:
            for ours, theirs in zip(found[name]["logits"], expected):
                torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=0, atol=1e-4)


def test_each_process_holds_half(folders, group):
    for name, folder in folders.items():
        whole = Llama.from_pretrained(folder)
        everywhere = sum(p.nbytes for n, p in whole.named_parameters() if n.endswith("norm.weight") or "bias" in n)
        prepared = PreparedLlama(whole)
        for found in group:
            row = whole.config.hidden_size * 4  # of zeros, in the embedding and the output layer
            assert found[name]["bytes"] <= sum(p.nbytes for p in whole.parameters()) / 2 + everywhere + 2 * row
            assert found[name]["prepared bytes"] <= prepared.nbytes / 2 + everywhere + 2 * row
            assert found[name]["cache bytes"] == prepared.cache(1, 64).entries_LBSEKC.nbytes / 2


def test_every_way_of_decoding_gives_the_tokens_of_one_process(folders, prompts, group):
    models = {name: Llama.from_pretrained(folder) for name, folder in folders.items()}
    expected = parallel_worker.decoded(models, prompts)
    assert group[0] == group[1]  # to the bit
    assert group[0]["alone"] == group[0]["both split"]["greedy"][1][0]
    for members in ("one split", "both split"):
        for way, (tokens, logprobs) in group[0][members].items():
            assert tokens == expected[way][0]
            for ours, theirs in zip(logprobs, expected[way][1]):
                assert ours == pytest.approx(theirs, abs=1e-5)
    for (tokens, scores), (own_tokens, own_scores) in zip(parallel_worker.searched(models, prompts), group[0]["beam"]):
        assert own_tokens == tokens
        assert own_scores == pytest.approx(scores, abs=1e-5)


@pytest.mark.gpu
def test_two_gpus_decode_what_one_process_does(folders, prompts):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    models = {name: Llama.from_pretrained(folder) for name, folder in folders.items()}
    expected = parallel_worker.decoded(models, prompts)
    group = found_by_two(folders, prompts, on_gpu=True)
    assert group[0]["both split"] == group[1]["both split"]
    for members in ("one split", "both split"):
        for way, (tokens, logprobs) in group[0][members].items():
            assert tokens == expected[way][0]
            for ours, theirs in zip(logprobs, expected[way][1]):
                assert ours == pytest.approx(theirs, abs=1e-3)


@pytest.mark.parametrize(("split", "world"), [("2", 2), ("A=2", 2), ("2", 4)])
def test_the_command_writes_what_one_process_writes(model_folders, source, split, world):  # noqa: F811
    (source / "src.txt").write_text("\n".join(LINES[48:68]) + "\n", encoding="utf-8")  # two of them blank
    expected = unbroken(model_folders, source)
    command = arguments(model_folders, source, "--tensor-parallel", split, "--batch-size", "6")
    processes = start_ranks(command, world, source)
    assert [code_of(process, PATIENCE) for process in processes] == [0] * world, (source / "rank0.log").read_text()
    assert outcome(source) == expected
    report = json.loads((source / "run.json").read_text())
    assert (report["processes"], report["tensor_parallel"]) == (world, 2)
    assert {file.name for file in source.iterdir() if "journal" in file.name} == set()


@pytest.mark.parametrize("victim", [0, 1])
def test_when_a_process_of_a_group_dies_the_other_ends_and_resume_does_the_rest(model_folders, source, victim):  # noqa: F811
    expected = unbroken(model_folders, source)
    command = arguments(model_folders, source, "--tensor-parallel", "2", "--resume")
    processes = start_ranks([*command, "--batch-size", "1"], 2, source)
    journal = source / "hyp.txt.journal"
    while not (journal.exists() and journal.read_bytes().count(b"\n") > 6):
        time.sleep(0.002)
        assert processes[victim].is_alive()
    os.kill(processes[victim].pid, signal.SIGKILL)
    assert code_of(processes[victim]) == -signal.SIGKILL
    assert code_of(processes[1 - victim], PATIENCE) == 1
    survivor = (source / f"rank{1 - victim}.log").read_text()
    assert "Traceback" not in survivor
    assert "does not answer" in survivor
    processes = start_ranks([*command, "--batch-size", "120"], 2, source)
    assert [code_of(process, PATIENCE) for process in processes] == [0, 0]
    assert outcome(source) == expected
    assert json.loads((source / "run.json").read_text())["resumed_sentences"] > 5


def test_what_cannot_be_split_is_refused_once_and_before_weights_are_read(model_folders, source, capsys):  # noqa: F811
    for extra, world, named in (
        (("--tensor-parallel", "3"), 2, "--tensor-parallel 3: 2 processes are running"),
        (("--tensor-parallel", "4"), 4, "A has 2 key and value heads, which 4 processes cannot share evenly"),
    ):
        processes = start_ranks(arguments(model_folders, source, *extra), world, source)
        assert [code_of(process, PATIENCE) for process in processes] == [2] * world
        logs = [(source / f"rank{rank}.log").read_text() for rank in range(world)]
        assert named in logs[0]
        assert logs[1:] == [""] * (world - 1)
    assert exit_code(lambda: main(arguments(model_folders, source, "--tensor-parallel", "2"))) == 2
    assert "1 process is running; start a multiple of 2 with torchrun" in capsys.readouterr().err


def test_parts_are_said_by_member_or_for_all(monkeypatch):
    assert splits("1", ["L", "S"]) == {"L": 1, "S": 1}
    assert splits("4", ["L", "S"]) == {"L": 4, "S": 4}
    assert splits("L=2", ["L", "S"]) == {"L": 2, "S": 1}
    for text, named in (
        ("L=2,S=4", "one number"),
        ("0", "0 is no number"),
        ("L=", "nothing is"),
        ("X=2", "X is no model"),
    ):
        with pytest.raises(InputError, match=named):
            splits(text, ["L", "S"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert places("L=cuda,S=cuda:1", None, ["L", "S"], split={"L": 2, "S": 1})["L"].parts == 2
    with pytest.raises(InputError, match="2 processes share S, each with a GPU of its own"):
        places("L=cuda,S=cuda:1", None, ["L", "S"], split={"L": 1, "S": 2})


def test_memory_is_planned_for_a_part(model_folders, group, folders):
    readers = open_readers({"A": str(model_folders["A"])}, None, None)
    whole, half = (Budget.of(readers, {"A": Place(torch.device("cpu"), "float32", parts)}, "1G") for parts in (1, 2))
    (device,) = whole.weights
    assert half.weights[device]["A"] == whole.weights[device]["A"] // 2
    assert half._row_bytes(device, [64]) == whole._row_bytes(device, [64]) // 2
