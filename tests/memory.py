"""What Python code allocates, measured where nothing else runs: other threads of a test's own process would be counted too."""

import subprocess
import sys
from textwrap import dedent

_PROGRAM = """
import tracemalloc
{before}
tracemalloc.start()
{code}
print(tracemalloc.get_traced_memory()[1])
"""


def peak_bytes(code: str, before: str = "") -> int:
    """The most bytes that Python code held at a time beyond what the code `before` it left, in an interpreter of its own."""
    program = _PROGRAM.format(before=dedent(before), code=dedent(code))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)
