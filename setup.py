"""Builds pyloss._C by driving CMake and Ninja, and makes the README's links absolute.

Everything static is in pyproject.toml.

Imports neither torch nor numpy, so it also works in an isolated build environment.

Environment:
  PYLOSS_CMAKE_ARGS  extra CMake arguments, e.g. "-DPYLOSS_CUDA=OFF"
  MAX_JOBS           number of parallel compile jobs (default: Ninja's choice)
  PYLOSS_BUILD_TYPE  CMAKE_BUILD_TYPE (default: Release)
"""

from __future__ import annotations

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def find_tool(name: str, bin_dir_attribute: str) -> str:
    """Path of cmake or ninja: the one pip installed next to us, else the one on PATH.

    A virtual environment that is used without being activated is not on PATH, hence the first step.
    """
    try:
        bin_dir = getattr(importlib.import_module(name), bin_dir_attribute)
    except (ImportError, AttributeError):
        bin_dir = None
    path = shutil.which(name, path=bin_dir) if bin_dir else None
    path = path or shutil.which(name)
    if path is None:
        raise RuntimeError(f"{name} was not found; install it with `pip install {name}`")
    return path


class FreshBuild(build_py):
    """A wheel holds what the sources hold: what an earlier build left of deleted modules goes."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "pyloss", ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    """One CMake configure and build per extension; CMake knows the sources."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        out = Path(self.get_ext_fullpath(ext.name)).resolve()
        # Not self.build_temp: an editable install gives a new temporary directory each time, and
        # then every rebuild would start from nothing.
        build_dir = ROOT / "build" / f"cmake-{sysconfig.get_config_var('SOABI')}"
        # Objects stay, options do not: a build depends on its own arguments only, not on what an
        # earlier one passed, nor on tools in an isolated environment that is gone by now.
        (build_dir / "CMakeCache.txt").unlink(missing_ok=True)
        cmake = find_tool("cmake", "CMAKE_BIN_DIR")
        configure = [
            cmake,
            "-S",
            str(ROOT),
            "-B",
            str(build_dir),
            "-G",
            "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja', 'BIN_DIR')}",
            f"-DCMAKE_BUILD_TYPE={os.environ.get('PYLOSS_BUILD_TYPE', 'Release')}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={out.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPYLOSS_VERSION={self.distribution.get_version()}",
            *shlex.split(os.environ.get("PYLOSS_CMAKE_ARGS", "")),
        ]
        build = [cmake, "--build", str(build_dir), "--target", "_C"]
        if jobs := os.environ.get("MAX_JOBS"):
            build += ["-j", jobs]
        subprocess.run(configure, check=True)
        subprocess.run(build, check=True)


def long_description() -> str:
    """The README for a package index, where links relative to the repository lead nowhere."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    # tomllib is not there before Python 3.11.
    configuration = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (repository,) = re.findall(r'^Repository = "(.+)"$', configuration, re.M)
    text = re.sub(r"(!\[[^\]]*\]\()(?!https?:|#)", rf"\g<1>{repository}/raw/main/", text)
    return re.sub(r"((?<!!)\[[^\]]*\]\()(?!https?:|#)", rf"\g<1>{repository}/blob/main/", text)


if __name__ == "__main__":
    setup(
        ext_modules=[Extension("pyloss._C", sources=[])],
        cmdclass={"build_ext": CMakeBuild, "build_py": FreshBuild},
        long_description=long_description(),
        long_description_content_type="text/markdown",
    )
