"""A folder that appears whole or not at all: written beside its place, forced to disk, then swapped in."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

AT_FDCWD = -100
RENAME_EXCHANGE = 2  # linux/fs.h
# What a kernel or file system answers that cannot exchange two folders.
_CANNOT_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EXDEV, errno.EOPNOTSUPP, errno.EPERM)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two paths in one step; False where the system cannot. Raises OSError for any other failure."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    renameat2.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    if renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(other))


def _swap(stage: Path, target: Path) -> None:
    """Put ``stage`` in the place of ``target``; what was there is removed."""
    if not target.exists():
        os.rename(stage, target)
        return
    if _exchange(stage, target):
        shutil.rmtree(stage, ignore_errors=True)
        return
    # Two renames: the old folder is complete under one of its two names at every moment.
    aside = stage.with_name(stage.name + ".old")
    os.rename(target, aside)
    try:
        os.rename(stage, target)
    except BaseException:
        os.rename(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_tree(folder: Path) -> None:
    for parent, _, files in os.walk(folder):
        for name in files:
            if not (Path(parent) / name).is_symlink():
                _sync(Path(parent) / name)
        _sync(Path(parent))


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _carry_over(old: Path, stage: Path, own: tuple[str, ...]) -> None:
    """What lies in the old folder, is not ours and was not written anew goes along."""
    for item in old.iterdir():
        target = stage / item.name
        if item.name in own or target.exists():
            continue
        if item.is_dir() and not item.is_symlink():
            shutil.copytree(item, target, symlinks=True, copy_function=_link_or_copy)
        else:
            _link_or_copy(str(item), str(target))


def _open_stage(target: Path, marker: str) -> Path:
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "the output must be a folder, and this is a file", str(target))
    if target.is_dir() and not (target / marker).is_file() and any(target.iterdir()):
        what = f"the folder is not empty and has no {marker}; choose a new, an empty or a ranvier folder"
        raise FileExistsError(errno.EEXIST, what, str(target))
    nearest = next(parent for parent in target.parents if parent.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"no folder can be made below the file {nearest}", str(target))
    stage = target.parent / f".ranvier-save-{uuid.uuid4().hex[:12]}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        stage.mkdir()
    except OSError as error:
        raise OSError(error.errno, f"the folder cannot be written: {error.strerror}", str(target)) from error
    return stage


def check_output(folder: str | os.PathLike, marker: str) -> None:
    """Raises OSError when :func:`staged` would: call it before long work whose result goes there."""
    _open_stage(Path(os.path.realpath(folder)), marker).rmdir()


@contextmanager
def staged(folder: str | os.PathLike, marker: str, own: tuple[str, ...]) -> Iterator[Path]:
    """Yields an empty folder to write into; when the block ends well it takes the place of ``folder``.

    marker: the file that tells a folder of ours; a folder with other files and without it is refused (FileExistsError).
    own: names that are ours, so those of the old folder go; its other files are carried over. If the block or the swap
    fails the old folder is as it was. A full disk is an OSError that names the folder.
    """
    target = Path(os.path.realpath(folder))
    stage = _open_stage(target, marker)
    try:
        with naming(target):
            yield stage
            if target.is_dir():
                _carry_over(target, stage, own)
                shutil.copymode(target, stage)
            _sync_tree(stage)
            _swap(stage, target)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise
    _sync(target.parent)


@contextmanager
def naming(target: Path) -> Iterator[None]:
    """What a full disk raises while ``target`` is written is an OSError that names it."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise _named(error, target) from error


def _named(error: Exception, target: Path) -> OSError:
    """What a full disk raises, which safetensors reports as an error of its own and a write without a name."""
    code = re.search(r"\(os error (\d+)\)", str(error)) if isinstance(error, SafetensorError) else None
    number = int(code[1]) if code else getattr(error, "errno", None) or errno.EIO
    return OSError(number, f"the folder cannot be written: {os.strerror(number) if code else error}", str(target))
