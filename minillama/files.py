"""Folders and files that appear whole or not at all."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from minillama.errors import InputError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILES = ["*.json", "*.safetensors", "tokenizer.model", "prompt.toml"]


def resolve_folder(name: str | Path) -> Path:
    """A local folder as it is; `owner/name` that is no local folder is fetched from the Hugging Face hub."""
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
    """Yield a temporary folder beside `folder`; when the block ends well it is synced and takes that name.

    Files that `folder` already had and the block did not write again are kept. When the block raises, the temporary
    folder is removed and `folder` is as it was.
    """
    folder = Path(os.path.realpath(folder))  # through a symbolic link: the folder is replaced, the link stays
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; the output must be a folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror})") from None
    old = None
    try:
        os.chmod(temporary, 0o777 & ~umask())
        yield temporary
        if folder.exists():
            _keep_others(folder, temporary)
        for path in temporary.rglob("*"):
            sync(path)
        sync(temporary)
        if folder.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".old", dir=folder.parent))
            os.rename(folder, old)
        os.rename(temporary, folder)
        sync(folder.parent)
    except BaseException:
        if old is not None and not folder.exists():
            os.rename(old, folder)
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)


def _keep_others(folder: Path, temporary: Path) -> None:
    """Give `temporary` what `folder` has beside it, as hard links where the file system has them. Old weights go."""

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:
            shutil.copy2(source, target)

    for path in folder.iterdir():
        if (temporary / path.name).exists() or _is_weights(path.name):
            continue
        if path.is_dir():
            shutil.copytree(path, temporary / path.name, symlinks=True, copy_function=link)
        else:
            link(str(path), str(temporary / path.name))


def sync(path: Path) -> None:
    """fsync a file or a folder, so that a rename after it cannot overtake its contents."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_weights(name: str) -> bool:
    """Old shards must not survive beside a new index: they would be loaded."""
    return name.startswith(("model", "pytorch_model", "consolidated")) and ".safetensors" in name


def write_whole(path: Path, text: str) -> None:
    """Write a text file whole or not at all: see `open_whole`."""
    with open_whole(path) as stream:
        stream.write(text)


@contextmanager
def open_whole(path: Path) -> Iterator[TextIO]:
    """A text file to write, which takes its name when the block ends well; raises OSError where it cannot be written.

    A symbolic link stays one, and what is no regular file (/dev/stdout, a pipe) is simply written to.
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


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
