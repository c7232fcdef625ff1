"""One process of a group that holds shards of models, for test_tensor_parallel_members.py: decodes in several ways."""

import torch

from decode import Ensemble, translate
from decode.engine.engine import Engine
from decode.engine.sequence import SamplingParams, Sequence
from decode.model.packed_llama import PackedLlama
from minillama import KVCache, Llama
from minillama.tensor_parallel import TPGroup, load_shard

TOKENS = [[5, 7, 11, 2, 9], [3, 3, 8, 6, 4]]
WAYS = {
    "greedy": {},
    "drafting": {"speculate": 3},
    "drafting when it pays": {"speculate": "auto"},
    "sampling": {"params": SamplingParams(0.8, 50, 0.95, seed=3)},
}


def logits_of(model):
    """Of two sequences, read at once and then one token more from the cache."""
    tokens = torch.tensor(TOKENS, device=model.device)
    cache = KVCache(model.config, 2, 8, device=model.device)
    with torch.inference_mode():
        whole = model(tokens)
        model(tokens[:, :4], cache)
        return [whole.tolist(), model(tokens[:, 4:], cache).tolist()]


def decoded(models, prompts, ways=tuple(WAYS)):
    """Results of these ways of decoding by name, JSON-like; a step is a dozen exchanges, so there are few."""
    found = {}
    ensemble = Ensemble(models, "L + 0.5*S")
    for name in ways:
        result = translate(ensemble, prompts, 8, 3, ignore_eos=True, **WAYS[name])
        found[name] = [result.tokens, result.logprobs]
    return found


def mixed(models, prompts):
    """Tokens and log-probabilities of sequences of several kinds in one engine."""
    kinds = [{}, {"weights": (1.0, -0.5)}, {"params": SamplingParams(0.9)}, {"top_logprobs": 3}, {"explain": True}]
    kinds += [{"params": SamplingParams(beams=3)}, {"targets": [5, 6, 7]}]
    own = (prompts[key % len(prompts)] for key in range(len(kinds)))
    sequences = [Sequence((p, p), max_new_tokens=6, key=key, **kinds[key]) for key, p in enumerate(own)]
    found = dict(Engine(Ensemble(models, "L + 0.5*S"), 3, 60).generate(sequences))
    return [[found[key].tokens, found[key].logprobs] for key in range(len(kinds))]


def run(rank, world, port, folders, prompts, results, on_gpu=False):
    """`results` is a queue for (rank, what was found)."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, world, rank == 0)
    device = f"cuda:{rank}" if on_gpu else "cpu"
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=world)
    group = TPGroup(rank, world)
    found = {}
    for name, folder in folders.items():
        own = load_shard(folder, group, device=device)
        found[name] = {"logits": logits_of(own), "bytes": sum(p.nbytes for p in own.parameters())}
        packed = PackedLlama(own)
        found[name] |= {"packed bytes": packed.nbytes, "cache bytes": packed.cache(1, 64).entries_LBSEKC.nbytes}
    shard, whole = load_shard(folders["L"], group, device=device), Llama.from_pretrained(folders["S"], device=device)
    both = {"L": shard, "S": load_shard(folders["S"], group, device=device)}
    found["one sharded"] = decoded({"L": shard, "S": whole}, prompts, ("greedy", "drafting when it pays"))
    found["both sharded"] = decoded(both, prompts)
    found["mixed"] = mixed(both, prompts)
    found["alone"] = translate(Ensemble(both, "L + 0.5*S"), prompts[:1], 8, ignore_eos=True).logprobs[0]
    results.put((rank, found))
    dist.barrier()
    dist.destroy_process_group()
