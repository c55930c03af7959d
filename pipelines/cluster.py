"""How a command joins a Ray cluster, or starts one for itself, and what it shows of its processes.
Imported by drivers alone.
"""

import json
import logging
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._private.ray_logging import global_worker_stdstream_dispatcher as streams
from ray.exceptions import AuthenticationError

from alexnet.errors import UserError, reason
from pipelines import command, storage

_ROOT = Path(__file__).resolve().parents[1]
_PACKAGES = ("alexnet", "pipelines", "training")
_SCHEDULER_SECONDS = 10
# Of the 107 bytes that the path of a socket may have, less /session_DATE_TIME_PID/sockets/NAME.
_LONGEST_FOLDER = 107 - len("/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")
_LONGEST_TMPDIR = 107 - len("/pymp-12345678/listener-12345678")
_SHORT = ("/tmp", "/var/tmp", "/dev/shm")  # where a folder for them is tried
_HOOK = "pipelines.cluster.know_the_cluster"
_OF_CPP = re.compile(rb"\[[-\d]+ [:,\d]+ [IWE] \d+ \d+\] ")
# As our code begins its lines in Ray's processes: a note, or the name of one of our loggers.
_OURS = re.compile(r"(note|(?:pipelines|training)[\w.]*): ")


def connect(
    address: str | None = None, *, dashboard: bool = False, ray_logs: bool = False
) -> Path | None:
    """Joins the cluster at `address`, by default that of $RAY_ADDRESS or of `ray start` on this
    host; without any it starts a local one, and gives the folder to remove after it, if any.

    Workers get the three packages from this checkout, so nothing has to be installed on them.
    `dashboard` gives a local one its web page, on loopback. Of what Ray's processes print, our own
    lines alone are shown, as they are; with `ray_logs` all, as Ray shows them.
    Raises UserError where the cluster cannot be joined.
    """
    if ray.is_initialized():
        return None
    if bad := [word for word in sys.argv if word.encode(errors="replace").decode() != word]:
        # Ray would keep the command line with the job.
        raise UserError(
            f"{bad[0]}: Ray takes no name that is not UTF-8 here; rename it, or set PYTHONUTF8=1"
        )
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not sys.stdout.isatty():
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    given = f"--address {address}" if address else f"RAY_ADDRESS={os.environ.get('RAY_ADDRESS')}"
    if not (address := address or os.environ.get("RAY_ADDRESS")):
        address = _started_here()  # of several on this host, Ray would take the newest
    elif address != "local":
        _check(address, given)
    if address in (None, "local"):
        folder = _own(dashboard)
        _show(ray_logs)
        return folder
    try:
        with nullcontext() if ray_logs else _without_lines_of_cpp():
            ray.init(address=address, runtime_env=_for_workers(), logging_level=logging.WARNING)
    except AuthenticationError as error:
        raise UserError(
            "the Ray cluster asks for a token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH "
            "(or put the token into ~/.ray/auth_token)"
        ) from error
    except ConnectionError as error:
        raise UserError(
            f"the Ray cluster at {address} cannot be joined ({reason(error)}); if it asks for a "
            "token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH; RAY_ADDRESS=local takes none "
            "that is there, but starts one"
        ) from error
    _show(ray_logs)
    return None


@contextmanager
def _without_lines_of_cpp() -> Iterator[None]:
    """Until it has a log file, Ray's C++ in this process writes to stderr: a line a second while a
    cluster refuses us. Whatever else was written there meanwhile is shown at the end."""
    kept = os.dup(2)
    try:
        with tempfile.TemporaryFile() as aside:
            os.dup2(aside.fileno(), 2)
            try:
                yield
            finally:
                os.dup2(kept, 2)
                aside.seek(0)
                for line in aside:
                    if not _OF_CPP.match(line):
                        os.write(2, line)
    finally:
        os.close(kept)


def _show(ray_logs: bool) -> None:
    """Ray prints every line of its processes, with a prefix and in colours; it has no setting that
    tells ours from its own. Until it is shut down, ours take the place of its printer."""
    if not ray_logs:
        streams.remove_handler("ray_print_logs")
        streams.add_handler("ray_print_logs", _our_lines)  # whose name it removes at its end


def _our_lines(batch: dict[str, Any]) -> None:
    for line in batch["lines"]:
        if (ours := _OURS.match(line)) is None:
            continue
        said = line[ours.end() :]
        if ours[1] == "note":  # of many processes alike
            command.note(said, about=said)
        else:
            print(said, file=sys.stderr, flush=True)


def _own(dashboard: bool) -> Path | None:
    _own_token()
    settings: Any = {"include_dashboard": dashboard, "logging_level": logging.WARNING}
    if folder := _own_folder():
        settings["_temp_dir"] = str(folder)
    # Of the command that starts a worker, Ray quotes every word but this one.
    if (python := shlex.quote(sys.executable)) != sys.executable:
        settings["runtime_env"] = {"py_executable": python}
    if dashboard:  # of a training: it waits for Ray's agent of such environments anyway
        settings.setdefault("runtime_env", {})["worker_process_setup_hook"] = _HOOK
    print("starting Ray: about 20 s", file=sys.stderr, flush=True)
    ours = _for_own_ray(folder)
    before = {name: os.environ[name] for name in ours if name in os.environ}
    os.environ.update(ours)
    try:
        ray.init(address="local", **settings)
    except Exception as error:  # Ray's own is a bare one
        raise UserError(
            f"Ray cannot be started on this machine ({reason(error)}); its logs are under "
            f"{folder or _rays_folder()}: look there for what it lacks, such as memory, "
            "processes (`ulimit -u`) or open files (`ulimit -n`)"
        ) from error
    finally:
        for name in ours:
            del os.environ[name]
        os.environ.update(before)
    return folder


def is_known() -> bool:
    """Whether `connect` would join a cluster, and not start one."""
    address = os.environ.get("RAY_ADDRESS")
    return address != "local" if address else _started_here() is not None


@contextmanager
def connected(
    address: str | None = None, *, dashboard: bool = False, ray_logs: bool = False
) -> Iterator[None]:
    """`connect` for a while: closed afterwards, workers and all, unless it was there before."""
    joined_before = ray.is_initialized()
    terminated = signal.getsignal(signal.SIGTERM)
    try:
        folder = connect(address, dashboard=dashboard, ray_logs=ray_logs)
    except SystemExit as left:  # of Ray's handler for SIGTERM
        raise KeyboardInterrupt from left
    if callable(terminated) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, terminated)  # Ray has put its own in the place of ours
    try:
        yield
    finally:
        # After Ctrl-C Ray Data's scheduler still runs for a moment, and Ray's C++ ends the whole
        # process with a code of its own when the cluster goes away under it.
        for thread in threading.enumerate():
            if thread.name.startswith("StreamingExecutor"):
                thread.join(_SCHEDULER_SECONDS)
        if not joined_before:
            ray.shutdown()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def each(
    rows: list[dict[str, Any]],
    task: Callable[[dict[str, Any]], dict[str, Any]],
    workers: int | None,
) -> Generator[dict[str, Any]]:
    """What `task` makes of each row, in order of completion: Ray Data, one task of one CPU a row,
    at most `workers` at once, by default as many as the cluster has CPUs."""
    import ray.data  # which takes a second, and trainings need none

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # they count rows; ours count images
    context.print_on_execution_start = False
    # Ray reserves twice this much per task for its output, a row of a few hundred bytes here.
    context.target_max_block_size = 1 << 20
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # "bars disabled"
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        task, num_cpus=1, compute=ray.data.TaskPoolStrategy(size=workers)
    )
    with closing(iter(dataset.iter_rows())) as answers:
        yield from answers


def refuse_local_paths(paths: list[str], *, shared_fs: bool) -> None:
    """Raises UserError for local paths on a cluster of several nodes, where each node would see
    another disk, unless the user says that all share it."""
    local = [path for path in paths if not storage.is_s3(path)]
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if local and len(nodes) > 1 and not shared_fs:
        raise UserError(
            f"{local[0]} is local and this cluster has {len(nodes)} nodes; use s3://, or pass "
            "--shared-fs (of a training: --shared-fs True) if every node mounts it"
        )


def _check(address: str, given: str) -> None:
    """Ray would wait for minutes for a cluster that is not there. given: how the user said it."""
    if address.startswith("http"):
        raise UserError(
            f"{given} is a job server, which only `ray job submit` can use; give the cluster's "
            "host:port, or none to run on this machine alone"
        )
    if "://" not in address and address not in ("auto", "local") and not _answers(address):
        raise UserError(
            f"no Ray cluster answers at {given}; start one with `ray start --head`, or give no "
            "address to run on this machine alone"
        )


def _started_here() -> str | None:
    """The address that `ray start` has left on this host, where somebody listens there."""
    with suppress(OSError, UnicodeDecodeError):
        address = (_rays_folder() / "ray_current_cluster").read_text().strip()
        return address if _answers(address) else None
    return None


def _rays_folder() -> Path:
    """Where Ray keeps its sessions, by its own choice."""
    return Path(os.environ.get("RAY_TMPDIR", os.environ.get("TMPDIR", "/tmp"))) / "ray"


def _own_folder() -> Path | None:
    """A new folder for a Ray of our own, where its own choice would not do: a path too long for its
    sockets, as batch systems have in TMPDIR, not of ASCII, or not to be written. Else None."""
    chosen = _rays_folder()
    place = chosen if chosen.exists() else chosen.parent
    fits = str(chosen).isascii() and len(str(chosen)) <= _LONGEST_FOLDER
    if fits and os.access(place, os.W_OK | os.X_OK):
        return None
    for short in _SHORT:
        with suppress(OSError):
            return Path(tempfile.mkdtemp(prefix="ray-", dir=short))
    raise UserError(
        f"Ray's sockets need a folder with an ASCII path of at most {_LONGEST_FOLDER} bytes that "
        f"can be written; {chosen} and {', '.join(_SHORT)} are none; set RAY_TMPDIR to one"
    )


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with suppress(OSError, ValueError), socket.create_connection((host, int(port)), timeout=5):
        return True
    return False


def _own_token() -> None:
    """A Ray of our own is guarded by a token that dies with it. Without one at hand, Ray would
    leave one in ~/.ray, and every later `ray start` would refuse clients without RAY_AUTH_MODE."""
    saved = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if "RAY_AUTH_MODE" not in os.environ and not saved.exists():
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    # It would warn that this Ray asks for a token; nobody but us needs to know.
    setup = "ray._private.authentication.authentication_token_setup"
    logging.getLogger(setup).setLevel(logging.ERROR)


def _for_own_ray(folder: Path | None) -> dict[str, str]:
    """Environment for a Ray of our own, which is this host: its processes see this checkout, and
    gloo needs no network. No runtime environment, and no second set of workers for Ray's first
    driver: that saves seconds before the first task (benchmarks/LOG.md).
    folder: as `_own_folder` gives it."""
    paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    found = {"PYTHONPATH": os.pathsep.join(paths), "RAY_prestart_worker_first_driver": "0"}
    if len(os.fsencode(os.environ.get("TMPDIR", ""))) > _LONGEST_TMPDIR:
        # Python makes sockets of its own there, for the servers of Ray's web page.
        found["TMPDIR"] = str(folder or _rays_folder().parent)
    return found | _gloo_on("127.0.0.1")


def _for_workers() -> dict[str, Any]:
    """The packages, except in a job with a working directory, which brings them; and what a worker
    does first, except where the job says so itself, since Ray takes only one."""
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}").get("runtime_env") or {}
    settings: dict[str, Any] = {}
    if "working_dir" not in job:
        settings["py_modules"] = [str(_ROOT / name) for name in _PACKAGES]
    if "worker_process_setup_hook" not in job:
        settings["worker_process_setup_hook"] = _HOOK
    return settings


def know_the_cluster() -> None:
    """In each worker before its work: lets gloo listen on the interface by which the cluster knows
    this node, unless $GLOO_SOCKET_IFNAME says which. By itself gloo takes the address of the host's
    name: 127.0.1.1 on a plain Debian, which ranks on other hosts cannot reach. NCCL needs no help.

    Ray's own helpers look for their cluster by its address, and find too many where another Ray
    runs on the host: the one that frees the places of a dead training would end in a traceback.
    """
    os.environ.update(_gloo_on(ray.util.get_node_ip_address()))
    os.environ.setdefault("RAY_ADDRESS", ray.get_runtime_context().gcs_address)


def _gloo_on(address: str) -> dict[str, str]:
    """The interface that has the address, where there is one and none was chosen before."""
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return {}
    for interface, addresses in psutil.net_if_addrs().items():
        if address in (each.address.partition("%")[0] for each in addresses):
            return {"GLOO_SOCKET_IFNAME": interface}
    return {}
