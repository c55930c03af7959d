"""How a command finds its Ray, and what its workers do first."""

import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import ray
from drawn import ROOT, archives
from ray._private.utils import validate_socket_filepath

from alexnet.errors import UserError
from pipelines import cluster
from pipelines.cli import main


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> str:
    """host:port where nothing listens."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def test_address_that_cannot_be_joined_is_named_as_it_was_given(
    nobody, monkeypatch, tmp_path, capsys
):
    monkeypatch.setenv("RAY_ADDRESS", nobody)
    with pytest.raises(UserError, match=f"answers at RAY_ADDRESS={nobody}; start one with"):
        cluster.connect()
    with pytest.raises(UserError, match="--address http://head:8265 is a job server"):
        cluster.connect("http://head:8265")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # the flag comes before it
    raw, out = str(archives(tmp_path / "raw")), str(tmp_path / "out")
    assert main(["build", "--raw", raw, "--out", out, "--address", nobody]) == 2
    assert f"answers at --address {nobody}; start one with" in capsys.readouterr().err


@pytest.mark.usefixtures("local_ray")
def test_a_cluster_is_joined_without_a_line_of_rays():
    code = (
        "import ray, sys; from pipelines.cluster import connect; connect(sys.argv[1]); print('in')"
    )
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-W", "ignore", "-c", code, address]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "in\n", "")


def test_several_nodes_with_local_paths_are_refused_unless_shared(monkeypatch):
    def check(alive: list[bool], paths: list[str], shared: bool) -> None:
        monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": node} for node in alive])
        cluster.refuse_local_paths(paths, shared_fs=shared)

    check([True, True], ["s3://bucket/out"], False)
    check([True, True], ["/out"], True)
    check([True, False], ["/out"], False)  # the other is gone
    with pytest.raises(UserError, match=r"/out is local and .* has 2 nodes; .*--shared-fs"):
        check([True, True], ["s3://bucket/raw", "/out"], False)


@pytest.mark.parametrize(
    ("job", "expected"),
    [
        ({}, {"py_modules", "worker_process_setup_hook"}),
        ({"working_dir": "gcs://x.zip"}, {"worker_process_setup_hook"}),
        ({"worker_process_setup_hook": "theirs.hook"}, {"py_modules"}),
    ],
)
def test_workers_get_what_the_job_does_not_bring(monkeypatch, job, expected):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": job}))
    assert set(cluster._for_workers()) == expected


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Fills with settings and environment of a Ray that is started here, which is none."""
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **settings: seen.append(settings | dict(os.environ)))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(cluster, "_started_here", lambda: None)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    for name in ("RAY_ADDRESS", "RAY_TMPDIR", "TMPDIR", "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    return seen


def has_loopback(interface: str) -> bool:
    return "127.0.0.1" in {each.address for each in psutil.net_if_addrs()[interface]}


def test_own_ray_has_the_checkout_and_loopback_and_leaves_our_environment_as_it_was(
    local, monkeypatch, tmp_path
):
    for name in ("RAY_USAGE_STATS_ENABLED", "RAY_COLOR_PREFIX"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    before = dict(os.environ)
    cluster.connect()
    [seen] = local
    assert seen["PYTHONPATH"].split(os.pathsep) == [str(ROOT), str(tmp_path)]
    assert has_loopback(seen["GLOO_SOCKET_IFNAME"]) and "runtime_env" not in seen
    assert dict(os.environ) == before


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
@pytest.mark.parametrize("what", ["too long", "not there", "not ASCII"])
def test_own_ray_gets_a_short_folder_that_is_gone_afterwards(
    variable, what, local, monkeypatch, tmp_path
):
    names = {"too long": "x" * 60, "not there": "none/at/all", "not ASCII": "ö"}
    folder = tmp_path / names[what]
    if what != "not there":
        folder.mkdir()
    if what != "too long":
        monkeypatch.setattr(cluster, "_LONGEST_FOLDER", 1000)  # so that length is not the reason
    monkeypatch.setenv(variable, str(folder))
    with cluster.connected():
        [settings] = local
        short = Path(settings["_temp_dir"])
        socket = short / "session_2026-01-01_00-00-00_000000_4194304" / "sockets" / "plasma_store"
        validate_socket_filepath(str(socket))
        assert short.is_dir()
        # Of Python's own sockets, which are made in TMPDIR.
        validate_socket_filepath(f"{settings.get('TMPDIR', '')}/pymp-12345678/listener-12345678")
        assert os.environ[variable] == str(folder)
    assert not short.exists()


def test_own_ray_keeps_to_rays_own_folder_where_it_will_do(local, monkeypatch):
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        with cluster.connected():
            assert "_temp_dir" not in local[0]


def test_of_several_rays_on_a_host_that_of_ray_start_is_joined(monkeypatch, tmp_path):
    joined: list[str] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda address, **_: joined.append(address))
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as head:
        address = f"127.0.0.1:{head.getsockname()[1]}"
        (tmp_path / "ray" / "ray_current_cluster").write_text(f"{address}\n")
        assert cluster.is_known() and cluster.connect() is None
    assert joined == [address]


def test_a_command_line_that_is_no_text_is_refused_before_ray_sees_it(local, monkeypatch):
    monkeypatch.setattr("sys.argv", ["build", "--out", "/data/\udcff"])
    with pytest.raises(UserError, match=r"/data/\\udcff: Ray takes no name that is not UTF-8"):
        cluster.connect()
    assert local == []


def test_ray_that_does_not_start_is_told_with_its_logs(local, monkeypatch):
    def fail(**_):
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", fail)
    with pytest.raises(UserError, match=r"timed out during startup.*logs are under /tmp/ray"):
        cluster.connect()


def test_of_what_workers_print_our_lines_alone_are_shown_and_a_note_once(capsys):
    note = f"note: no links on {secrets.token_hex(4)}"
    for rank in (0, 1):
        rays = ["Setting up process group for: env://", "[2026-11-30 17:29:04 E 1 2] core.cc: no"]
        lines = [*rays, note, f"training: step={rank}", "pipelines.progress: no figures"]
        cluster._our_lines({"lines": lines, "pid": rank})
    ours = [note, "step=0", "no figures", "step=1", "no figures"]
    assert capsys.readouterr().err.splitlines() == ours


@pytest.mark.parametrize(
    ("node", "chosen"), [("127.0.0.1", ""), ("127.0.0.1", "mine"), ("203.0.113.9", "")]
)
def test_gloo_listens_on_the_interface_of_the_nodes_address_unless_told_another(
    monkeypatch, node, chosen
):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", chosen)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: node)
    head = SimpleNamespace(gcs_address="head:6379")
    monkeypatch.setattr(ray, "get_runtime_context", lambda: head)
    monkeypatch.setenv("RAY_ADDRESS", "")
    monkeypatch.delenv("RAY_ADDRESS")
    cluster.know_the_cluster()
    assert os.environ["RAY_ADDRESS"] == "head:6379", "where another Ray runs, Ray's own ask for it"
    found = os.environ["GLOO_SOCKET_IFNAME"]
    if chosen or node != "127.0.0.1":  # which no interface here has
        assert found == chosen
    else:
        assert has_loopback(found)


def test_own_ray_starts_where_the_path_of_python_has_a_space_and_leaves_no_token(tmp_path):
    """Workers with an environment of their own too, for which Ray uses a shell."""
    (tmp_path / "my env").symlink_to(sys.prefix)
    code = """
import os, ray
from pipelines import cluster
with cluster.connected():
    asked = ray.remote(runtime_env={"env_vars": {"OF": "its own"}})(lambda: os.environ["OF"])
    print(ray.get(asked.remote(), timeout=120))
"""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    with tempfile.TemporaryDirectory(dir="/tmp") as short:  # where nobody has started a Ray
        done = subprocess.run(
            [str(tmp_path / "my env" / "bin" / "python"), "-W", "ignore", "-c", code],
            cwd=tmp_path,
            env=kept | {"PYTHONPATH": str(ROOT), "RAY_TMPDIR": short, "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
        )
    assert (done.returncode, done.stdout.strip()) == (0, "its own"), done.stderr
    assert not (tmp_path / ".ray").exists()
