"""Builds the native CPU kernels where a C++ compiler and jaxlib's headers are; pjax works without, slower on CPUs."""

import importlib.util
import platform
from pathlib import Path

from setuptools import Extension, setup

FOLDER = "pjax/pallas_kernels/native"
FLAGS = "-std=c++17 -O2 -g0 -ftree-vectorize -fno-math-errno -fno-trapping-math -fno-signed-zeros -fassociative-math -w -Wno-psabi".split()


def extensions() -> list[Extension]:
    """The kernels' library, loaded by ctypes: it has no Python module in it."""
    jaxlib = importlib.util.find_spec("jaxlib")
    if jaxlib is None or jaxlib.origin is None:
        return []
    wide = ["-mprefer-vector-width=512"] if platform.machine() in ("x86_64", "AMD64") else []
    include = str(Path(jaxlib.origin).parent / "include")
    library = Extension(
        FOLDER.replace("/", ".") + "._library",
        [f"{FOLDER}/{name}.cc" for name in ("kv_write", "paged_attention", "products", "reserve", "weights")],
        include_dirs=[include],
        depends=[f"{FOLDER}/lanes.h", f"{FOLDER}/threads.h"],
        extra_compile_args=FLAGS + wide,
        optional=True,
    )
    return [library]


setup(ext_modules=extensions())
