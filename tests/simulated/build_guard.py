"""Compiles the guard of the simulated card. Prints its path, or why there is none."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path


def build(folder: Path) -> Path | None:
    """The library, compiled into `folder`; None where there is no C++ compiler."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return None
    import torch
    from torch.utils.cpp_extension import include_paths

    libraries = Path(torch.__file__).parent / "lib"
    target, source = folder / "cuda_guard.so", Path(__file__).with_name("cuda_guard.cpp")
    command = [compiler, "-O0", "-w", "-shared", "-fPIC", "-std=c++20", str(source), "-o", str(target)]
    command += [f"-I{path}" for path in include_paths()]
    command += [f"-L{libraries}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{libraries}"]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return target


if __name__ == "__main__":
    print(build(Path(sys.argv[1])) or "")
