"""A model that several processes hold together decodes as it does whole; processes are real, gloo on the CPU."""

import parallel_worker
import pytest
import torch
from processes import CONTEXT, code_of, free_port
from tiny import TINY, tiny_model

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
        model = tiny_model(seed, **fields)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if parameter_name.endswith(("bias", "norm.weight")):
                    parameter += torch.randn(parameter.shape, generator=generator) * 0.2
        found[name] = tmp_path_factory.mktemp("models") / name
        model.save_pretrained(found[name])
    return found


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(0)
    own = [torch.randint(2, TINY.vocab_size, (n,), generator=generator).tolist() for n in (3, 17, 9, 30, 1)]
    return [[4, 5, *prompt] for prompt in own]


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


def test_every_way_of_decoding_gives_the_tokens_of_one_process(folders, prompts, group):
    models = {name: Llama.from_pretrained(folder) for name, folder in folders.items()}
    expected = parallel_worker.decoded(models, prompts)
    assert group[0] == group[1]  # to the bit
    assert group[0]["alone"] == group[0]["both sharded"]["greedy"][1][0]
    for members in ("one sharded", "both sharded"):
        for way, (tokens, logprobs) in group[0][members].items():
            assert tokens == expected[way][0]
            for ours, theirs in zip(logprobs, expected[way][1]):
                assert ours == pytest.approx(theirs, abs=1e-5)
    for (tokens, scores), (own_tokens, own_scores) in zip(parallel_worker.searched(models, prompts), group[0]["beam"]):
        assert own_tokens == tokens
        assert own_scores == pytest.approx(scores, abs=1e-5)
    for (tokens, logprobs), (own_tokens, own_logprobs) in zip(
        parallel_worker.mixed(models, prompts), group[0]["mixed"]
    ):
        assert own_tokens == tokens
        assert own_logprobs == pytest.approx(logprobs, abs=1e-5)


@pytest.mark.gpu
def test_two_gpus_decode_what_one_process_does(folders, prompts):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    models = {name: Llama.from_pretrained(folder) for name, folder in folders.items()}
    expected = parallel_worker.decoded(models, prompts)
    group = found_by_two(folders, prompts, on_gpu=True)
    assert group[0]["both sharded"] == group[1]["both sharded"]
    for members in ("one sharded", "both sharded"):
        for way, (tokens, logprobs) in group[0][members].items():
            assert tokens == expected[way][0]
            for ours, theirs in zip(logprobs, expected[way][1]):
                assert ours == pytest.approx(theirs, abs=1e-3)
