"""The C++ compiler of this machine."""

import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

NO_COMPILER = "needs a C++ compiler, and there is none: install g++ (apt-get install g++), or name one in CXX"
"""What to say of what needs one."""

STATIC = (
    "it puts a copy of the C++ library into every package, and a process with several copies crashes: install a g++ that links it"
    " dynamically (apt-get install g++), or name one in CXX"
)
"""What to say of a compiler that `is_static`."""

_PROBE = '#include <locale>\nextern "C" bool probe() { return std::has_facet<std::collate<char>>(std::locale()); }\n'
_LIBRARIES = (b"libstdc++.so", b"libc++.so")
_PROBE_S = 60


def cxx_compiler() -> str | None:
    """The path of the compiler that CXX names, or else of g++; None where there is none. gcc alone is a C compiler.

    Where the one that CXX names links the C++ library statically and g++ does not, it is g++: see `is_static`.
    """
    named = shutil.which(os.environ.get("CXX", "g++"))
    if named is not None and is_static(named):
        other = shutil.which("g++")
        return other if other is not None and not is_static(other) else named
    return named


@functools.cache
def is_static(compiler: str) -> bool:
    """Whether a compiler puts the C++ library into every shared library that it makes, as some toolchains do.

    A process with several such copies, or with one beside the library of the system, may crash: some of their symbols are one for the
    whole process (STB_GNU_UNIQUE, such as `std::collate<char>::id`) and others are not, so that a locale of one copy is asked for
    its facets by the numbers of another. Seen with packages of AOTInductor, whose loader uses `std::regex`.

    False too if it compiles nothing: the compilation that counts says why.
    """
    with tempfile.TemporaryDirectory(prefix="deploy-cxx-") as folder:
        source, made = Path(folder) / "probe.cpp", Path(folder) / "probe.so"
        source.write_text(_PROBE, encoding="utf-8")
        command = [compiler, "-shared", "-fPIC", "-o", str(made), str(source)]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=_PROBE_S)
            content = made.read_bytes()
        except (OSError, subprocess.SubprocessError):
            return False
    return not any(name in content for name in _LIBRARIES)
