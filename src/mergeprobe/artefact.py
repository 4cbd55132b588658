"""Files that are there whole or not at all, and that say what made them."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from mergeprobe.errors import MergeProbeError, OutputExists
from mergeprobe.version import __version__

MADE_BY = f"mergeprobe {__version__}"


@contextmanager
def atomic_file(path: str | Path, *, force: bool = True) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on a clean exit it is synced and renamed there.

    On any exception (a full disk, Ctrl-C) the temporary file is removed and `path` is as it was.
    An error of the file system names `path`.
    """
    path = Path(path)
    refuse_existing(path, force=force)
    with _naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(**_beside(path, ".tmp"))
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            _sync(temporary)
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync(path.parent)


@contextmanager
def atomic_folder(path: str | Path, *, force: bool = False) -> Iterator[Path]:
    """Yields a temporary folder beside `path`; on a clean exit it takes `path`'s place."""
    path = Path(path)
    refuse_existing(path, force=force)
    with _naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(**_beside(path, ".tmp")))
        try:
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    _sync(file)
            os.chmod(temporary, 0o755)
            if path.exists():
                old = Path(tempfile.mkdtemp(**_beside(path, ".old")))
                os.replace(path, old / "replaced")
                os.replace(temporary, path)
                shutil.rmtree(old)
            else:
                os.replace(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _sync(path.parent)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """File-system errors inside the block name `path`, not the temporary file beside it.

    safetensors has an error of its own for a full disk; it becomes an OSError too.
    """
    try:
        yield
    except SafetensorError as problem:
        raise OSError(errno.EIO, f"cannot be written: {problem}", str(path)) from None
    except OSError as problem:
        if problem.filename is None or ".tmp" in str(problem.filename):
            problem.filename = str(path)
        raise


def _beside(path: Path, suffix: str) -> dict[str, Any]:
    """For a temporary name that is hidden and on the same file system."""
    return {"prefix": f".{path.name[:40]}.", "suffix": suffix, "dir": path.parent}


def refuse_existing(path: str | Path, *, force: bool) -> None:
    """Raises OutputExists if `path` is there (an empty folder does not count) and not `force`."""
    path = Path(path)
    if force or not path.exists():
        return
    if path.is_dir() and not any(path.iterdir()):
        path.rmdir()
        return
    raise OutputExists(f"'{path}' already exists; choose another output or pass --force")


def write_json(path: str | Path, value: Any, *, force: bool = True) -> None:
    with atomic_file(path, force=force) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")


def write_parquet(frame: Any, path: str | Path, *, force: bool = True) -> None:
    """Writes a polars DataFrame; through memory, so that a full disk is an OSError."""
    buffer = io.BytesIO()
    frame.write_parquet(buffer)
    with atomic_file(path, force=force) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def read_json(path: str | Path, error: type[MergeProbeError], *, finite: bool = False) -> Any:
    """The parsed file; `error` with one line if it is missing, empty or malformed. finite: NaN and
    infinities, which Python would read, are malformed too."""
    path = Path(path)
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        raise error(f"'{path}' does not exist") from None
    except (OSError, UnicodeDecodeError) as problem:
        raise error(f"'{path}' cannot be read: {problem}") from None
    try:
        return json.loads(text, parse_constant=_refused if finite else None)
    except json.JSONDecodeError as problem:
        raise error(f"'{path}' is not valid JSON (line {problem.lineno}: {problem.msg})") from None
    except (ValueError, RecursionError) as problem:  # absurd nesting, numbers of 5,000 digits
        raise error(f"'{path}' cannot be read as JSON: {problem}") from None


def _refused(constant: str) -> None:
    raise ValueError(f"it holds {constant}, expected finite numbers")


def check_schema(found: Any, newest: int, what: str, error: type[MergeProbeError]) -> None:
    """Refuses a schema version that this release does not know."""
    if not isinstance(found, int) or found < 1:
        raise error(f"{what} has no valid schema version: got {found!r}, expected 1 to {newest}")
    if found > newest:
        raise error(
            f"{what} has schema {found}; this mergeprobe reads up to {newest}: upgrade mergeprobe"
        )


def sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        pass  # some file systems cannot sync a folder
    finally:
        os.close(handle)
