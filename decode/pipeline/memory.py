"""What a run needs in memory, said before it starts: weights by their type, caches by positions and rows.

The budget is each device's: what `--memory` says, or what the device has free now. What lies between the two sums
(logits, one layer's activations, the interpreter) is small beside them for any model worth a budget, and not counted.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from decode.pipeline.members import Reader
from decode.model.batch import cache_positions
from decode.pipeline.placement import Place
from minillama import InputError, KVCache
from minillama.tensor_parallel import TPGroup

# Rows beside those of the sentences: what all prompts begin with stands in one.
SHARED_ROWS = 1
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
CGROUP = Path("/sys/fs/cgroup")


def parse_size(text: str) -> int:
    """`24G`, `24GB`, `1.5 gib` or plain bytes; raises InputError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text.lower())
    if not match or (match[3] and not match[2]):
        raise InputError(f"--memory {text}: expected a size such as 24G, 800MB or 1.5GiB")
    unit = 1024 ** "kmgt".find(match[2]) * 1024 if match[3] else UNITS[match[2]]
    return int(float(match[1]) * unit)


def spell_size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.2f} {unit}"
        count /= 1000
    raise AssertionError


def available(device: torch.device, processes: int = 1) -> int:
    """Bytes that are free on a device; on a CPU this process's part of them, a container's limit counted."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = (int(fields["MemAvailable"].split()[0]) + int(fields["SwapFree"].split()[0])) * 1024
    try:
        limit = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(stat["inactive_file"]) + int(stat["active_file"]))
    except (OSError, ValueError, KeyError):  # no container, or none with a limit
        pass
    return free // processes


@dataclass(frozen=True)
class Budget:
    """Rows that fit beside the weights on every device. Make it before the weights are loaded."""

    readers: Sequence[Reader]
    places: Mapping[str, Place]
    weights: dict[torch.device, dict[str, int]]  # bytes by member
    limits: dict[torch.device, int]
    given: str | None

    @classmethod
    def of(
        cls, readers: Sequence[Reader], places: Mapping[str, Place], memory: str | None, processes: int = 1
    ) -> "Budget":
        weights: dict[torch.device, dict[str, int]] = {}
        read = set()
        for reader in readers:
            place = places[reader.name]
            on_device = weights.setdefault(place.device, {})
            if (reader.folder, place) not in read:  # a folder named twice is held once
                read.add((reader.folder, place))
                config = reader.checkpoint.config
                weight_bytes = reader.checkpoint.parameters * place.weight_bytes
                if config.tie_word_embeddings and place.device.type == "cpu":  # the output layer's packed copy
                    weight_bytes += config.vocab_size * config.hidden_size * place.dtype.itemsize
                on_device[reader.name] = weight_bytes // place.parts
        limits = {d: parse_size(memory) if memory else available(d, processes) for d in weights}
        return cls(readers, places, weights, limits, memory)

    def least(self, part: TPGroup | None) -> "Budget":
        """What fits in every process that holds a part of a member: they decode the same rows."""
        if part is None:
            return self
        limits = part.all_reduce_min(torch.tensor(list(self.limits.values()))).tolist()
        return replace(self, limits=dict(zip(self.limits, limits)))

    def rows(self, capacities: Sequence[int], wanted: int, may_lower: bool) -> int:
        """Rows of the given positions (one count per member) to decode together, at most `wanted`.

        Raises InputError, with the numbers, when not one fits, or fewer than wanted and that may not be lowered.
        """
        fitting = wanted
        for device, members in self.weights.items():
            row = self._row_bytes(device, capacities)
            rows = max(0, (self.limits[device] - sum(members.values())) // row - SHARED_ROWS)
            if rows < (1 if may_lower else wanted):
                raise InputError(self._refusal(device, capacities, row, 1 if may_lower else wanted, rows))
            fitting = min(fitting, rows)
        return fitting

    def describe(self, capacities: Sequence[int], rows: int) -> str:
        """`weights 36.88 MB + 16 rows of caches 63.96 MB` summed over devices."""
        weights = sum(sum(members.values()) for members in self.weights.values())
        row = sum(self._row_bytes(device, capacities) for device in self.weights)
        caches = spell_size((rows + SHARED_ROWS) * row)
        return f"weights {spell_size(weights)} + caches {caches} ({_rows(rows)} of {spell_size(row)} and one shared)"

    def _row_bytes(self, device: torch.device, capacities: Sequence[int]) -> int:
        return sum(
            cache_positions(capacity)
            * KVCache.bytes_per_position(reader.checkpoint.config, self.places[reader.name].cache_dtype)
            // self.places[reader.name].parts
            for reader, capacity in zip(self.readers, capacities)
            if self.places[reader.name].device == device
        )

    def _refusal(self, device: torch.device, capacities: Sequence[int], row: int, wanted: int, rows: int) -> str:
        members = self.weights[device]
        parts = ", ".join(f"{name} {spell_size(count)} {self.places[name].storage}" for name, count in members.items())
        weights = sum(members.values())
        limit = f"--memory {self.given}" if self.given else f"the {spell_size(self.limits[device])} that are free"
        hint = f"; {_rows(rows)} fit (--batch-size {rows})" if rows else ""
        return (
            f"{device}: weights {spell_size(weights)} ({parts}) and caches {spell_size((wanted + SHARED_ROWS) * row)} "
            f"({_rows(wanted)} of up to {max(capacities):,} positions, {spell_size(row)} each, and one shared) "
            f"do not fit {limit}{hint}"
        )


def capacities(prompts: Sequence[Sequence[list[int]]], readers: Sequence[Reader], max_new_tokens: int) -> list[int]:
    """Positions that a row needs for the longest of these prompts and its translation, for each member."""
    longest = [0] * len(readers)
    for prompt in prompts:
        room = min(max_new_tokens, *(reader.context - len(part) for reader, part in zip(readers, prompt)))
        for number, part in enumerate(prompt):
            longest[number] = max(longest[number], len(part) + room)
    return longest


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"
