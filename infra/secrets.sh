#!/usr/bin/env bash
# The secrets of compose.yaml, drawn anew into infra/secrets/, which git and image builds ignore.
# Containers read them as user 1000: where your own uid is another, `sudo chown -R 1000` them.
set -euo pipefail
cd "$(dirname "$0")"
if [ -e secrets ]; then
    echo "infra/secrets is there already; delete it first if its passwords may be lost" >&2
    exit 2
fi
umask 077
mkdir secrets
cd secrets

draw() { head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \n'; }

draw >ray_token
draw >grafana_password
draw >postgres_password
# The driver takes its password from here: on the command line, every process could read it.
printf 'postgres:5432:mlflow:mlflow:%s\n' "$(cat postgres_password)" >pgpass

# MLflow's first user: for its server, and for the clients on Ray's nodes.
password=$(draw)
printf 'MLFLOW_AUTH_ADMIN_USERNAME=alexnet\nMLFLOW_AUTH_ADMIN_PASSWORD=%s\nMLFLOW_FLASK_SERVER_SECRET_KEY=%s\n' \
    "$password" "$(draw)" >mlflow_server
printf '[mlflow]\nmlflow_tracking_username = alexnet\nmlflow_tracking_password = %s\n' \
    "$password" >mlflow_login

# Two identities: jobs cannot touch MLflow's artifacts, nor MLflow the shards and checkpoints.
# `admin` makes the buckets and is mounted nowhere else.
identities=""
for name in admin jobs mlflow; do
    access=$(draw | head -c 20) secret=$(draw)
    printf '[default]\naws_access_key_id = %s\naws_secret_access_key = %s\nregion = us-east-1\n' \
        "$access" "$secret" >"s3_$name"
    case $name in
        admin) actions='"Admin"' ;;
        jobs) actions='"Read:alexnet", "Write:alexnet", "List:alexnet", "Tagging:alexnet"' ;;
        mlflow) actions='"Read:mlflow", "Write:mlflow", "List:mlflow", "Tagging:mlflow"' ;;
    esac
    identities+=$(printf '%s{"name": "%s", "credentials": [{"accessKey": "%s", "secretKey": "%s"}], "actions": [%s]}' \
        "${identities:+, }" "$name" "$access" "$secret" "$actions")
done
printf '{"identities": [%s]}\n' "$identities" >s3_identities
