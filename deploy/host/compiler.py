"""The C++ compiler of this machine."""

import os
import shutil


def cxx_compiler() -> str | None:
    """The path of the compiler that CXX names, or else of g++; None where there is none. gcc alone is a C compiler."""
    return shutil.which(os.environ.get("CXX", "g++"))


NO_COMPILER = "needs a C++ compiler, and there is none: install g++ (apt-get install g++), or name one in CXX"
"""What to say of what needs one."""
