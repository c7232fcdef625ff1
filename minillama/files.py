"""Model folders by name, and folders and files that are written atomically: complete under their name, or not there."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TextIO

from minillama.errors import InputError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILES = ["*.json", "*.safetensors", "tokenizer.model", "prompt.toml"]


def resolve_folder(name: str | Path) -> Path:
    """Return the local folder of that name; an `owner/name` that is no local folder is downloaded from the hub.

    Raises InputError where there is neither.
    """
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists():
        raise InputError(f"{name}: is a file; a model is a folder with config.json and model.safetensors")
    if not HUB_ID.fullmatch(str(name)) or path.parent.exists():
        raise InputError(f"{name}: no such folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(name), allow_patterns=HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        answered = isinstance(error, HFValidationError) or getattr(error, "response", None) is not None
        hub = "the hub does not give a model of that name" if answered else "the hub cannot be reached"
        raise InputError(f"{name}: no such folder, and {hub} ({reason}); give a model's folder or hub id") from None


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `folder`, synced and renamed when the block ends without an error.

    Files of an earlier `folder` that the block did not write again are kept, except its weights. When the block raises,
    `folder` is unchanged. Raises InputError where nothing can be written.
    """
    folder = Path(os.path.realpath(folder))  # of a symbolic link, the folder is replaced and the link stays
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; the output must be a folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror})") from None
    old = temporary.with_suffix(".old")
    try:
        os.chmod(temporary, 0o777 & ~umask())
        yield temporary
        if folder.exists():
            _keep_other_files(folder, temporary)
        for path in temporary.rglob("*"):
            sync(path)
        sync(temporary)
        if folder.exists():
            os.rename(folder, old)
        os.rename(temporary, folder)
        sync(folder.parent)
    except BaseException:
        if old.exists() and not folder.exists():
            os.rename(old, folder)
        raise
    finally:
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)


def _keep_other_files(folder: Path, temporary: Path) -> None:
    """Add the files of `folder` that `temporary` lacks, as hard links where the file system has them.

    Old weights are left out: a shard beside a new index would be loaded.
    """

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:
            shutil.copy2(source, target)

    for path in folder.iterdir():
        is_weights = path.name.startswith(("model", "pytorch_model", "consolidated")) and ".safetensors" in path.name
        if not is_weights and not (temporary / path.name).exists():
            copy = partial(shutil.copytree, symlinks=True, copy_function=link) if path.is_dir() else link
            copy(str(path), str(temporary / path.name))


def atomic_write(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically; see `atomic_open`."""
    with atomic_open(path) as stream:
        stream.write(text)


@contextmanager
def atomic_open(path: Path) -> Iterator[TextIO]:
    """Open a text file that gets its name when the block ends without an error. Raises OSError.

    A symbolic link stays a link. A path that is no regular file (/dev/stdout, a pipe) is written to directly.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        with open(path, "w", encoding="utf-8", newline="\n") as stream:
            yield stream
        return
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as stream:
            yield stream
        os.chmod(temporary, 0o666 & ~umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def sync(path: Path) -> None:
    """fsync a file or a folder, so that its contents are on disk before a rename that follows."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def umask() -> int:
    """The process's file mode mask."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
