"""Which run this is: everything that decides its translations, as a flat table that two runs can compare.

How the work is batched, sharded or shown is left out: a run may be resumed with other rows and another number of ranks.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from decode.pipeline.members import Options, Reader
from decode.pipeline.placement import Place

# Fields of Options that do not change a translation.
WITHOUT_EFFECT = {"batch_size", "speculate"}
# A weight file is known by its size and this many blocks spread over it: training moves every weight, and reading all
# of a large model twice would double the time to start.
BLOCKS, BLOCK_BYTES = 256, 4096


def fingerprint(
    sentences: Sequence[str],
    readers: Sequence[Reader],
    weights: Mapping[str, float],
    options: Options,
    places: Mapping[str, Place],
) -> dict[str, Any]:
    """Names and values of all that a resumed run must share; folders by what is in them, not by where they are."""
    found: dict[str, Any] = {"input": f"{len(sentences)} lines, {_digest(line.encode() for line in sentences)}"}
    found |= {name: value for name, value in asdict(options).items() if name not in WITHOUT_EFFECT}
    folders = {reader.folder: folder_digest(reader.folder) for reader in readers}
    for reader in readers:
        name, place = reader.name, places[reader.name]
        found |= {
            f"model {name}": folders[reader.folder],
            f"weight of {name}": weights[name],
            f"prompt of {name}": _digest([repr(reader.prompt.templates).encode()]),
            f"chat of {name}": reader.chat.name,
            f"dtype of {name}": place.storage,
            f"device of {name}": place.device.type,
        }
        if place.parts > 1:
            found[f"processes that share {name}"] = place.parts
    return found


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """What differs between two runs, in words; empty when nothing does."""
    return ", ".join(
        f"{name} was {there.get(name, 'not there')}, is {here.get(name, 'not there')}"
        for name in dict.fromkeys([*there, *here])
        if there.get(name) != here.get(name)
    )


def folder_digest(folder: Path) -> str:
    """A model's folder: small files whole, weights by size and sample."""
    parts = []
    for file in sorted(folder.iterdir()):
        weights = file.suffix in (".safetensors", ".pth")
        if weights or file.name in ("config.json", "generation_config.json", "params.json") or "token" in file.name:
            size = file.stat().st_size
            parts.append(f"{file.name} {size}".encode())
            with open(file, "rb") as stream:
                if not weights or size <= BLOCKS * BLOCK_BYTES:
                    parts.append(stream.read())
                else:
                    for block in range(BLOCKS):
                        stream.seek(block * (size - BLOCK_BYTES) // (BLOCKS - 1))
                        parts.append(stream.read(BLOCK_BYTES))
    return _digest(parts)


def _digest(parts: Any) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()[:16]
