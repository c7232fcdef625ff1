"""The systems that `benchmarks.decode` compares, each in its own process: ours, transformers, CTranslate2, OpenVINO.

`Ours` calls the engine as any user does. `Transformers` sums the members' logits at every step over
`past_key_values`, in left-padded static batches. CTranslate2 and OpenVINO run one model: neither sums logits. The
parent sends one JSON object a line, {"call": method, ...arguments}, and gets one back: {"value": ...}, or
{"refused": reason}. While one process works the others wait on their standard input.

CTranslate2 converts a transformers folder itself. OpenVINO reads an export by optimum-intel, whose pins differ from
ours: `pip install "optimum-intel[openvino]"` in another environment, `optimum-cli export openvino --model FOLDER
--task text-generation-with-past --weight-format fp32 FOLDER-openvino-fp32` (or int8), beside the model's folder.
"""

# B sequences  T positions  V vocabulary

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minillama import InputError

ROOT = Path(__file__).resolve().parent.parent
SINGLE = ("ctranslate2", "openvino")  # run one model
STOP = -1  # in returned tokens: "ended here, with a stop token"
# Seconds on the wall, or the processor's of this process: what one thread needs on a busy machine.
now = time.process_time if os.environ.get("BENCHMARK_CLOCK") == "cpu" else time.perf_counter
Prompts = dict[str, list[list[int]]]


class Refused(Exception):
    """The system is not installed, or cannot do what was requested; the text says which."""


class Worker:
    """The parent's end of a system. A fault in the process raises RuntimeError with the end of its output."""

    def __init__(self, system: str, threads: int, clock: str = "wall", **arguments: Any) -> None:
        environment = os.environ | {"BENCHMARK_CLOCK": clock, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        self.system = system
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors}
        command = [sys.executable, "-m", "benchmarks.peers", system, str(threads)]
        self.process = subprocess.Popen(command, text=True, env=environment, **pipes)
        try:
            self.ask("load", **arguments)
        except BaseException:
            self.close()
            raise

    def ask(self, call: str, **arguments: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"call": call, **arguments}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # its last output is read below
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.errors.seek(0)
            output = self.errors.read().strip()[-2000:]
            raise RuntimeError(f"{self.system} ended with exit code {self.process.returncode} in {call}:\n{output}")
        reply = json.loads(line)
        if "refused" in reply:
            raise Refused(reply["refused"])
        return reply["value"]

    def close(self) -> None:
        """End the process; its memory is free when this returns."""
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()
        self.process.wait()
        self.errors.close()


class Ours:
    """This project's engine."""

    def __init__(self, folders: dict[str, str], combine: str, dtype: str, device: str, stops: Sequence[int]) -> None:
        from decode import Ensemble
        from minillama import Llama

        kept = "bfloat16" if dtype == "int8" else dtype
        models = {n: Llama.from_pretrained(folder, getattr(torch, kept), device) for n, folder in folders.items()}
        for model in models.values():
            model.stop_tokens = tuple(stops)
        self.device = device
        self.ensemble = Ensemble(models, combine, weight_dtype=dtype if device == "cpu" else "auto")

    def generate(
        self, prompts: Prompts, new_tokens: int, batch: int, speculate: str | int = "off", explain: bool = False
    ) -> dict[str, Any]:
        from decode.engine.engine import Engine
        from decode.engine.sequence import Sequence as Request

        rows = zip(*(prompts[name] for name in self.ensemble.names))
        requests = [Request(row, max_new_tokens=new_tokens, explain=explain) for row in rows]
        synchronize(self.device)
        start = now()
        engine = Engine.fitting(self.ensemble, requests, batch, speculate)
        for request in sorted(requests, key=lambda request: -sum(map(len, request.prompts))):
            engine.add(request)
        clock = []
        while engine.has_work:
            engine.step()
            clock.append(now() - start)
        synchronize(self.device)
        tokens = [[*r.tokens, STOP] if r.finish_reason == "stop" else r.tokens for r in requests]
        return {"tokens": tokens, "seconds": now() - start, "clock": clock, "stats": asdict(engine.stats)}


class Transformers:
    """The same models in transformers, eager: the sum of logits that a user without this project would write."""

    def __init__(self, folders: dict[str, str], combine: str, dtype: str, device: str, stops: Sequence[int]) -> None:
        from transformers import AutoModelForCausalLM

        from decode.engine.expression import parse

        if dtype not in ("float32", "bfloat16", "float16"):
            raise InputError(f"transformers is measured in float32, bfloat16 and float16, not {dtype}")
        self.weights = parse(combine, folders)
        self.models: dict[str, Any] = {}
        for name in self.weights:
            model: Any = AutoModelForCausalLM.from_pretrained(folders[name], dtype=getattr(torch, dtype))
            self.models[name] = model.to(device).eval()
        self.device = device
        self.stops = torch.tensor(list(stops), dtype=torch.int64, device=device)

    @torch.inference_mode()
    def generate(self, prompts: Prompts, new_tokens: int, batch: int) -> dict[str, Any]:
        """Static batches in input order; a batch ends with its last sequence."""
        count = len(next(iter(prompts.values())))
        tokens: list[list[int]] = []
        clock: list[float] = []
        synchronize(self.device)
        start = now()
        for first in range(0, count, batch):
            done = []
            for step in self._batch({name: prompts[name][first : first + batch] for name in self.models}, new_tokens):
                done.append(step)
                clock.append(now() - start)
            for row in zip(*done):
                end = row.index(STOP) + 1 if STOP in row else None
                tokens.append(list(row[:end]))
        synchronize(self.device)
        return {"tokens": tokens, "seconds": now() - start, "clock": clock, "stats": {}}

    def _batch(self, rows: Prompts, new_tokens: int) -> Iterator[list[int]]:
        """The tokens of every step, a list of B; STOP from where a sequence ended."""
        from transformers import DynamicCache

        states: dict[str, dict[str, Any]] = {}
        inputs: dict[str, Tensor] = {}
        for name, prompts in rows.items():
            longest = max(map(len, prompts))
            padded = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
            inputs[name] = torch.tensor(padded, device=self.device)
            states[name] = {"past_key_values": DynamicCache()}
            if any(len(prompt) < longest for prompt in prompts):  # without padding no mask: transformers' faster way
                mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
                mask_BT = torch.tensor(mask, device=self.device)
                states[name] |= {"attention_mask": mask_BT, "position_ids": (mask_BT.cumsum(1) - 1).clamp_min(0)}
        ended_B = torch.zeros(len(next(iter(rows.values()))), dtype=torch.bool, device=self.device)
        for _ in range(new_tokens):
            if bool(ended_B.all()):
                return
            next_B = self._sum(inputs, states).argmax(dim=-1)
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
        parts = []
        for name, model in self.models.items():
            output = model(input_ids=inputs[name], use_cache=True, logits_to_keep=1, **states[name])
            parts.append(output.logits[:, -1].float() * self.weights[name])
        return sum(parts[1:], parts[0])


class CTranslate2:
    """`Generator.generate_batch`, greedy."""

    def __init__(self, folders: dict[str, str], combine: str, dtype: str, device: str, stops: Sequence[int]) -> None:
        import ctranslate2
        from ctranslate2.converters import TransformersConverter

        (source,) = folders.values()
        folder = Path(f"{source}-ctranslate2")
        if not (folder / "model.bin").exists():
            TransformersConverter(source).convert(str(folder), force=True)
        types = {"float32": "float32", "bfloat16": "bfloat16", "int8": "int8_float32"}
        supported = ctranslate2.get_supported_compute_types("cpu")
        if types.get(dtype) not in supported:
            raise InputError(f"CTranslate2 computes in {', '.join(sorted(supported))} here, not in {dtype}")
        threads = torch.get_num_threads()
        self.generator = ctranslate2.Generator(
            str(folder), compute_type=types[dtype], intra_threads=threads, inter_threads=1
        )
        self.words = json.loads((folder / "vocabulary.json").read_text())

    def generate(self, prompts: Prompts, new_tokens: int, batch: int) -> dict[str, Any]:
        (rows,) = prompts.values()
        clock: list[float] = []
        start = now()

        def on_token(result: Any) -> bool:
            if result.batch_id == 0:
                clock.append(now() - start)
            return False  # True would end the sequence

        results = self.generator.generate_batch(
            [[self.words[token] for token in row] for row in rows],
            max_batch_size=batch,
            sampling_topk=1,
            max_length=new_tokens,
            min_length=new_tokens,
            end_token=[len(self.words) - 1],
            include_prompt_in_result=False,
            callback=on_token,
        )
        tokens = [list(result.sequences_ids[0]) for result in results]
        return {"tokens": tokens, "seconds": now() - start, "clock": clock, "stats": {}}


class OpenVINO:
    """The exported, stateful model: logits out at every step, argmax by NumPy."""

    def __init__(self, folders: dict[str, str], combine: str, dtype: str, device: str, stops: Sequence[int]) -> None:
        import openvino

        (source,) = folders.values()
        model = Path(f"{source}-openvino-{'int8' if dtype == 'int8' else 'fp32'}") / "openvino_model.xml"
        if not model.exists():
            raise InputError(f"{model}: no export; the head of benchmarks/peers.py says how to make one")
        hint = "bf16" if dtype == "bfloat16" else "f32"
        settings = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": hint,
            "KV_CACHE_PRECISION": hint,  # its default is an int8 cache on some processors: other tokens
            "PERFORMANCE_HINT": "LATENCY",
        }
        core = openvino.Core()
        self.request = core.compile_model(core.read_model(model), "CPU", settings).create_infer_request()

    def generate(self, prompts: Prompts, new_tokens: int, batch: int) -> dict[str, Any]:
        import numpy as np

        (rows,) = prompts.values()
        start = now()
        self.request.reset_state()
        steps: list[list[int]] = []
        clock: list[float] = []
        ids_BT, filled = np.array(rows, dtype=np.int64), 0
        while len(steps) < new_tokens:
            first, filled = filled, filled + ids_BT.shape[1]
            inputs = {
                "input_ids": ids_BT,
                "attention_mask": np.ones((len(rows), filled), np.int64),
                "position_ids": np.tile(np.arange(first, filled), (len(rows), 1)),
                "beam_idx": np.arange(len(rows), dtype=np.int32),
            }
            logits_BTV = self.request.infer(inputs, share_inputs=True, share_outputs=True)["logits"]
            ids_BT = logits_BTV[:, -1].argmax(-1)[:, None].astype(np.int64)
            steps.append(ids_BT[:, 0].tolist())
            clock.append(now() - start)
        return {"tokens": [list(row) for row in zip(*steps)], "seconds": clock[-1], "clock": clock, "stats": {}}


SYSTEMS = {"ours": Ours, "transformers": Transformers, "ctranslate2": CTranslate2, "openvino": OpenVINO}


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def peak_megabytes() -> float:
    """The most memory that this process held, on Linux."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return round(int(line.split()[1]) / 1024, 1)


def serve(system: str, threads: int) -> None:
    # Replies have a stream of their own: what a library prints must not come among them.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(threads)
    loaded: Any = None
    reply: dict[str, Any]
    for line in sys.stdin:
        request = json.loads(line)
        call = request.pop("call")
        try:
            if call == "load":
                loaded, reply = SYSTEMS[system](**request), {"value": None}
            elif call == "peak":
                reply = {"value": peak_megabytes()}
            else:
                reply = {"value": getattr(loaded, call)(**request)}
        except (InputError, ImportError) as error:
            reply = {"refused": str(error)}
        except Exception as error:
            if system not in SINGLE or call != "load":  # a peer that cannot load this model is left out and named
                raise
            reply = {"refused": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
