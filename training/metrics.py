"""What MLflow holds of a run's figures: how they are named there, sent to it, and read back.

Rank 0 logs through `Tracker`, which never stops the training: what cannot be sent is spooled and
sent later.
"""

import contextlib
import functools
import json
import logging
import socket
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from mlflow.entities import Metric, Run
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.tracking import MlflowClient

from alexnet.errors import UserError, reason
from pipelines import storage
from training.config import TrainConfig, flatten
from training.tracking import FAILURES, experiment_name, limit_patience

# MLflow's pages show metrics in groups, by what stands before the slash. Those of val_NAME and
# data_NAME are val/NAME and data/NAME; releases before this wrote all of them as the log line does.
_GROUPS = {
    "train": "loss top1 top5 grad_norm lr",
    "time": "images_per_second step_images_per_second utilization mfu exposed_communication "
    "eta_seconds",
    "run": "epoch progress sample_digest workers gpu_memory_gb",
}
_GROUP_OF = {name: group for group, names in _GROUPS.items() for name in names.split()}
_PREFIXES = ("val", "data")
_UNSENT = ("seconds", "steps")  # of a log line: the sums that its rates are made of

Row = tuple[str, float, int, int]  # MLflow's name, value, milliseconds since 1970, step

logger = logging.getLogger("training")


def name_in_mlflow(name: str) -> str:
    """Of a metric of the log line: "loss" is "train/loss", "val_top1" is "val/top1"."""
    prefix, _, rest = name.partition("_")
    return f"{prefix}/{rest}" if prefix in _PREFIXES else f"{_GROUP_OF[name]}/{name}"


def metrics_of(run: Run) -> dict[str, float]:
    """The last values by the log line's names; where a run was begun by an earlier release, those
    written since come first."""
    found: dict[str, float] = {}
    for key in sorted(run.data.metrics, key=lambda key: "/" in key):
        group, _, rest = key.rpartition("/")
        found[f"{group}_{rest}" if group in _PREFIXES else rest] = run.data.metrics[key]
    return found


def points(client: MlflowClient, run_id: str, name: str) -> list[Metric]:
    """All values of one metric of the log line, those of earlier releases first."""
    keys = (name, name_in_mlflow(name))
    return [point for key in keys for point in client.get_metric_history(run_id, key)]


def metric_history(client: MlflowClient, run_id: str, name: str) -> list[tuple[int, float]]:
    """(step, value) of one metric in step order; of repeated steps the last value."""
    return sorted({point.step: point.value for point in points(client, run_id, name)}.items())


class Rate(NamedTuple):
    images_per_second: float  # the median of its log lines
    run: str
    on: str  # which hardware


def measured_rate(client: MlflowClient, config: TrainConfig) -> Rate | None:
    """Of the newest run of the experiment with this network, precision and number of workers."""
    experiment = client.get_experiment_by_name(experiment_name(config.experiment))
    flat = flatten(config)
    same = [*(key for key in flat if key.startswith("model.")), "precision", "workers"]
    asked = " and ".join(f"params.`{key}` = '{flat[key]}'" for key in same)
    for run in client.search_runs([experiment.experiment_id], asked, max_results=5):
        rates = [point.value for point in points(client, run.info.run_id, "images_per_second")]
        if rates:
            hardware = run.data.tags.get("hardware", "unknown hardware")
            return Rate(statistics.median(rates), str(run.info.run_name), hardware)
    return None


class Tracker:
    """Metrics of one run from one process, sent by a thread of its own: nobody waits for MLflow but
    who asks it something, or for the end. A process that is killed takes with it what was not sent
    or spooled yet.

    State: what the thread has to do, and what could not be sent.
    """

    def __init__(self, uri: str, run_id: str) -> None:
        limit_patience()
        self._client = MlflowClient(tracking_uri=uri)
        self._run_id = run_id
        self._spool = Spool(spool_of(run_id))
        self._rows = deque[Row]()  # the newest, which the thread has not seen
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mlflow")
        self._fault: BaseException | None = None  # of our own making: a failure is a warning

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Returns at once. Lines that come faster than MLflow answers are sent together."""
        now = round(time.time() * 1000)
        self._rows.extend(
            (name_in_mlflow(name), value, now, step)
            for name, value in metrics.items()
            if name not in _UNSENT
        )
        self._ask(self._send_new)

    def tag(self, name: str, value: str) -> None:
        """Sets a tag of the run; a warning where MLflow does not answer."""
        self._ask(
            self._try,
            f"tag {name} could not be set",
            lambda: self._client.set_tag(self._run_id, name, value),
        )

    def attach(self, folder: Path, name: str) -> None:
        """Keeps a folder's files with the run as `name`, and waits for that; a warning where MLflow
        does not answer."""
        send = functools.partial(self._client.log_artifacts, self._run_id, str(folder), name)
        self._ask(self._try, f"{name} could not be kept with the run", send).result()

    def last_logged(self) -> tuple[int, float] | None:
        """(step, seconds ago) of the newest loss of this run; None for a run without one, or while
        MLflow does not answer. Waits for the answer."""
        newest: tuple[int, float] | None = self._ask(self._last_logged).result()
        return newest

    def wait(self) -> None:
        """Until all that was asked for is done: sent, or kept for later."""
        self._ask(lambda: None).result()

    def finish(self, patience: float = 60.0) -> None:
        """Waits until all is sent. A server that is being started again is waited for, `patience`
        seconds at most; then a warning says where the values stay."""
        self._ask(self._drain, patience).result()
        if self._fault is not None:
            raise self._fault

    def _ask(self, do: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Of the thread, which does one thing after the other. Raises what it met that was no
        failure of MLflow's."""
        if self._fault is not None:
            raise self._fault
        asked = self._thread.submit(do, *arguments)
        asked.add_done_callback(self._note_fault)
        return asked

    def _note_fault(self, done: Future[Any]) -> None:
        self._fault = self._fault or done.exception()

    # In the thread

    def _send_new(self) -> None:
        if self._rows:  # not sent with those of an earlier line
            self._send()

    def _send(self) -> None:
        """Sends, or keeps for later; two tries of ten seconds at most."""
        pending = self._spool.rows()
        while self._rows:
            pending.append(self._rows.popleft())
        try:
            for first in range(0, len(pending), 1000):  # MLflow's limit for one request
                batch = [Metric(*row) for row in pending[first : first + 1000]]
                self._client.log_batch(self._run_id, metrics=batch)
        except FAILURES as error:
            where = self._spool.keep(pending)
            why = reason(error)
            logger.warning(f"MLflow does not answer ({why}); {len(pending)} values wait {where}")
        else:
            self._spool.clear()

    def _drain(self, patience: float) -> None:
        deadline = time.monotonic() + patience
        while self._spool.rows():
            self._send()
            left = len(self._spool.rows())
            if left and time.monotonic() > deadline:
                logger.warning(
                    f"{left} values have not reached MLflow; they stay in {self._spool.path} on "
                    "this machine, and the same command sends them from there"
                )
                return
            time.sleep(2 if left else 0)

    def _last_logged(self) -> tuple[int, float] | None:
        keys = ("loss", name_in_mlflow("loss"))
        spooled = [(step, at) for key, _, at, step in self._spool.rows() if key in keys]
        try:
            history = points(self._client, self._run_id, "loss")
        except FAILURES:
            history = []
        found = spooled + [(metric.step, metric.timestamp) for metric in history]
        if not found:
            return None
        step, at = max(found, key=lambda point: point[1])
        return step, max(0.0, time.time() - at / 1000)

    def _try(self, failed: str, send: Callable[[], object]) -> None:
        try:
            send()
        except FAILURES as error:
            logger.warning(f"{failed}: {reason(error)}")


def spool_of(run_id: str) -> Path:
    """The file on this machine in which a run's values wait."""
    return storage.home() / "spool" / f"{run_id}.jsonl"


@contextlib.contextmanager
def system_metrics(uri: str, run_id: str) -> Iterator[None]:
    """Inside, a thread logs how busy this node is, as system/HOST/…: by MLflow's own monitor, but
    for its loop, which ends for good when MLflow does not answer once. What cannot be sent is sent
    with the next values."""
    # Of parts of a GPU, which have no figures, and of nodes without one.
    logging.getLogger("mlflow.system_metrics").setLevel(logging.ERROR)
    ended = threading.Event()

    def watch() -> None:
        monitor = SystemMetricsMonitor(
            run_id, resume_logging=True, node_id=socket.gethostname(), tracking_uri=uri
        )
        over = False
        while not over:
            over = ended.wait(monitor.sampling_interval)
            monitor.collect_metrics()
            with contextlib.suppress(*FAILURES):  # of which the tracker warns
                monitor.publish_metrics(monitor.aggregate_metrics())
                if over:
                    monitor.mlflow_logger.flush()  # what it put by, to spare a slow MLflow

    thread = threading.Thread(target=watch, name="system-metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class Spool:
    """Metric values that wait until MLflow answers: in a file, or in memory while that cannot be.
    State: the file, and the rows that it could not take."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._unwritten: list[Row] = []  # with what the file holds

    def rows(self) -> list[Row]:
        """All that wait, oldest first."""
        rows = list(self._unwritten)
        try:
            for line in [] if rows else self.path.read_text().splitlines():
                key, value, at, step = json.loads(line)
                rows.append((str(key), float(value), int(at), int(step)))
        except FileNotFoundError:
            pass
        except (OSError, TypeError, ValueError) as error:
            logger.warning(f"values that wait in {self.path} are lost from here on: {error}")
        return rows

    def keep(self, rows: Sequence[Row]) -> str:
        """Keeps `rows` alone, and says where. A full or broken disk is no reason to end a run."""
        text = "".join(json.dumps(row) + "\n" for row in rows)
        try:
            storage.write(str(self.path), text.encode())
        except UserError as error:
            self._unwritten = list(rows)
            return f"in memory ({error})"
        self._unwritten = []
        return "on disk"

    def clear(self) -> None:
        self._unwritten = []
        with contextlib.suppress(OSError):  # sent again, they are the same values
            self.path.unlink(missing_ok=True)
