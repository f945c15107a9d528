"""Builds gqa_ext._core from csrc/; everything else is in pyproject.toml.

GQA_WERROR=1                      warnings are errors
GQA_SANITIZE=address,undefined    instrumented build
CC                                the compiler, as everywhere

No -march and no per-file flags: the files in csrc/isa choose their instruction set themselves
and compile to nothing on another architecture.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from glob import glob

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

WARNINGS = ["-Wall", "-Wextra", "-Wconversion", "-Wshadow"]


def compile_flags() -> list[str]:
    # -ffp-contract=off: a product and a sum are fused where the code says so and nowhere else, so that
    # compilers agree on every bit.  -isystem: warnings are for our code, not for NumPy's headers.
    flags = ["-std=c11", "-O3", "-ffp-contract=off", "-fvisibility=hidden", "-pthread"]
    flags += ["-isystem", numpy.get_include()]
    if os.environ.get("GQA_WERROR", "0") not in ("", "0"):
        flags += [*WARNINGS, "-Werror"]
    return flags + sanitizer_flags()


def sanitizer_flags() -> list[str]:
    names = os.environ.get("GQA_SANITIZE", "")
    if not names:
        return []
    return [f"-fsanitize={names}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g", "-O1"]


class ParallelBuild(build_ext):
    """Compiles the files of the one extension side by side."""

    def build_extension(self, ext: Extension) -> None:
        compile_all = self.compiler.compile

        def compile_each(sources: list[str], **options: object) -> list[str]:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                lists = pool.map(lambda source: compile_all([source], **options), sources)
                return [obj for objects in lists for obj in objects]

        self.compiler.compile = compile_each
        super().build_extension(ext)


core = Extension(
    "gqa_ext._core",
    sources=sorted(glob("csrc/*.c") + glob("csrc/isa/*.c") + glob("csrc/python/*.c")),
    depends=sorted(glob("csrc/**/*.h", recursive=True)),
    include_dirs=["csrc"],
    define_macros=[("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION"), ("NPY_TARGET_VERSION", "NPY_1_25_API_VERSION")],
    extra_compile_args=compile_flags(),
    extra_link_args=["-pthread", *sanitizer_flags()],
)

setup(ext_modules=[core], cmdclass={"build_ext": ParallelBuild})
