"""Builds the native kernels: static libraries, two an instruction set level, and the extension that links them.

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
MODULE = "csrc/bindings.cpp"
SOURCES.remove(MODULE)
HEADERS = sorted(str(path) for path in Path("csrc").rglob("*.h"))


def library(name: str, sources: list[str], flags: list[str], include_dirs: tuple[str, ...] = ()) -> tuple[str, dict]:
    return (
        f"fastblocks_{name}",
        {
            "sources": sources,
            "obj_deps": {"": ["setup.py", *HEADERS], **{source: [source] for source in sources}},
            "cflags": flags,
            "include_dirs": list(include_dirs),
            "macros": MACROS,
        },
    )


def libraries(pybind11_include: str) -> list[tuple[str, dict]]:
    """In the order in which the linker needs them: each calls those behind it."""
    python = sysconfig.get_paths()["include"]
    # the module only hands on: nothing of it is worth optimising long
    module = library("module", [MODULE], [*FLAGS, "-O1", "-g0"], ("csrc", pybind11_include, python))
    core = library("core", SOURCES, [*FLAGS, "-g0"], (python,))
    kernels = [
        library(part, [f"csrc/isa/{part}.cpp"], [*KERNEL_FLAGS, *flags])
        for level, flags in LEVELS.items()
        for part in (level, f"{level}_train")
    ]
    return [module, core, *kernels]


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
    """Builds as many libraries at once as there are CPUs; a failure leaves a pure Python install."""

    LONGEST = ("core", "x86_64_v4", "x86_64_v3", "baseline")  # to compile; what begins last should be short

    def build_libraries(self, libraries) -> None:
        rank = {f"fastblocks_{name}": place for place, name in enumerate(self.LONGEST)}
        try:
            with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
                longest_first = sorted(libraries, key=lambda library: rank.get(library[0], len(rank)))
                list(pool.map(lambda library: super(BuildLibraries, self).build_libraries([library]), longest_first))
        except Exception as error:
            failed(error)
            self.distribution.native_build_failed = True


class BuildExtension(build_ext):
    """Links the extension, unless its libraries are missing."""

    def run(self) -> None:
        if getattr(self.distribution, "native_build_failed", False):
            return
        built = self.get_finalized_command("build_clib")
        for extension in self.extensions:  # as objects, too: an extension is linked again when one of those is newer
            extension.extra_objects = [f"{built.build_clib}/lib{name}.a" for name in built.get_library_names()]
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

    parts = libraries(pybind11.get_include())
    extension = Extension(
        "fastblocks._C",
        sources=[],  # the module is a library too, built beside the others; the linker takes it by its entry
        extra_link_args=["-Wl,-u,PyInit__C"],
        depends=["setup.py", *HEADERS, *(source for _, part in parts for source in part["sources"])],
        language="c++",
    )
    return {
        "ext_modules": [extension],
        "libraries": parts,
        "cmdclass": {"build_clib": BuildLibraries, "build_ext": BuildExtension},
    }


setup(**native_parts())
