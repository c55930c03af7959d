"""Environment variables that somebody reads: looked up in the programs that would."""

import functools
import importlib.util
from pathlib import Path

# Read by the start scripts of images, which are not at hand: from their documentation.
OF_IMAGES = {
    *("POSTGRES_USER", "POSTGRES_DB", "POSTGRES_PASSWORD_FILE", "PGDATA"),
    *("GF_SECURITY_ADMIN_PASSWORD__FILE", "GF_ANALYTICS_REPORTING_ENABLED"),
    "GF_ANALYTICS_CHECK_FOR_UPDATES",
}


def is_setting(name: str) -> bool:
    if name in OF_IMAGES:
        return True
    if name.startswith("MLFLOW_"):
        return f'"{name}"'.encode() in _code("mlflow", "environment_variables.py")
    if name.startswith("AWS_"):
        return f"'{name}'".encode() in _code("botocore", "configprovider.py")
    if name.startswith("RAY_"):
        return name.encode() in _code("ray", "_raylet.so")
    return name.startswith("PG") and name.encode() + b"\0" in _libpq()


@functools.cache
def _code(package: str, file: str) -> bytes:
    spec = importlib.util.find_spec(package)
    assert spec and spec.origin
    return (Path(spec.origin).parent / file).read_bytes()


@functools.cache
def _libpq() -> bytes:
    """The library that the installed driver brings."""
    spec = importlib.util.find_spec("psycopg2")
    assert spec and spec.origin
    (library,) = (Path(spec.origin).parents[1] / "psycopg2_binary.libs").glob("libpq-*")
    return library.read_bytes()
