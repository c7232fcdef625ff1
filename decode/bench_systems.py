"""The systems that `decode.bench` compares, each behind the same few methods, and each run in a process of its own.

`Ours` calls what any user calls: `Llama`, `Ensemble`, `translate`. `Transformers` sums the members' logits by hand at
every step over `past_key_values`, in left-padded static batches. CTranslate2 and OpenVINO (bench_peers.py) run one
model. A method takes and returns what JSON can hold; a system's libraries are imported when it is made.
"""

# B rows  T positions  V vocabulary

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, Protocol

import torch
from torch import Tensor

from decode import Ensemble, translate
from decode.engine.expression import parse
from decode.pipeline.placement import Place
from decode.translate import Counters
from minillama import InputError, Llama

# Seconds on the wall, or the processor's of this process (`--clock cpu`): what one thread needs on a busy machine.
now = time.process_time if os.environ.get("DECODE_BENCH_CLOCK") == "cpu" else time.perf_counter
STOP = -1  # stands in comparisons for "ended here, with a stop token"
Prompts = dict[str, list[list[int]]]


class System(Protocol):
    """`generate` greedily continues the prompts and says what it took.

    clock: seconds from the start to the end of each step, where the prompts are one batch.
    """

    def generate(self, prompts: Prompts, new_tokens: int, batch: int, ignore_eos: bool = True) -> dict[str, Any]: ...


class ClockedCounters(Counters):
    """The engine's counters, and when each step was counted."""

    def __init__(self) -> None:
        self.moments: list[float] = []
        super().__init__()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "steps" and value:
            self.moments.append(now())


class Ours:
    """This project, through its public names; options that this version does not have are refused by name."""

    def __init__(
        self, folders: dict[str, str], combine: str, dtype: str, device: str, stops: Sequence[int] | None = None
    ) -> None:
        stored = torch.float32 if dtype == "float32" else torch.float16 if dtype == "float16" else torch.bfloat16
        models = {}
        for name, folder in folders.items():
            models[name] = Llama.from_pretrained(folder, None if dtype == "auto" else stored, device)
            if stops is not None:
                models[name].stop_tokens = tuple(stops)
        self.device = device
        self.ensemble = Ensemble(models, combine, storage=Place(torch.device(device), dtype).packed)

    def generate(
        self,
        prompts: Prompts,
        new_tokens: int,
        batch: int,
        ignore_eos: bool = True,
        options: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """options: further arguments of `translate`."""
        options = options or {}
        synchronize(self.device)
        counters = ClockedCounters()
        start = now()
        result = translate(
            self.ensemble, prompts, new_tokens, batch, ignore_eos=ignore_eos, counters=counters, **options
        )
        synchronize(self.device)
        seconds = now() - start
        tokens = [[*row, STOP] if end == "stop" else row for row, end in zip(result.tokens, result.finished)]
        clock = [moment - start for moment in counters.moments]
        reported = asdict(result.counters)
        return {"tokens": tokens, "seconds": seconds, "steps": result.steps, "clock": clock, "reported": reported}

    def profile(self, prompts: Prompts, short: int, long: int, batch: int) -> dict[str, Any]:
        """Where the time of a step goes; see bench_profile.py."""
        from decode.bench_profile import profile_steps

        return profile_steps(lambda new_tokens: self.generate(prompts, new_tokens, batch), short, long, self.device)


class Transformers:
    """The same models in transformers, eager: the sum by hand that a user without this project would write."""

    def __init__(
        self, folders: dict[str, str], combine: str, dtype: str, device: str, stops: Sequence[int] | None = None
    ) -> None:
        from transformers import AutoModelForCausalLM

        if dtype not in ("float32", "bfloat16", "float16"):
            raise InputError(f"transformers is measured in float32, bfloat16 and float16, not {dtype}")
        self.weights = parse(combine, folders)
        self.models = {}
        for name in self.weights:
            model: Any = AutoModelForCausalLM.from_pretrained(folders[name], dtype=getattr(torch, dtype))
            self.models[name] = model.to(device).eval()
        self.device = device
        self.stops = torch.tensor(list(stops or ()), dtype=torch.int64, device=device)

    @torch.inference_mode()
    def generate(
        self,
        prompts: Prompts,
        new_tokens: int,
        batch: int,
        ignore_eos: bool = True,
        longest_first: bool = False,
    ) -> dict[str, Any]:
        """Static batches of `batch` rows, in input order or longest first; a batch ends with its last row."""
        count = len(next(iter(prompts.values())))
        order = list(range(count))
        if longest_first:
            order.sort(key=lambda index: -sum(len(rows[index]) for rows in prompts.values()))
        tokens: list[list[int]] = [[] for _ in range(count)]
        clock: list[float] = []
        synchronize(self.device)
        start = now()
        for first in range(0, count, batch):
            indices = order[first : first + batch]
            rows = {name: [prompts[name][index] for index in indices] for name in self.models}
            done = []
            for step in self._batch(rows, new_tokens, ignore_eos):
                done.append(step)
                clock.append(now() - start)
            for index, row in zip(indices, zip(*done)):
                end = next((at for at, token in enumerate(row) if token == STOP), None)
                tokens[index] = list(row if end is None else row[: end + 1])
        synchronize(self.device)
        return {"tokens": tokens, "seconds": now() - start, "steps": len(clock), "clock": clock, "reported": {}}

    def _batch(self, rows: Prompts, new_tokens: int, ignore_eos: bool) -> Iterator[list[int]]:
        """The tokens of every step, as each ends, a list of B; STOP from where a row ended."""
        from transformers import DynamicCache

        states: dict[str, dict[str, Any]] = {}
        inputs = {}
        for name, prompts in rows.items():
            longest = max(map(len, prompts))
            ids_BT = torch.zeros(len(prompts), longest, dtype=torch.int64)
            mask_BT = torch.zeros_like(ids_BT)
            for row, prompt in enumerate(prompts):
                ids_BT[row, longest - len(prompt) :] = torch.tensor(prompt)
                mask_BT[row, longest - len(prompt) :] = 1
            inputs[name] = ids_BT.to(self.device)
            states[name] = {"past_key_values": DynamicCache()}
            if not bool(mask_BT.all()):  # without padding no mask is built: transformers' faster way
                mask_BT = mask_BT.to(self.device)
                positions_BT = (mask_BT.cumsum(1) - 1).clamp_min(0)
                states[name] |= {"attention_mask": mask_BT, "position_ids": positions_BT}
        ended_B = torch.zeros(len(next(iter(rows.values()))), dtype=torch.bool, device=self.device)
        for _ in range(new_tokens):
            if bool(ended_B.all()):
                return
            next_B = self._sum(inputs, states).argmax(dim=-1)
            if not ignore_eos:
                ended_B |= torch.isin(next_B, self.stops)
            yield torch.where(ended_B, STOP, next_B).tolist()
            for name, state in states.items():
                inputs[name] = next_B[:, None]
                if "attention_mask" in state:
                    mask_BT = state["attention_mask"]
                    state["attention_mask"] = torch.cat((mask_BT, torch.ones_like(mask_BT[:, :1])), dim=1)
                    state["position_ids"] = state["position_ids"][:, -1:] + 1

    def _sum(self, inputs: dict[str, Tensor], states: dict[str, dict[str, Any]]) -> Tensor:
        """(B, V) float32: the members' weighted logits after the last position."""
        total_BV = None
        for name, model in self.models.items():
            output = model(input_ids=inputs[name], use_cache=True, logits_to_keep=1, **states[name])
            logits_BV = output.logits[:, -1].float() * self.weights[name]
            total_BV = logits_BV if total_BV is None else total_BV + logits_BV
        assert total_BV is not None
        return total_BV

    @torch.inference_mode()
    def margins(self, cases: list[dict[str, Any]]) -> list[dict[str, float]]:
        """How far apart two tokens are, each case {"prompts": a prompt by name, "prefix", "first", "second"}.

        Returns `margin`, the combined logit of `first` less that of `second` (STOP: the best stop token), and
        `magnitude`, the largest sum over members of |weight times logit|, in whose roundings it is judged.
        """
        found = []
        for case in cases:
            logits = []
            for name, model in self.models.items():
                ids_1T = torch.tensor([case["prompts"][name] + case["prefix"]], device=self.device)
                output = model(input_ids=ids_1T, use_cache=False, logits_to_keep=1)
                logits.append(output.logits[0, -1].double() * self.weights[name])
            x_V = torch.stack(logits).sum(0)
            magnitude = torch.stack(logits).abs().sum(0).max()
            first, second = (
                x_V[self.stops].max() if case[name] == STOP else x_V[case[name]] for name in ("first", "second")
            )
            found.append({"margin": float(first - second), "magnitude": float(magnitude)})
        return found


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
