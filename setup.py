"""Builds the native CPU kernels where a C++ compiler and jaxlib's headers are; pjax works without, slower on CPUs."""

import importlib.util
import platform
import sysconfig
from pathlib import Path

from setuptools import Extension, setup

FOLDER = "pjax/native"
FLAGS = "-std=c++17 -O2 -g0 -ftree-vectorize -fno-math-errno -fno-trapping-math -fno-signed-zeros -fassociative-math -w -Wno-psabi".split()


def headers() -> Path | None:
    """jaxlib's, of the environment that pjax is installed into before those of an isolated build, which may be too new for it."""
    jaxlib = importlib.util.find_spec("jaxlib")
    own = [] if jaxlib is None or jaxlib.origin is None else [Path(jaxlib.origin).parent]
    folders = [folder / "include" for folder in (Path(sysconfig.get_path("platlib")) / "jaxlib", *own)]
    return next((folder for folder in folders if folder.is_dir()), None)


def extensions() -> list[Extension]:
    """The kernels' library, loaded by ctypes: it has no Python module in it."""
    include = headers()
    if include is None:
        return []
    wide = ["-mprefer-vector-width=512"] if platform.machine() in ("x86_64", "AMD64") else []
    library = Extension(
        FOLDER.replace("/", ".") + "._library",
        [f"{FOLDER}/{name}.cc" for name in ("cpu_level", "kv_write", "paged_attention", "products", "reserve", "weights")],
        include_dirs=[str(include)],
        depends=[f"{FOLDER}/lanes.h", f"{FOLDER}/threads.h"],
        extra_compile_args=FLAGS + wide,
        optional=True,
    )
    return [library]


setup(ext_modules=extensions())
