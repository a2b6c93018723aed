"""Processes that fork, that may start no more threads, and that run out of memory."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("seqkernels._native", reason="the native module is not built")
pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="fork and limits are those of Linux"
)

# The parent's torch has threads; this package has had none when the process forks. A child that
# hangs ends by its alarm. Arguments: what the child does, and torch's number of threads in it.
SCRIPT = """
import copy, os, resource, signal, sys
import torch
from torch import nn
import seqkernels
from seqkernels.testing import assert_close_to_oracle

torch.set_num_threads(2)
torch.manual_seed(0)
layer = nn.TransformerEncoderLayer(96, 2, 32, batch_first=True)
stock = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
model = seqkernels.nn.TransformerEncoder.from_torch(stock)
x, long_x = torch.randn(1, 100, 96), torch.randn(1, 200_000, 96)

def check():
    with torch.inference_mode():
        y = model(x)
    torch.set_num_threads(1)  # torch itself hangs in a child that asks for its parent's pool
    assert_close_to_oracle(y, golden, low_precision)

def limit_memory(megabytes_more):
    pages = int(open("/proc/self/statm").read().split()[0])
    limit = pages * resource.getpagesize() + (megabytes_more << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))

with torch.inference_mode():
    golden = copy.deepcopy(stock).double()(x.double())
    low_precision = copy.deepcopy(stock).bfloat16()(x.bfloat16())
    torch.mm(torch.randn(512, 512), torch.randn(512, 512))
assert len(os.listdir("/proc/self/task")) > 1, "torch started no threads"
child = os.fork()
if child == 0:
    signal.alarm(60)
    try:
        torch.set_num_threads(int(sys.argv[2]))
        exec(sys.argv[1])
    except BaseException as error:
        print(repr(error), flush=True)
        os._exit(1)
    os._exit(0)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
sys.exit(f"the child ended with status {status}" if status else 0)
"""


def run_in_forked_child(statements: str, threads: int = 2) -> None:
    command = [sys.executable, "-c", SCRIPT, statements, str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_first_threaded_call_is_that_of_a_forked_child() -> None:
    run_in_forked_child("check()")


def test_no_more_threads_can_be_started() -> None:
    """There is no room for a stack: the calling thread does all the work."""
    run_in_forked_child("limit_memory(4); check()", threads=4)


def test_no_memory_for_a_long_sequence() -> None:
    """An error that can be caught, and the model goes on."""
    run_in_forked_child(
        """
limit_memory(150)
try:
    with torch.inference_mode():
        model(long_x)
except MemoryError:
    pass
else:
    raise AssertionError("there was memory enough")
check()
"""
    )
