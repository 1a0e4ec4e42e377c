"""Builds the native kernels: one static library an instruction set level, and the extension that links them.

Where no compiler is found, or it fails, the install still succeeds without them: fastblocks then computes with kernels
that Numba compiles when they are first used.
FASTBLOCKS_BUILD=require makes a failed build an error, FASTBLOCKS_BUILD=skip does not try.
FASTBLOCKS_EMULATE_V4=1 builds the AVX-512 level's code for a CPU without AVX-512 (for tests; slow).
"""

from __future__ import annotations

import os
import platform
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_clib import build_clib
from setuptools.command.build_ext import build_ext

BUILD = os.environ.get("FASTBLOCKS_BUILD", "auto")
EMULATE_V4 = os.environ.get("FASTBLOCKS_EMULATE_V4") == "1"
X86 = platform.machine().lower() in ("x86_64", "amd64")

# Contraction to FMA yes; never -ffast-math: it breaks NaN and, linked, the whole process's denormals.
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
KERNEL_FLAGS = [*FLAGS, "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-g0"]
KERNEL_FLAGS += ["-fno-exceptions", "-fno-rtti", "-Wno-maybe-uninitialized"]
LEVELS = {"baseline": []}
if X86:
    LEVELS["baseline"] = ["-march=x86-64"]
    # -O3 is worth its time only where nearly everybody's kernels are.
    LEVELS["x86_64_v3"] = ["-O3", "-march=x86-64-v3"]
    # Without the preference, compilers fill only half of each 512-bit register.
    LEVELS["x86_64_v4"] = ["-O3", "-march=x86-64-v4", "-mprefer-vector-width=512"]
    if EMULATE_V4:
        LEVELS["x86_64_v4"] = ["-O3", "-march=x86-64-v3", "-DFASTBLOCKS_VECTOR_BYTES=64", "-Wno-psabi"]

MACROS = [(name, "1") for name, on in (("FASTBLOCKS_X86", X86), ("FASTBLOCKS_EMULATE_V4", EMULATE_V4)) if on]
SOURCES = sorted(str(path) for folder in ("csrc", "csrc/ops", "csrc/train") for path in Path(folder).glob("*.cpp"))
SOURCES.remove("csrc/bindings.cpp")
HEADERS = sorted(str(path) for path in Path("csrc").rglob("*.h"))


def kernel_library(level: str, flags: list[str]) -> tuple[str, dict]:
    sources = [f"csrc/isa/{level}.cpp", f"csrc/isa/{level}_train.cpp"]
    return (
        f"fastblocks_{level}",
        {
            "sources": sources,
            "obj_deps": {"": ["setup.py", *HEADERS], **{source: [source] for source in sources}},
            "cflags": [*KERNEL_FLAGS, *flags],
        },
    )


def core_library() -> tuple[str, dict]:
    """All but the module itself: a library builds beside the others."""
    include = sysconfig.get_paths()["include"]
    return (
        "fastblocks_core",
        {
            "sources": SOURCES,
            "obj_deps": {"": ["setup.py", *HEADERS], **{source: [source] for source in SOURCES}},
            "cflags": [*FLAGS, "-g0"],
            "include_dirs": [include],
            "macros": MACROS,
        },
    )


def failed(error: BaseException) -> None:
    if BUILD == "require":
        raise error
    reason = " ".join(str(error).split()) or type(error).__name__
    print(
        f"\nWARNING: fastblocks is installed WITHOUT its native kernels; those that Numba compiles are slower.\n"
        f"WARNING: the build failed: {reason}\n"
        f"WARNING: to get them, install a C++17 compiler (g++ or clang++) and install fastblocks again.\n",
        file=sys.stderr,
    )


class BuildLibraries(build_clib):
    """Builds the levels side by side; a failure leaves a pure Python install."""

    def build_libraries(self, libraries) -> None:
        try:
            with ThreadPoolExecutor() as pool:
                # the widest level takes longest, so it begins
                longest_first = sorted(libraries, key=lambda library: -len(library[1]["cflags"]))
                list(pool.map(lambda library: super(BuildLibraries, self).build_libraries([library]), longest_first))
        except Exception as error:
            failed(error)
            self.distribution.native_build_failed = True


class BuildExtension(build_ext):
    """Links the extension, unless its libraries are missing."""

    def run(self) -> None:
        if getattr(self.distribution, "native_build_failed", False):
            return
        try:
            super().run()
        except Exception as error:
            failed(error)

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]

    def copy_extensions_to_source(self) -> None:
        self.extensions = [e for e in self.extensions if Path(self.get_ext_fullpath(e.name)).exists() or self._built(e)]
        super().copy_extensions_to_source()

    def _built(self, extension: Extension) -> bool:
        return Path(self.build_lib, self.get_ext_filename(self.get_ext_fullname(extension.name))).exists()


def native_parts() -> dict:
    if BUILD == "skip":
        return {}
    import pybind11

    extension = Extension(
        "fastblocks._C",
        sources=["csrc/bindings.cpp"],
        include_dirs=["csrc", pybind11.get_include()],
        define_macros=MACROS,
        # the module only hands on: nothing of it is worth optimising long
        extra_compile_args=[*FLAGS, "-O1", "-g0"],
        depends=["setup.py", *HEADERS, *SOURCES, *(f"csrc/isa/{level}.cpp" for level in LEVELS)],
        language="c++",
    )
    return {
        "ext_modules": [extension],
        "libraries": [core_library(), *(kernel_library(level, flags) for level, flags in LEVELS.items())],
        "cmdclass": {"build_clib": BuildLibraries, "build_ext": BuildExtension},
    }


setup(**native_parts())
