"""C++ kernels are compiled at first use for the processor they run on, and kept in `$XDG_CACHE_HOME/cveff/kernels` (by
default `~/.cache/cveff/kernels`). Everything there may be deleted at any time; it is built again.

A kernel has a plain C interface and is loaded with ctypes: no header of PyTorch's, a second to build.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
from pathlib import Path

from cveff.errors import CveffError, KernelError
from cveff.files import atomic_path
from cveff.runtime.machine import code_flags

FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-fPIC")
_COMPILERS = ("c++", "g++", "clang++")
_HEADERS = (Path(__file__).parent / "vectors.h",)
_NO_COMPILER = "there is no C++ compiler; install g++ or clang++, or set CXX to the path of yours"
_log = logging.getLogger("cveff.kernels")


def cache_folder() -> Path:
    """Where compiled kernels are kept."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "cveff" / "kernels"


@functools.cache
def library(source: Path) -> ctypes.CDLL | None:
    """The compiled `source`; None, after one warning, where it cannot be built."""
    if _compiler() is None:
        _warn_of_no_compiler()
        return None
    try:
        return ctypes.CDLL(str(built(source)))
    except (CveffError, OSError) as error:
        _log.warning("%s runs as plain PyTorch, which is slower: %s", source.parent.name, error)
        return None


def built(source: Path) -> Path:
    """The shared library of `source`, from the cache or compiled now.

    Its name is a digest of the sources, the flags, the compiler's version, the OpenMP library and the instructions
    of this processor. Processes that build at once each write a file of their own; the last rename wins.

    Raises:
        KernelError: there is no compiler, or it refuses the source.
        CveffError: the cache folder cannot be written.
    """
    found = _compiler()
    if found is None:
        raise KernelError(_NO_COMPILER)
    compiler, version = found
    openmp = _openmp()
    digest = hashlib.sha256()
    for part in (*(path.read_text(encoding="utf-8") for path in (source, *_HEADERS)), *FLAGS, version):
        digest.update(part.encode() + b"\0")
    digest.update(f"{openmp} {platform.machine()} {' '.join(code_flags())}".encode())
    path = cache_folder() / f"{source.parent.name}-{digest.hexdigest()[:24]}.so"
    if path.is_file():
        return path
    with atomic_path(path) as temporary:
        object_file = temporary.with_name(temporary.name + ".o")
        try:
            _run([compiler, *FLAGS, "-c", str(source), "-o", str(object_file)])
            _run([compiler, "-shared", str(object_file), openmp or "-fopenmp", "-o", str(temporary)])
        finally:
            object_file.unlink(missing_ok=True)
    return path


@functools.cache
def _warn_of_no_compiler() -> None:
    _log.warning("kernels run as plain PyTorch, which is slower: %s", _NO_COMPILER)


@functools.cache
def _compiler() -> tuple[str, str] | None:
    """Path and version of `$CXX`, or of the first compiler found."""
    wanted = os.environ.get("CXX")
    for name in (wanted,) if wanted else _COMPILERS:
        path = shutil.which(name)
        if path is not None:
            return path, _run([path, "--version"])
    return None


def _openmp() -> str | None:
    """The OpenMP library that is loaded, PyTorch's: a second one's threads would spin against the first one's."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    loaded = {line.split(maxsplit=5)[-1] for line in lines if "omp" in line and ".so" in line}
    found = sorted(path for path in loaded if Path(path).name.startswith(("libgomp", "libomp", "libiomp")))
    return found[0] if found else None


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelError(f"the compiler cannot be run: {error}") from error
    if done.returncode != 0:
        raise KernelError(f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}")
    return done.stdout
