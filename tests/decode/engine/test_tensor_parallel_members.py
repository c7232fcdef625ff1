"""A model that several processes hold together decodes as it does whole; processes are real, gloo on the CPU."""

import parallel_worker
import pytest
import torch
from processes import CONTEXT, code_of, free_port
from tiny import random_prompts, tiny_model, with_noise

from decode.model.packed_llama import PackedLlama
from minillama import Llama

# Odd vocabularies do not divide; S shares nothing but its vocabulary with L.
SHAPES = {
    "L": {"vocab_size": 401, "attention_bias": True, "mlp_bias": True},
    "S": {"vocab_size": 401, "num_hidden_layers": 1, "tie_word_embeddings": False, "hidden_size": 48},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {}
    for seed, (name, fields) in enumerate(SHAPES.items()):
        found[name] = tmp_path_factory.mktemp("models") / name
        with_noise(tiny_model(seed, **fields)).save_pretrained(found[name])
    return found


@pytest.fixture(scope="module")
def prompts():
    return [[4, 5, *prompt] for prompt in random_prompts(0, 5, 1, 30)]


@pytest.fixture(scope="module")
def group(folders, prompts):
    return found_by_two(folders, prompts)


def found_by_two(folders, prompts, on_gpu=False):
    """What each of two processes found."""
    queue, port = CONTEXT.Queue(), free_port()
    arguments = (2, port, folders, prompts, queue, on_gpu)
    processes = [CONTEXT.Process(target=parallel_worker.run, args=(rank, *arguments)) for rank in range(2)]
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
        packed = PackedLlama(whole)
        for found in group:
            row = whole.config.hidden_size * 4  # of zeros, in the embedding and the output layer
            assert found[name]["bytes"] <= sum(p.nbytes for p in whole.parameters()) / 2 + everywhere + 2 * row
            assert found[name]["packed bytes"] <= packed.nbytes / 2 + everywhere + 2 * row
            assert found[name]["cache bytes"] == packed.cache(1, 64).entries_LBSEKC.nbytes / 2


def assert_decodes_as_one_process(group, folders, prompts, within):
    models = {name: Llama.from_pretrained(folder) for name, folder in folders.items()}
    expected = parallel_worker.decoded(models, prompts)
    assert group[0]["both sharded"] == group[1]["both sharded"]  # to the bit
    for members in ("one sharded", "both sharded"):
        for way, (tokens, logprobs) in group[0][members].items():
            assert tokens == expected[way][0]
            for ours, theirs in zip(logprobs, expected[way][1]):
                assert ours == pytest.approx(theirs, abs=within)
    for (tokens, logprobs), (theirs, own) in zip(
        group[0]["mixed"], parallel_worker.mixed(models, prompts), strict=True
    ):
        assert tokens == theirs
        assert logprobs == pytest.approx(own, abs=within)


def test_every_way_of_decoding_gives_the_tokens_of_one_process(folders, prompts, group):
    assert_decodes_as_one_process(group, folders, prompts, 1e-5)
    assert group[0] == group[1]
    assert group[0]["alone"] == group[0]["both sharded"]["greedy"][1][0]


@pytest.mark.gpu
def test_two_gpus_decode_what_one_process_does(folders, prompts):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    assert_decodes_as_one_process(found_by_two(folders, prompts, on_gpu=True), folders, prompts, 1e-3)
