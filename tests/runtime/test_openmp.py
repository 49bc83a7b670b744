import os
import subprocess
import sys

PROGRAM = """
import os, signal, sys

import torch

import deploy
import deploy.runtime.openmp as openmp

torch.set_num_threads(2)
x = torch.ones(1 << 20)

def alive():
    return len(os.listdir("/proc/self/task"))

(x * 2).sum()
before = alive()
child = os.fork()
if child == 0:
    signal.alarm(20)
    (x * 2).sum()
    openmp.refuse_lost_threads("net")
    os._exit(alive() - 1)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
(x * 2).sum()
try:
    openmp.refuse_lost_threads("net")
except deploy.DeployError as error:
    print(status, alive() - before, error)
"""


def test_openmp_has_its_threads_in_the_child_and_again_in_the_parent() -> None:
    env = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}  # numpy's ends its threads before a fork
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=100, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 0 'net' was loaded before the process was forked, not by Python's os.fork")
