"""What processes of a run tell each other of the data."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.conftest import DEVICES, ROOT
from tests.test_parallel import free_port

PROGRAM = """
import sys, jax
from jaxsft.cli import UserError
from jaxsft.data import hosts

jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
asked = []
made = hosts.once(lambda: asked.append("asked") or {"rows": [(1, "x" * 100_000)]})
parts = hosts.together("ab"[jax.process_index()] * (1 + jax.process_index()))

def fails():
    raise UserError("a; bucket can't be read", "name another")

try:
    hosts.once(fails)
except UserError as error:
    said = error
print(len(asked), made["rows"][0][0], len(made["rows"][0][1]), parts, said)
"""


def test_one_asks_for_all_and_all_put_their_parts_together() -> None:
    address = f"127.0.0.1:{free_port()}"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": DEVICES.format(1)}
    both = [
        subprocess.Popen([sys.executable, "-c", PROGRAM, address, str(index)], cwd=ROOT, env=env, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for index in range(2)
    ]  # fmt: skip
    for index, process in enumerate(both):
        said, errors = process.communicate(timeout=100)
        expected = f"{1 - index} 1 100000 ['a', 'bb'] a; bucket can't be read; name another"
        assert said.splitlines()[-1] == expected, errors
