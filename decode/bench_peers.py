"""CTranslate2 and OpenVINO for `decode.bench`, one model each: neither sums the logits of several.

Both are in the extra `bench`. CTranslate2 converts a transformers folder by itself. OpenVINO reads an export by
optimum-intel, whose pins differ from this project's, so it wants an environment of its own:

    python -m venv openvino-export && openvino-export/bin/pip install "optimum-intel[openvino]"
    python -m decode.bench --openvino-python openvino-export/bin/python
"""

# B rows  T positions  V vocabulary

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from decode.bench_systems import Prompts, now
from minillama import InputError

OPENVINO_MODEL = "openvino_model.xml"


class CTranslate2:
    """`Generator.generate_batch`, greedy; its own batching of equal prompts, its own key/value cache."""

    def __init__(
        self,
        folders: dict[str, str],
        combine: str,
        dtype: str,
        device: str,
        stops: Sequence[int] | None = None,
        work: str = ".",
    ) -> None:
        import ctranslate2

        folder = convert_for_ctranslate2(_only(folders, "CTranslate2"), Path(work))
        types = {"float32": "float32", "bfloat16": "bfloat16", "int8": "int8_float32"}
        supported = ctranslate2.get_supported_compute_types("cpu")
        if types.get(dtype) not in supported:
            raise InputError(f"CTranslate2 computes in {', '.join(sorted(supported))} here, not in {dtype}")
        self.generator = ctranslate2.Generator(
            str(folder), compute_type=types[dtype], intra_threads=torch.get_num_threads(), inter_threads=1
        )
        self.words = json.loads((folder / "vocabulary.json").read_text())

    def generate(self, prompts: Prompts, new_tokens: int, batch: int, ignore_eos: bool = True) -> dict[str, Any]:
        (rows,) = prompts.values()
        clock: list[float] = []
        start = now()

        def counted(result: Any) -> bool:
            if result.batch_id == 0:
                clock.append(now() - start)
            return False  # True would end the row

        results = self.generator.generate_batch(
            [[self.words[token] for token in row] for row in rows],
            max_batch_size=batch,
            beam_size=1,
            sampling_topk=1,
            max_length=new_tokens,
            min_length=new_tokens,
            end_token=[len(self.words) - 1],
            include_prompt_in_result=False,
            callback=counted,
        )
        seconds = now() - start
        tokens = [list(result.sequences_ids[0]) for result in results]
        return {"tokens": tokens, "seconds": seconds, "steps": new_tokens, "clock": clock, "reported": {}}


def convert_for_ctranslate2(source: Path, work: Path) -> Path:
    """The converted folder under `work`, made once."""
    folder = work / f"{source.name}-ctranslate2"
    if not (folder / "model.bin").exists():
        from ctranslate2.converters import TransformersConverter

        TransformersConverter(str(source)).convert(str(folder), force=True)
    return folder


class OpenVINO:
    """The exported, stateful model through OpenVINO's own API: logits out at every step, argmax by NumPy."""

    def __init__(
        self,
        folders: dict[str, str],
        combine: str,
        dtype: str,
        device: str,
        stops: Sequence[int] | None = None,
        work: str = ".",
    ) -> None:
        import openvino

        core = openvino.Core()
        capabilities = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if dtype == "bfloat16" and "BF16" not in capabilities:
            raise InputError("OpenVINO computes no bfloat16 on this processor")
        hint = "bf16" if dtype == "bfloat16" else "f32"
        settings = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": hint,
            "KV_CACHE_PRECISION": hint,  # by itself it keeps an int8 cache on some processors: other tokens
            "PERFORMANCE_HINT": "LATENCY",
        }
        model = export_folder(_only(folders, "OpenVINO"), dtype, Path(work)) / OPENVINO_MODEL
        if not model.exists():
            raise InputError("this model has no export; make one with --openvino-python (docs/bench.md)")
        self.request = core.compile_model(core.read_model(model), "CPU", settings).create_infer_request()

    def generate(self, prompts: Prompts, new_tokens: int, batch: int, ignore_eos: bool = True) -> dict[str, Any]:
        (rows,) = prompts.values()
        if len({len(row) for row in rows}) > 1 or len(rows) > batch:
            raise InputError("OpenVINO is measured on one batch of prompts of one length")
        start = now()
        self.request.reset_state()
        found: list[list[int]] = []
        clock: list[float] = []
        ids_BT, filled = np.array(rows, dtype=np.int64), 0
        while len(found) < new_tokens:
            first, filled = filled, filled + ids_BT.shape[1]
            inputs = {
                "input_ids": ids_BT,
                "attention_mask": np.ones((len(rows), filled), np.int64),
                "position_ids": np.tile(np.arange(first, filled), (len(rows), 1)),
                "beam_idx": np.arange(len(rows), dtype=np.int32),
            }
            logits_BTV = self.request.infer(inputs, share_inputs=True, share_outputs=True)["logits"]
            ids_BT = logits_BTV[:, -1].argmax(-1)[:, None].astype(np.int64)
            found.append(ids_BT[:, 0].tolist())
            clock.append(now() - start)
        tokens = [list(row) for row in zip(*found)]
        return {"tokens": tokens, "seconds": clock[-1], "steps": new_tokens, "clock": clock, "reported": {}}


def export_folder(source: Path, dtype: str, work: Path) -> Path:
    """Where the export of a model stands; int8 is int8 in the weights. A folder may be an export itself."""
    if (source / OPENVINO_MODEL).exists():
        return source
    return work / f"{source.name}-openvino-{'int8' if dtype == 'int8' else 'fp32'}"


def export_for_openvino(python: Path, source: Path, dtype: str, work: Path) -> None:
    """Exports with the optimum-intel of another environment; raises InputError with the last line it said."""
    folder = export_folder(source, dtype, work)
    if (folder / OPENVINO_MODEL).exists():
        return
    command = [str(python.parent / "optimum-cli"), "export", "openvino", "--model", str(source)]
    command += ["--task", "text-generation-with-past", "--weight-format", folder.name.rsplit("-", 1)[1], str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise InputError(f"{command[0]}: cannot be run ({error.strerror}); install optimum-intel there") from None
    if done.returncode:
        raise InputError(f"{command[0]} failed: {(done.stderr.strip() or done.stdout.strip()).splitlines()[-1]}")


def _only(folders: dict[str, str], system: str) -> Path:
    if len(folders) != 1:
        raise InputError(f"{system} runs one model, found {len(folders)}")
    return Path(next(iter(folders.values())))
