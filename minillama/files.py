"""Folders and files that appear whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minillama.errors import InputError


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
    try:
        os.chmod(temporary, 0o777 & ~umask())
        yield temporary
        for path in temporary.rglob("*"):
            sync(path)
        sync(temporary)
        old = None
        if folder.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".old", dir=folder.parent))
            os.rename(folder, old)
        try:
            os.rename(temporary, folder)
        except BaseException:
            if old is not None:
                os.rename(old, folder)
            raise
        sync(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if old is not None:
        for path in old.iterdir():
            if not (folder / path.name).exists() and not _is_weights(path.name):
                os.rename(path, folder / path.name)
        shutil.rmtree(old, ignore_errors=True)


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
    """Write a text file whole or not at all; raises OSError where it cannot be written."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
        os.chmod(temporary, 0o666 & ~umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
