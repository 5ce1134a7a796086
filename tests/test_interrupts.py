"""Signals are answered, whatever has become of the terminal."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from jaxsft.run.interrupts import Interrupted, Interrupts
from jaxsft.run.parallel import DataParallel
from tests.conftest import ROOT

# Two loops that poll until they are told to stop, the stop printed on stdout; before the second, stderr's reader dies.
GONE = """
import os, signal, sys, time
from jaxsft.run.interrupts import Interrupted, Interrupts
from jaxsft.run.parallel import DataParallel

read_end, write_end = os.pipe()
os.dup2(write_end, 2)
os.close(write_end)
os.close(read_end)
if sys.argv[1] == "closed":
    sys.stderr.close()
for name in sys.argv[2:]:
    with Interrupts(DataParallel()) as interrupts:
        interrupts.defer()
        os.kill(os.getpid(), signal.Signals[name])
        try:
            for _ in range(500):
                time.sleep(0.01)
                interrupts.poll()
            print("never heard")
        except Interrupted as interrupted:
            print(interrupted)
sys.stderr = open(os.devnull, "w")
"""


@pytest.fixture(autouse=True)
def _hear_the_end_of_the_terminal():
    """Under nohup the tests themselves, and what they start, would ignore SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("how", ["broken", "closed"])
def test_signals_are_heard_where_nobody_reads_stderr(run, how: str) -> None:
    done = run("-c", GONE, how, "SIGTERM", "SIGINT", "SIGHUP", timeout=60)
    assert done.stdout.split() == ["SIGTERM", "SIGINT", "SIGHUP"]


def heard(number: int) -> int | None:
    """Which signal ends a loop to which `number` is sent; None: it goes on."""
    with Interrupts(DataParallel()) as interrupts:
        interrupts.defer()
        signal.raise_signal(number)
        try:
            for _ in range(20):
                interrupts._thread.join(0.01)
                interrupts.poll()
        except Interrupted as interrupted:
            return interrupted.number
    return None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_each_is_named_and_handled_as_before_afterwards(number: int, capsys) -> None:
    before = signal.getsignal(number)
    assert heard(number) == number
    assert capsys.readouterr().err.startswith(f"{signal.Signals(number).name}: saving a checkpoint after this step")
    assert signal.getsignal(number) == before


def test_the_end_of_the_terminal_stays_ignored_under_nohup() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert heard(signal.SIGHUP) is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_of_the_program_around_is_no_reason_to_stop() -> None:
    answered: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: answered.append(number))
    try:
        assert heard(signal.SIGUSR1) is None
        assert answered == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before)


# A notebook's, say: JAX is connected, and the loop runs in another thread, so that its handler of SIGTERM is JAX's.
NOTICE = """
import os, signal, threading, time
import jax
from jaxsft.run.interrupts import Interrupted, Interrupts
from jaxsft.run.parallel import DataParallel
from jaxsft.run.sockets import free_port

jax.config.update("jax_enable_preemption_service", {enabled})
jax.distributed.initialize(f"127.0.0.1:{{free_port()}}", 1, 0, cluster_detection_method="deactivate")

def loop():
    with Interrupts(DataParallel()) as interrupts:
        interrupts.defer()
        try:
            for _ in range({polls}):
                time.sleep(0.01)
                interrupts.poll()
            print("never")
        except Interrupted as interrupted:
            print(interrupted, time.monotonic() - interrupted.noticed < 5)

thread = threading.Thread(target=loop)
thread.start()
{notice}
thread.join()
jax.distributed.shutdown()
"""


CONNECTED = """
import time
from types import SimpleNamespace
from jaxsft.run import processes, sockets
from jaxsft.run.rendezvous import ProcessInfo

place = f"127.0.0.1:{sockets.free_port()}"
processes.connect(SimpleNamespace(info=ProcessInfo("", 0, 1, 0), address=place, bind_address=place), 10)
print("connected", flush=True)
time.sleep(20)
"""


def test_before_the_loop_a_connected_process_ends_at_once() -> None:
    """JAX's own handler would note a SIGTERM for the loop, which may begin minutes later."""
    process = subprocess.Popen([sys.executable, "-c", CONNECTED], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "connected\n"
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM


@pytest.mark.parametrize(
    ("enabled", "notice", "polls", "said"),
    [
        (True, "os.kill(os.getpid(), signal.SIGTERM)", 3000, "SIGTERM True"),
        (False, "", 3, "never"),
    ],
)
def test_a_notice_of_jax_counts_in_one_process_too(run, enabled: bool, notice: str, polls: int, said: str) -> None:
    done = run("-c", NOTICE.format(enabled=enabled, notice=notice, polls=polls), timeout=60)
    assert done.stdout == f"{said}\n", done.stderr


BEFORE = """
import os, signal, time
from jaxsft.run.interrupts import Interrupts
from jaxsft.run.parallel import DataParallel
parallel = DataParallel()
parallel.process_count = {}
with Interrupts(parallel):
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_before_the_first_step_the_end_of_the_terminal_ends_it_at_once(processes: int) -> None:
    process = subprocess.Popen([sys.executable, "-c", BEFORE.format(processes)], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGHUP)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGHUP == 129
    assert err.startswith("stopped: SIGHUP before the first step; there was nothing to save")
