"""Where MLflow keeps runs and models: its URI, a home that was moved, and why it cannot be used.

Without MLflow, which is told by the words of its errors.
"""

import contextlib
import errno
import importlib.util
import json
import logging
import os
import re
import shlex
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from alexnet.errors import UserError, reason
from pipelines import storage

logger = logging.getLogger("training")

_UNSET = "unset MLFLOW_TRACKING_URI to use the embedded store"
UNSET_REGISTRY = "unset MLFLOW_REGISTRY_URI to use MLFLOW_TRACKING_URI's"
_DATABASES = ("postgres", "mysql", "mssql", "oracle", "mariadb")
ARTIFACTS = "mlartifacts"  # beside the embedded store's file


def tracking_uri() -> str:
    """$MLFLOW_TRACKING_URI, or the embedded store under $ALEXNET_HOME. A database file stands by
    its absolute path, since Ray's workers change directory.

    Raises UserError for a URI with a password, since run parameters and Ray's dashboard show it,
    and for what is neither a server nor a database file.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI", "").strip()
    if not uri:
        return _of_file(_embedded(), "ALEXNET_HOME", "set it to another folder")
    return _checked(uri, "MLFLOW_TRACKING_URI", _UNSET)


def registry_uri(of_runs: str) -> str:
    """$MLFLOW_REGISTRY_URI, where registered models lie elsewhere than runs; by default with them.
    Raises UserError as `tracking_uri`."""
    uri = os.environ.get("MLFLOW_REGISTRY_URI", "").strip()
    return _checked(uri, "MLFLOW_REGISTRY_URI", UNSET_REGISTRY) if uri else of_runs


def _checked(uri: str, setting: str, unset: str) -> str:
    """setting: the variable that holds it; unset: what to do instead."""
    shown = re.sub(r"//.*@", "//…@", uri).partition("?")[0][:200]  # without secrets
    scheme = uri.partition(":")[0].lower()
    if scheme in ("sqlite", "sqlite+pysqlite"):
        found = re.fullmatch(r"[^:]*:///([^:?].*)", uri)
        if not found:
            raise UserError(
                f"{setting}={shown} names no file; set it to sqlite:///FILE, with four "
                f"slashes for an absolute path, or {unset}"
            )
        return _of_file(Path(found[1]).absolute(), setting, unset)
    if scheme not in ("http", "https"):
        instead = (
            f" (http://HOST:PORT) and no database file (sqlite:///FILE); set it so, or {unset}"
        )
        if scheme.startswith(_DATABASES):
            instead = (
                " but its database, beside which artifacts have no place; start `python -m mlflow "
                f"server --backend-store-uri URI` with it, and set {setting} to http://HOST:PORT"
            )
        raise UserError(f"{setting}={shown} is no MLflow server{instead}")
    _refuse_misspelled(uri, shown, setting)
    return uri


def database_of(uri: str) -> Path | None:
    """The file of a store that is one; None for a server."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def open_database(path: Path) -> None:
    """Raises OSError or sqlite3.Error at once where MLflow would retry for minutes, and UserError
    for another program's database, to which MLflow would add its tables.

    The embedded store is told its place, if its home was moved.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        query = "select name from sqlite_master where type = 'table'"
        tables = {name for (name,) in database.execute(query)}
        if tables and "experiments" not in tables:
            raise UserError(
                f"{path} is a database of another program, with table {min(tables)}; name a file "
                "that is new or MLflow's own in MLFLOW_TRACKING_URI"
            )
        if path == _embedded() and tables:
            _follow(database, path.parent)


def check_writable(uri: str) -> None:
    """Raises OSError or sqlite3.Error where the file of the store cannot be changed now."""
    if (path := database_of(uri)) is not None:
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
            database.execute("begin immediate")
            # Writing the journal, which a full disk or a folder that is read-only prevents.
            database.execute("update alembic_version set version_num = version_num")
            database.execute("rollback")


def command(uri: str, words: str) -> str:
    """A command of MLflow's, to copy, for a store."""
    return f"`MLFLOW_TRACKING_URI={shlex.quote(uri)} python -m mlflow {words}`"


def remedy(uri: str, error: BaseException) -> str:
    """Why MLflow cannot be used, a bracket, and what to do."""
    why = reason(error)
    path = database_of(uri)
    for words, told, do in _of_the_file(uri, path) if path is not None else _of_the_server(uri):
        if re.search(words, f"{getattr(error, 'errno', '')} {why}"):
            return f"{told or why}); {do}"
    if path is not None:
        return f"{why}); look at {path}, or move it away to begin a new one"
    return f"{why}); look at the server's log, or {_UNSET}"


def _embedded() -> Path:
    return storage.home() / "mlflow.db"


def _of_file(path: Path, setting: str, do: str) -> str:
    if found := re.search(r"[?%\n\0]", str(path)):
        raise UserError(
            f"{setting}: {path} holds {found[0]!r}, which a database's URI cannot; {do}"
        )
    return f"sqlite:///{path}"


def _refuse_misspelled(uri: str, shown: str, setting: str) -> None:
    try:
        parts = urlsplit(uri)
        host, secret = parts.hostname, parts.username is not None or parts.password is not None
        parts.port  # noqa: B018 - raises for what is no number
    except ValueError as error:
        raise UserError(f"{setting}={shown}: {error}; set it to http://HOST:PORT") from None
    if secret:
        raise UserError(
            f"{setting} holds a password or a user; take it out and set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD on every node"
        )
    if not host or re.search(r"\s", uri):
        raise UserError(f"{setting}={shown} names no host; set it to http://HOST:PORT")


# Causes: what stands in the error, how it is told (as it stands where None), what to do


def _of_the_file(uri: str, path: Path) -> Sequence[tuple[str, str | None, str]]:
    another = "let MLFLOW_TRACKING_URI name a file that you can write"
    if path == _embedded():
        another = "set ALEXNET_HOME to a folder that you can write"
    upgrade = f"keep a copy of it, then run `python -m mlflow db upgrade {shlex.quote(uri)}`"
    move = "move it away to begin a new one, or put a backup in its place"
    denied = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR)
    return [
        ("not a database|malformed", f"{path} is no database, or damaged", move),
        ("locked", None, "another program is at work on it: end that, or try again later"),
        (f"disk is full|^({errno.ENOSPC}|{errno.EDQUOT}) ", None, f"make room at {path.parent}"),
        ("readonly|read-only|unable to open", None, another),
        (f"^({'|'.join(map(str, denied))}) ", None, another),
        (_revision_here(), "it is of an older MLflow", upgrade),
        (
            "out-of-date database schema",
            "it is of a newer MLflow",
            "install that one or a newer one here, or move the file away",
        ),
    ]


def _revision_here() -> str:
    """Matches the complaint about a schema that this MLflow knows, and so can bring up to date."""
    found = importlib.util.find_spec("mlflow")
    assert found is not None and found.origin is not None
    files = Path(found.origin).parent.glob("store/db_migrations/versions/*.py")
    known = "|".join(re.escape(path.name.partition("_")[0]) for path in files)
    return rf"out-of-date database schema \(found version ({known or '$^'}|None),"


def _of_the_server(uri: str) -> Sequence[tuple[str, str | None, str]]:
    host = urlsplit(uri).hostname
    login = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
    other = f"what answers there is no MLflow: set MLFLOW_TRACKING_URI to its server, or {_UNSET}"
    away = f"start the server, or {_UNSET}"
    authority = "MLFLOW_TRACKING_SERVER_CERT_PATH to its authority's certificate"
    return [
        ("Invalid Host header", None, "start the server with --allowed-hosts and this host's name"),
        ("code 401", "401", f"set {login} on every node"),
        ("code 403", "403", f"give the user of {login} the right to write, or set another one"),
        ("ProxyError|code 407", "the proxy fails", f"set NO_PROXY={host}, or mend HTTPS_PROXY"),
        ("CERTIFICATE_VERIFY", "its certificate is not trusted", f"set {authority}"),
        ("SSLError", "it speaks no TLS", "let MLFLOW_TRACKING_URI begin with http://"),
        ("NameResolution", f"no host {host} is known", f"mend the name, or {_UNSET}"),
        ("timed out", "it does not answer in time", away),
        ("many (5..) error", "it answers with an error of its own", "look at the server's log"),
        ("Connection aborted", "it hangs up", f"if it speaks TLS, use https://; else {away}"),
        ("Max retries exceeded", "no connection", away),
        ("code 404|code 405|redirects|not in a valid JSON|Response: {", "no API of MLflow", other),
    ]


# A home that was moved


def _follow(database: sqlite3.Connection, home: Path) -> None:
    """MLflow notes absolute paths. Where those of the embedded store lead to another folder than
    its own, as after `mv ~/.alexnet /other`, they are written anew, all or none.

    Not where they still lead to artifacts and none lie here: then the file alone was copied.
    """
    old = _noted_home(database)
    if old is None or old == home:
        return
    with contextlib.suppress(OSError):  # gone, or another user's home
        alone = (old / ARTIFACTS).exists() and not (home / ARTIFACTS).exists()
        if alone or old.samefile(home):
            return
    database.execute("begin immediate")
    if _noted_home(database) == old:  # nobody was faster
        for before, after in [(old.as_uri(), home.as_uri()), (str(old), str(home))]:
            _rewrite(database, before, after)
        # In the JSON that says where the shards of a run lay.
        sources = [f'"uri": "{json.dumps(str(place))[1:-1]}/' for place in (old, home)]
        database.execute(
            "update datasets set dataset_source = replace(dataset_source, ?, ?)", sources
        )
        logger.info(f"{home} was {old}: the paths in its mlflow.db are written anew")
    database.execute("commit")


def _noted_home(database: sqlite3.Connection) -> Path | None:
    """Of an experiment, as `tracking.connect` made it; None for those of somebody else's making."""
    query = "select artifact_location from experiments"
    for (location,) in database.execute(query):
        if found := re.fullmatch(rf"file://(/.*)/{ARTIFACTS}", location or ""):
            return Path(unquote(found[1]))
    return None


def _rewrite(database: sqlite3.Connection, before: str, after: str) -> None:
    """In every column of text: a value that is the folder, or lies below it."""
    tables = database.execute("select name from sqlite_master where type = 'table'").fetchall()
    for (table,) in tables:
        for _, column, kind, *_ in database.execute(f'pragma table_info("{table}")').fetchall():
            if re.search("CHAR|TEXT", kind.upper()):
                database.execute(
                    f'update "{table}" set "{column}" = ? || substr("{column}", ?) '
                    f'where "{column}" = ? or substr("{column}", 1, ?) = ?',
                    (after, len(before) + 1, before, len(before) + 1, f"{before}/"),
                )
