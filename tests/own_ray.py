"""A Ray of two CPUs beside the one of `local_ray`, whose workers know another store."""

import contextlib
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from subprocess import PIPE

from drawn import ROOT

_RAY = """
import sys, ray
context = ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="error")
print(context.address_info["address"], flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def own_ray(store: dict[str, str]) -> Iterator[dict[str, str]]:
    """Gives what a driver's environment needs: `store`, which leads to one, and this Ray."""
    known = store | {"RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_AUTH_MODE": "token"}
    env = os.environ | known | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", _RAY], env=env, stdin=PIPE, stdout=PIPE, text=True
    )
    assert process.stdout is not None
    yield known | {"RAY_ADDRESS": process.stdout.readline().strip()}
    process.communicate(timeout=120)
