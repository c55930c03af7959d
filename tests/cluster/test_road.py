"""The whole road on two nodes: archives on S3, shards, a trained and promoted model, an answer."""

import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import boto3
import pytest
from drawn import ROOT
from machines import Machines
from made import contents
from mlflow.tracking import MlflowClient
from road import OUT, RUNS, STEPS, TRAIN, Job, alone, learned, off_cluster, ok, run_named

from pipelines import shards, storage

pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("as_user")]

Show = Callable[[str], None]


def test_a_job_builds_on_both_nodes_to_the_s3_server(
    cluster: Machines, built: Job, show: Show
) -> None:
    made = [row for row in cluster.states("tasks", built.name) if "_task" in row["name"]]
    manifest = shards.load_manifest(OUT)
    finished = {row["task_id"] for row in made if row["state"] == "FINISHED"}
    assert len(finished) == len(manifest.shards) == 41
    assert len({row["node_id"] for row in made}) == 2, "one node did everything"
    there = dict(storage.list_files(OUT))
    assert {shard.name: there[f"{shard.name}.tar"] for shard in manifest.shards} == {
        shard.name: shard.num_bytes for shard in manifest.shards
    }
    show(f"build: shards made: {cluster.by_node(made)}")
    show(f"S3 server {cluster.env['AWS_ENDPOINT_URL']}: {len(there)} objects under {OUT}")


def test_the_set_is_the_one_that_is_built_without_a_cluster(built: Job, built_here: Path) -> None:
    assert shards.load_manifest(OUT).digest == shards.load_manifest(str(built_here)).digest
    assert contents(OUT) == contents(str(built_here))


def test_a_job_trains_on_two_nodes_with_checkpoints_on_the_s3_server(
    cluster: Machines, trained: Job, show: Show
) -> None:
    workers = [
        row for row in cluster.states("actors", trained.name) if "TrainWorker" in row["class_name"]
    ]
    assert len(workers) == 2 and len({row["node_id"] for row in workers}) == 2
    # Nodes of one address pass on each other's lines: the same one comes several times.
    line = r"\(ip=([\d.]+), pid=(\d+)\) world_rank=(\d), local_rank=(\d)"
    told = set(re.findall(line, trained.said))
    assert sorted(rank for _, _, rank, _ in told) == ["0", "1"]
    if cluster.setting("kind") == "namespaces":
        assert len({ip for ip, _, _, _ in told}) == 2, "one address"
        assert {rank for _, _, _, rank in told} == {"0"}, "both ranks on one node"
    there = [name for name, _ in storage.list_files(f"{RUNS}/first")]
    assert any(name.endswith("model.safetensors") for name in there), there
    show(f"training: workers: {cluster.by_node(workers)}")
    show(f"S3 server: {len(there)} objects under {RUNS}/first")


def test_run_and_version_are_rows_in_postgresql_and_files_on_the_s3_server(
    cluster: Machines, trained: Job, show: Show
) -> None:
    with cluster.database() as database, database.cursor() as rows:
        rows.execute("select run_uuid, status from runs where name = 'first'")
        ((run_id, status),) = rows.fetchall()
        assert status == "FINISHED"
        rows.execute(
            "select count(*) from metrics where run_uuid = %s and key = 'train/loss'", [run_id]
        )
        assert rows.fetchone() == (STEPS,)
        rows.execute("select name, version, run_id from model_versions")
        assert rows.fetchall() == [("alexnet", 1, run_id)]
        for table in ("runs", "params", "metrics", "model_versions"):
            rows.execute(f"select count(*) from {table}")
            show(f"PostgreSQL: {rows.fetchone()[0]} rows in {table}")
    database.close()
    lines = (cluster.folder / "secrets" / "mlflow.env").read_text().split()
    own = dict(line.split("=", 1) for line in lines)
    client = boto3.session.Session().client(
        "s3",
        aws_access_key_id=own["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=own["AWS_SECRET_ACCESS_KEY"],
    )
    keys = [item["Key"] for item in client.list_objects_v2(Bucket="mlflow")["Contents"]]
    assert any(run_id in key for key in keys), keys
    show(f"S3 server: {len(keys)} objects of MLflow")
    assert any("/models/" in key and key.endswith(".safetensors") for key in keys), keys


def test_the_candidate_is_promoted_and_names_a_image(
    cluster: Machines, trained: Job, raw: Path, tmp_path: Path
) -> None:
    # What so few images teach depends on the processor; the road is the claim here.
    policy = tmp_path / "policy.toml"
    shipped = (ROOT / "training" / "registry" / "policy.toml").read_text()
    policy.write_text(shipped.replace("above_chance = 0.8", "above_chance = 0.25"))
    promote = ["python", "-m", "training.registry", "promote", "--policy", str(policy)]
    assert "is the champion: models:/alexnet@champion" in ok(cluster.run(*promote))
    client = MlflowClient(tracking_uri=cluster.env["MLFLOW_TRACKING_URI"])
    champion = client.get_model_version_by_alias("alexnet", "champion")
    assert champion.run_id == run_named("first", cluster.env["MLFLOW_TRACKING_URI"]).info.run_id

    with tarfile.open(raw / "ILSVRC2012_img_val.tar") as tar:
        member = tar.extractfile("ILSVRC2012_val_00000001.JPEG")
        assert member is not None
        image = tmp_path / "image.JPEG"
        image.write_bytes(member.read())
    said = ok(cluster.run("python", "-m", "training.predict", str(image), "--top", "4"))
    shares = [float(line.split("%")[0]) for line in said.splitlines() if "%" in line]
    assert len(shares) == 4 and sum(shares) == pytest.approx(100, abs=0.05)


def test_a_training_learns_the_same_without_a_cluster(
    cluster: Machines, trained: Job, built_here: Path
) -> None:
    where = ["--data", str(built_here), "--name", "first", "--register", "False"]
    ok(off_cluster(cluster, *TRAIN, *where))
    here = learned("first", f"sqlite:///{alone(cluster)}/mlflow.db")
    assert here == learned("first", cluster.env["MLFLOW_TRACKING_URI"])
    assert len(here["loss"]) == len(here["sample_digest"]) == STEPS
