"""The memory that a run needs, computed before it starts: weights by dtype, KV caches by slots and positions.

The budget is per device: `--memory`, or what the device has free now. Logits, activations and the interpreter are small
beside the two sums and are not counted.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from decode.model.batch import cache_positions
from decode.pipeline.members import MemberSpec
from decode.pipeline.placement import Placement
from minillama import InputError, KVCache
from minillama.machine import free_memory
from minillama.tensor_parallel import TPGroup

# Slots beside those of the sequences: one holds the prefix that all prompts share.
PREFIX_SLOTS = 1
CGROUP = Path("/sys/fs/cgroup")


class MemoryBudget:
    """Computes the batch size that fits beside the weights on every device. Make it before the weights are loaded."""

    def __init__(
        self,
        members: Sequence[MemberSpec],
        placements: Mapping[str, Placement],
        memory: str | None = None,
        processes: int = 1,
    ) -> None:
        """memory: the user's limit per device, such as 24G.   processes: those that share this machine's memory."""
        self.members, self.placements, self.memory = members, placements, memory
        self.weight_bytes: dict[torch.device, dict[str, int]] = {}  # by member
        loaded = set()
        for member in members:
            placement = placements[member.name]
            on_device = self.weight_bytes.setdefault(placement.device, {})
            if (member.folder, placement) not in loaded:  # a folder named twice is held once
                loaded.add((member.folder, placement))
                on_device[member.name] = _weight_bytes(member, placement)
        self.limits = {d: parse_size(memory) if memory else available(d, processes) for d in self.weight_bytes}

    def reduce_min(self, tp: TPGroup) -> None:
        """Lower the limits to the smallest of all processes that share a member: they decode the same batch."""
        limits = tp.all_reduce_min(torch.tensor(list(self.limits.values()))).tolist()
        self.limits = dict(zip(self.limits, limits))

    def fit(
        self, prompts: Sequence[Sequence[list[int]]], max_new_tokens: int, batch_size: int, may_lower: bool
    ) -> tuple[int, str]:
        """The number of these sequences to decode together, at most `batch_size`, and a description of their memory.

        Raises InputError, with the numbers, when not one fits, or fewer than `batch_size` and that may not be lowered.
        """
        positions = max_positions(prompts, self.members, max_new_tokens)
        required = 1 if may_lower else batch_size
        fitting = batch_size
        for device, by_member in self.weight_bytes.items():
            slot = self._slot_bytes(device, positions)
            slots = max(0, (self.limits[device] - sum(by_member.values())) // slot - PREFIX_SLOTS)
            if slots < required:
                hint = f"; {_sequences(slots)} fit (--batch-size {slots})" if slots else ""
                limit = f"--memory {self.memory}" if self.memory else f"the {format_size(self.limits[device])} free"
                raise InputError(
                    f"{device}: {self._describe([device], positions, required)} do not fit {limit}{hint}"
                )
            fitting = min(fitting, slots)
        return fitting, self._describe(self.weight_bytes, positions, fitting)

    def _describe(self, devices: Sequence[torch.device] | Mapping[torch.device, object], positions: Sequence[int], batch_size: int) -> str:
        """`weights 36.88 MB (L 12.3 MB float32, …) + caches 63.96 MB (16 sequences …)`, the sums over the devices."""
        weights = {name: count for device in devices for name, count in self.weight_bytes[device].items()}
        slot = sum(self._slot_bytes(device, positions) for device in devices)
        listed = ", ".join(f"{name} {format_size(n)} {self.placements[name].weight_dtype}" for name, n in weights.items())
        return (
            f"weights {format_size(sum(weights.values()))} ({listed}) + caches "
            f"{format_size((batch_size + PREFIX_SLOTS) * slot)} ({_sequences(batch_size)} of up to {max(positions):,} "
            f"positions, {format_size(slot)} each, and one for the shared prefix)"
        )

    def _slot_bytes(self, device: torch.device, positions: Sequence[int]) -> int:
        """The cache of one sequence on a device."""
        return sum(
            cache_positions(count)
            * KVCache.bytes_per_position(member.checkpoint.config, self.placements[member.name].cache_dtype)
            // self.placements[member.name].tp_size
            for member, count in zip(self.members, positions)
            if self.placements[member.name].device == device
        )


def max_positions(prompts: Sequence[Sequence[list[int]]], members: Sequence[MemberSpec], max_new_tokens: int) -> list[int]:
    """For each member, the positions of the longest of these prompts with its translation."""
    longest = [0] * len(members)
    for prompt in prompts:
        room = min(max_new_tokens, *(member.context - len(tokens) for member, tokens in zip(members, prompt)))
        longest = [max(count, len(tokens) + room) for count, tokens in zip(longest, prompt)]
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


def _sequences(count: int) -> str:
    return "1 sequence" if count == 1 else f"{count} sequences"


def _weight_bytes(member: MemberSpec, placement: Placement) -> int:
    config = member.checkpoint.config
    count = member.checkpoint.parameters * placement.weight_bytes
    if config.tie_word_embeddings and placement.device.type == "cpu":  # the output layer's packed copy
        count += config.vocab_size * config.hidden_size * placement.dtype.itemsize
    return count // placement.tp_size
