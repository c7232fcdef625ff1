"""The memory that a run needs, computed before it starts: weights by dtype, KV caches by slots and positions.

The budget is per device: `--memory`, or what the device has free now. Logits, activations and the interpreter are small
beside the two sums and are not counted.
"""

import re
from collections import Counter
from collections.abc import Sequence as SequenceOf
from pathlib import Path

import torch

from decode.engine.sequence import Sequence
from decode.model.batch import cache_positions
from decode.pipeline.members import EnsembleSpec
from minillama import InputError, KVCache
from minillama.machine import free_memory
from minillama.tensor_parallel import TPGroup

# Slots beside those of the sequences: one holds the prefix that all prompts share.
PREFIX_SLOTS = 1
CGROUP = Path("/sys/fs/cgroup")


class MemoryBudget:
    """Computes the batch size that fits beside the weights on every device. Make it before the weights are loaded."""

    def __init__(self, models: EnsembleSpec, memory: str | None, processes: int = 1, may_lower: bool = True) -> None:
        """memory: the user's limit per device, such as 24G.   processes: those that share this machine's memory.
        may_lower: a batch size that does not fit.
        """
        self.members, self.placements, self.memory = models.members, models.placements, memory
        self.may_lower = may_lower
        self.weight_bytes: Counter[torch.device] = Counter()
        distinct = {(member.folder, self.placements[member.name]): member for member in self.members}
        for (_, placement), member in distinct.items():  # a folder named twice is held once
            config = member.checkpoint.config
            count = member.checkpoint.parameters * placement.weight_bytes
            if config.tie_word_embeddings and placement.device.type == "cpu":  # the output layer's packed copy
                count += config.vocab_size * config.hidden_size * placement.dtype.itemsize
            self.weight_bytes[placement.device] += count // placement.tp_size
        self.limits = {d: parse_size(memory) if memory else available(d, processes) for d in self.weight_bytes}

    def reduce_min(self, tp: TPGroup) -> None:
        """Lower the limits to the smallest of all processes that share a member: they decode the same batch."""
        limits = tp.all_reduce_min(torch.tensor(list(self.limits.values()))).tolist()
        self.limits = dict(zip(self.limits, limits))

    def fit(self, sequences: SequenceOf[Sequence], batch_size: int) -> tuple[int, str]:
        """How many of these sequences can be decoded together, at most `batch_size`, and the memory of that in words.

        Raises InputError, with the numbers, when not one fits, or fewer than `batch_size` and that may not be lowered.
        """
        positions = self.max_positions(sequences)
        fitting = batch_size
        required = max(sequence.params.beams for sequence in sequences) if self.may_lower else batch_size
        for device, weights in self.weight_bytes.items():
            slot = self.slot_bytes(device, positions)
            slots = max(0, (self.limits[device] - weights) // slot - PREFIX_SLOTS)
            if slots < required:
                limit = f"--memory {self.memory}" if self.memory else f"the {format_size(self.limits[device])} free"
                hint = f"; --batch-size {slots} fits" if slots else ""
                needed = self._describe([device], positions, required)
                raise InputError(f"{device}: {needed} do not fit {limit}{hint}")
            fitting = min(fitting, slots)
        return fitting, self._describe(list(self.weight_bytes), positions, fitting)

    def _describe(self, devices: SequenceOf[torch.device], positions: SequenceOf[int], slots: int) -> str:
        """`weights 36.88 MB + caches 63.96 MB (16 slots of …)`, summed over devices."""
        weights = sum(self.weight_bytes[device] for device in devices)
        slot = sum(self.slot_bytes(device, positions) for device in devices)
        return (
            f"weights {format_size(weights)} + caches {format_size((slots + PREFIX_SLOTS) * slot)} ({slots} slots of "
            f"up to {max(positions):,} positions, {format_size(slot)} each, and one for the shared prefix)"
        )

    def slot_bytes(self, device: torch.device, positions: SequenceOf[int]) -> int:
        """The cache of one sequence on a device. positions: for each member."""
        return sum(
            cache_positions(count)
            * KVCache.bytes_per_position(member.checkpoint.config, self.placements[member.name].cache_dtype)
            // self.placements[member.name].tp_size
            for member, count in zip(self.members, positions)
            if self.placements[member.name].device == device
        )

    def max_positions(self, sequences: SequenceOf[Sequence]) -> list[int]:
        """For each member, the positions of the longest of these prompts with its translation."""
        contexts = [member.context for member in self.members]
        longest = [0] * len(contexts)
        for sequence in sequences:
            lengths = [len(prompt) for prompt in sequence.prompts]
            room = min(sequence.max_new_tokens, *(context - n for context, n in zip(contexts, lengths)))
            longest = [max(count, n + room) for count, n in zip(longest, lengths)]
        return longest


def available(device: torch.device, processes: int = 1) -> int:
    """Bytes that are free on a device; on a CPU this process's share, within a container's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = free_memory(swap=True)
    if free is None:
        raise InputError("the free memory of this machine is not known; give --memory")
    try:
        limit = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(stat["inactive_file"]) + int(stat["active_file"]))
    except (OSError, ValueError, KeyError):  # no container, or one without a limit
        pass
    return free // processes


def parse_size(text: str) -> int:
    """`24G`, `24GB`, `1.5 gib` or plain bytes; raises InputError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text.lower())
    if not match or (match[3] and not match[2]):
        raise InputError(f"--memory {text}: expected a size such as 24G, 800MB or 1.5GiB")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " kmgt".find(match[2] or " "))


def format_size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:,.0f} B" if unit == "B" else f"{count:,.2f} {unit}"
        count /= 1000
    return f"{count:,.2f} GB"
