"""What MLflow holds of a run.

The driver owns the run: it opens or finds it, hands its id to rank 0 and closes it.
"""

import contextlib
import getpass
import hashlib
import json
import logging
import os
import re
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import mlflow
from mlflow.entities import (
    Dataset,
    DatasetInput,
    Experiment,
    InputTag,
    Param,
    Run,
    ViewType,
)
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.utils.credentials import get_default_host_creds, read_mlflow_creds
from mlflow.utils.mlflow_tags import (
    MLFLOW_DATASET_CONTEXT,
    MLFLOW_SOURCE_NAME,
    MLFLOW_SOURCE_TYPE,
    MLFLOW_USER,
)
from mlflow.utils.rest_utils import http_request
from sqlalchemy.exc import SQLAlchemyError

from alexnet import DROPOUT, former_network, renamed
from alexnet.errors import UserError, reason
from pipelines.shards import Manifest
from training import store
from training.config import ADDED, TrainConfig, flatten, in_words, science, to_dict
from training.lease import Superseded, job_id
from training.store import tracking_uri as tracking_uri

EXPERIMENT = "alexnet"  # by default
# As which MLflow's pages open the experiment: as model training, not as evaluations of agents. Its
# Python has no constants for them.
_KIND, _TRAINING = "mlflow.experimentKind", "custom_model_development"
STORED = "checkpoint_step"  # tag of a run: that one was stored, and the step of the newest
# Of a server: versions are registered as logged models, which older ones have no place for. It
# would show at the end of the training.
OLDEST_SERVER = (3, 0)
_LONGEST_VALUE = 6000  # characters of a parameter
_ROOT = Path(__file__).resolve().parents[1]
# requests raises OSErrors.
FAILURES = (MlflowException, OSError, SQLAlchemyError, sqlite3.Error)

logger = logging.getLogger("training")


def experiment_name(asked: str | None = None) -> str:
    """As asked for, or $MLFLOW_EXPERIMENT_NAME, or else EXPERIMENT."""
    return asked or os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT


def connect(uri: str, experiment: str | None = None, *, write: bool = False) -> MlflowClient:
    """A client that has reached its store, which has the experiment from then on. Raises UserError
    where there is none to reach or MLflow refuses the name, or, with `write`, the store is a file
    that cannot be changed."""
    limit_patience()
    name = experiment_name(experiment)
    logging.getLogger("mlflow").setLevel(logging.WARNING)  # of each new store it tells its tables
    try:
        if (path := store.database_of(uri)) is not None:
            store.open_database(path)
        else:
            _refuse_old(uri)
        registry = store.registry_uri(uri)
        client = MlflowClient(tracking_uri=uri, registry_uri=registry)
        found = client.get_experiment_by_name(name)
        if write or found is None:
            store.check_writable(uri)
        if found is None:
            _make_experiment(client, name, path)
            found = client.get_experiment_by_name(name)
        if found.name != name:  # JSON, but not of MLflow
            raise MlflowException(f"Response: {{experiment {found.name!r}}}")
        if write:
            _set_kind(client, found)
    except FAILURES as error:
        if getattr(error, "error_code", "") == "INVALID_PARAMETER_VALUE":
            raise UserError(
                f"MLflow takes no experiment {name[:40]!r} ({reason(error)}); choose another "
                "--experiment"
            ) from error
        raise UserError(f"MLflow at {uri} cannot be used ({store.remedy(uri, error)}") from error
    if registry != uri:
        _reach_registry(client, registry, found.artifact_location, write=write)
    mlflow.set_tracking_uri(uri)
    # An empty one is where the runs are, and is not put into the environment.
    mlflow.set_registry_uri(registry if registry != uri else "")
    return client


def _reach_registry(client: MlflowClient, uri: str, artifacts: str, *, write: bool) -> None:
    """Of registered models alone. Raises UserError where it cannot be used, or would refuse, after
    the training, what lies among the artifacts of runs."""
    try:
        if (path := store.database_of(uri)) is not None:
            store.open_database(path)
        else:
            _refuse_old(uri)
        client.search_registered_models(max_results=1)
        if write:
            store.check_writable(uri)
    except FAILURES as error:
        raise UserError(
            f"MLflow's registry at {uri} cannot be used ({reason(error)}); look at its server or "
            f"file, or {store.UNSET_REGISTRY}"
        ) from error
    if write and path is None and artifacts.startswith(("mlflow-artifacts:", "file:", "/")):
        raise UserError(
            f"MLflow's registry at {uri} takes no model from {artifacts[:100]}, where only another "
            "server finds it; start that of the runs with --no-serve-artifacts and "
            f"--default-artifact-root s3://BUCKET/…, or {store.UNSET_REGISTRY}"
        )


def _refuse_old(uri: str) -> None:
    """Raises UserError for a server before OLDEST_SERVER. One that does not tell its version, such
    as a service that only speaks the API, is taken as it is."""
    answer = http_request(get_default_host_creds(uri), "/version", "GET", raise_on_status=False)
    found = re.fullmatch(r"(\d+)\.(\d+)\S*", answer.text.strip())
    if answer.status_code == 200 and found and tuple(map(int, found.groups())) < OLDEST_SERVER:
        wanted = ".".join(map(str, OLDEST_SERVER))
        raise UserError(
            f"MLflow at {uri} is version {found[0]}, this needs {wanted} or newer; upgrade the "
            f"server (this client is {mlflow.__version__}) and run `mlflow db upgrade` first"
        )


def find_run(
    client: MlflowClient, config: TrainConfig, manifest: Manifest, run_id: str = ""
) -> Run | None:
    """The run of this name, to be continued; None where there is none yet. Of several that one
    with `run_id`, or else the newest.

    Raises UserError when the name belongs to a run that learned something else, when the run or
    its experiment was deleted, and for what MLflow does not keep whole.
    """
    _refuse_long(config)
    experiment = client.get_experiment_by_name(experiment_name(config.experiment))
    if experiment.lifecycle_stage != "active":
        restore = f"experiments restore --experiment-id {experiment.experiment_id}"
        raise UserError(
            f"MLflow's experiment {experiment.name} was deleted, with its runs; restore it with "
            f"{store.command(client.tracking_uri, restore)}, or choose another --experiment"
        )
    found = client.search_runs(
        [experiment.experiment_id],
        f"attributes.run_name = '{config.name}'",
        run_view_type=ViewType.ALL,
    )
    active = [run for run in found if run.info.lifecycle_stage == "active"]
    if found and not active:
        gone = deleted(client, found[0].info.run_id)
        raise UserError(f"run {config.name} {gone}, or choose another --name")
    active.sort(key=lambda run: run.info.run_id != run_id)
    if active:
        _refuse_other_science(active[0], config, manifest)
    return active[0] if active else None


def variant_tags(config: TrainConfig) -> dict[str, str]:
    """What runs and versions say of their network, for `former_network`."""
    dropout = DROPOUT.get(config.model.variant)
    return {"variant": config.model.variant} | ({"dropout": dropout} if dropout else {})


def deleted(client: MlflowClient, run_id: str) -> str:
    """What to say of a run that was."""
    restore = store.command(client.tracking_uri, f"runs restore --run-id {run_id}")
    return f"was deleted in MLflow; restore it with {restore}"


def run_or_none(client: MlflowClient, run_id: str) -> Run | None:
    """A run, deleted or not; None for one that MLflow does not know."""
    try:
        return client.get_run(run_id) if run_id else None
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def open_run(client: MlflowClient, config: TrainConfig, manifest: Manifest, data: str) -> Run:
    """A new run with config, lineage and data set."""
    name = experiment_name(config.experiment)
    experiment = client.get_experiment_by_name(name).experiment_id
    tags = {
        "recipe": config.recipe,
        **variant_tags(config),
        "manifest_sha256": manifest.digest,
        "plan_id": manifest.plan_id,
        "data": data,
        MLFLOW_USER: user(),
        MLFLOW_SOURCE_NAME: "training/run.py",
        MLFLOW_SOURCE_TYPE: "LOCAL" if job_id() is None else "JOB",
        "mlflow.source.git.commit": _commit(),
        "code_sha256": _code_sha256(),
    }
    run = client.create_run(experiment, run_name=config.name, tags=tags)
    run_id = run.info.run_id
    params = [Param(key, value) for key, value in flatten(config).items()]
    client.log_batch(run_id, params=params)
    client.log_dict(run_id, to_dict(config), "config.json")
    client.log_inputs(run_id, inputs(manifest, data))
    return client.get_run(run_id)


@contextlib.contextmanager
def run_status(client: MlflowClient, run_id: str) -> Iterator[None]:
    """RUNNING inside; FINISHED, KILLED or FAILED afterwards, by the way the block is left; as it is
    where the run is another writer's by then."""
    client.update_run(run_id, status="RUNNING")
    try:
        yield
    except Superseded:  # so is what it says of itself
        raise
    except BaseException as error:
        status = "KILLED" if isinstance(error, KeyboardInterrupt | SystemExit) else "FAILED"
        try:
            client.set_terminated(run_id, status)
        except FAILURES as silence:  # must not hide what ended the run
            logger.warning(f"MLflow still shows the run as RUNNING: {reason(silence)}")
        raise
    client.set_terminated(run_id, "FINISHED")


def limit_patience() -> None:
    """Caps MLflow's own retries, by default minutes for a dead server, and keeps it silent."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # the driver says it
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)  # "Creating … tables"
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # each retry to a server that is down


def _make_experiment(client: MlflowClient, name: str, database: Path | None) -> None:
    """database: the file of a store on this machine; a server decides about artifacts itself."""
    place = None if database is None else (database.parent / store.ARTIFACTS).as_uri()
    try:
        client.create_experiment(name, artifact_location=place, tags={_KIND: _TRAINING})
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another program was faster
            raise


def _set_kind(client: MlflowClient, found: Experiment) -> None:
    """Also of one that has none, or one that MLflow's page has guessed."""
    kind = found.tags.get(_KIND) or "inferred"
    if "inferred" in kind and found.lifecycle_stage == "active":
        client.set_experiment_tag(found.experiment_id, _KIND, _TRAINING)


def _refuse_long(config: TrainConfig) -> None:
    """MLflow would cut the value, and the run would then seem to be of another one."""
    for key, value in flatten(config).items():
        if len(value) > _LONGEST_VALUE:
            flag = key.replace("_", "-")
            raise UserError(
                f"--{flag} {value[:40]}… has {len(value):,} characters, MLflow keeps "
                f"{_LONGEST_VALUE:,}; pass a shorter one"
            )


def _refuse_other_science(run: Run, config: TrainConfig, manifest: Manifest) -> None:
    now = science(config) | {"manifest": manifest.digest[:16]}
    then = {name: in_words(value) for name, value in ADDED.items()} | renamed({**run.data.params})
    then["manifest"] = run.data.tags.get("manifest_sha256", "")[:16]
    if former := former_network(then.get("model.variant"), run.data.tags.get("dropout")):
        raise UserError(
            f"run {config.name} exists and is of {former}; continue it with the release that wrote "
            "it, or choose another --name"
        )
    differs = [f"{key} {then.get(key)} → {now[key]}" for key in now if then.get(key) != now[key]]
    if differs:
        raise UserError(
            f"run {config.name} exists with other settings ({', '.join(differs[:4])}); "
            "continue it with its own, or choose another --name"
        )


def inputs(manifest: Manifest, data: str) -> list[DatasetInput]:
    """The two splits, with what they are for."""
    return [
        DatasetInput(
            Dataset(
                name=f"shards-{manifest.plan_id[:12]}-{split}",
                digest=manifest.digest[:36],  # MLflow's limit; the tag manifest_sha256 has all
                source_type="alexnet-shards",
                source=json.dumps({"uri": data, "manifest_sha256": manifest.digest}),
                profile=json.dumps(
                    {
                        "num_rows": manifest.num_samples(split),
                        "classes": manifest.num_classes,
                        "crop": manifest.crop,
                    }
                ),
            ),
            [InputTag(MLFLOW_DATASET_CONTEXT, context)],
        )
        for split, context in (("train", "training"), ("val", "eval"))
    ]


def user() -> str:
    """Who asks MLflow's server, or this machine's name for them, which a container may not have."""
    try:
        return str(read_mlflow_creds().username or getpass.getuser())
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


def _commit() -> str:
    """The git commit of the code, from $ALEXNET_COMMIT where .git is not at hand, as in a Ray job's
    working directory; else "unknown"."""
    command = ["git", "-C", str(_ROOT), "describe", "--always", "--abbrev=40", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return os.environ.get("ALEXNET_COMMIT") or "unknown"
    return done.stdout.strip()


def _code_sha256() -> str:
    """Identity of the three packages' sources, which is there with and without git."""
    digest = hashlib.sha256()
    for package in ("alexnet", "pipelines", "training"):
        for path in sorted((_ROOT / package).rglob("*.py")):
            digest.update(f"{path.relative_to(_ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()
