# shellcheck shell=bash disable=SC2034,SC2154
# Sourced by up.sh: PostgreSQL, SeaweedFS and MLflow, each ready when it has done what it is for.

find_postgres() {
    local newest
    newest=$(printf '%s\n' /usr/lib/postgresql/*/bin | sort -V | tail -n 1)
    [ -d "$newest" ] || newest=$(dirname "$(command -v initdb)" 2>/dev/null) || return 1
    postgres_bin=$newest
    [ -x "$postgres_bin/initdb" ] && [ -x "$postgres_bin/postgres" ] && command -v psql >/dev/null
}

start_postgres() { # listens on a Unix socket in its folder alone
    local home=$dir/postgres user=() owner
    owner=$(id -un)
    if [ "$(id -u)" = 0 ]; then # which the server refuses to run as
        owner=nobody
        ! id postgres >/dev/null 2>&1 || owner=postgres
        user=(setpriv --reuid="$owner" --regid="$(id -g "$owner")" --clear-groups)
    fi
    install -d -m 700 -o "$owner" "$home"
    cut -d: -f5 "$dir/secrets/pgpass" >"$home/password"
    chown "$owner" "$home/password"
    (cd / && env -i PATH="$PATH" LANG=C.UTF-8 "$(mark)" "${user[@]}" "$postgres_bin/initdb" \
        -D "$home/data" -A scram-sha-256 -U mlflow --pwfile="$home/password" --no-sync \
        >"$dir/logs/initdb.log" 2>&1) || { cat "$dir/logs/initdb.log" >&2; return 1; }
    rm "$home/password"
    # -F: what a power cut would lose is deleted by down.sh anyway.
    launch postgres "" "${user[@]}" "$postgres_bin/postgres" -D "$home/data" -k "$home" -F \
        -c listen_addresses=
    wait_for postgres 60 query postgres 'select 1'
    query postgres 'create database mlflow' >/dev/null
}

query() { # query DATABASE STATEMENT
    PGPASSFILE=$dir/secrets/pgpass psql -h "$dir/postgres" -U mlflow -d "$1" -Atqc "$2"
}

start_store() {
    local home=$dir/store words
    mkdir "$home"
    inside servers
    launch store "" "${words[@]}" weed -logtostderr=true server -dir="$home" \
        -ip="$server_address" -ip.bind="$server_address" -master.telemetry=false \
        -master.port="$master_port" -master.volumeSizeLimitMB=512 \
        -volume.port="$volume_port" -volume.max=50 -volume.preStopSeconds=0 \
        -filer=true -filer.port="$filer_port" -filer.localSocket="$home/filer.sock" \
        -s3=true -s3.port="$s3_port" -s3.port.grpc="$s3_grpc_port" -s3.config="$dir/secrets/s3.json" \
        -s3.localSocket="$home/s3.sock" -s3.autoCreateBucket=false \
        -s3.port.iceberg=0 -s3.port.lance=0
}

create_buckets() {
    local key
    for key in alexnet mlflow; do
        wait_for store 120 create_bucket "$key"
        wait_for store 120 store_and_read "$key"
    done
}

create_bucket() { # as the store's operator: neither identity may
    weed shell -master="$server_address:$master_port" <<<"s3.bucket.create -name $1"
}

store_and_read() { # store_and_read BUCKET: it answers long before it can do that
    s3 "$1" ready --request PUT --data-binary ready &&
        [ "$(s3 "$1" "")" = ready ] && s3 "$1" "" --request DELETE
}

s3() { # s3 BUCKET BODY [OPTION…]: a signed request; curl before 8 leaves the body's hash to us
    local hash
    hash=$(printf %s "$2" | sha256sum)
    curl --silent --fail --noproxy '*' --max-time 10 -K "$dir/secrets/$1.curl" \
        --header "x-amz-content-sha256: ${hash%% *}" "${@:3}" \
        "http://$server_address:$s3_port/$1/probe"
}

start_mlflow() {
    local words database="postgresql+psycopg2://mlflow@/mlflow?host=$dir/postgres"
    cat >"$dir/mlflow-login.ini" <<END
[mlflow]
database_uri = $database
default_permission = READ
auth_cache_ttl_seconds = 60
END
    {
        cat "$dir/secrets/mlflow.env"
        # No password in it: libpq finds it in the file.
        echo "MLFLOW_BACKEND_STORE_URI='$database'"
        echo "PGPASSFILE=$dir/secrets/pgpass"
        echo "MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false" # spares about 1 GB of memory
        echo "MLFLOW_DISABLE_TELEMETRY=true"
        echo "MLFLOW_AUTH_CONFIG_PATH=$dir/mlflow-login.ini"
        echo "MLFLOW_AUTH_ADMIN_USERNAME=alexnet"
        echo "MLFLOW_AUTH_ADMIN_PASSWORD=$(<"$dir/secrets/mlflow_password")"
        echo "MLFLOW_FLASK_SERVER_SECRET_KEY=$(head -c 24 /dev/urandom | od -An -tx1 | tr -d ' \n')"
    } >"$dir/secrets/server.env"
    inside servers
    launch mlflow "$dir/secrets/server.env" "${words[@]}" mlflow server --host "$server_address" \
        --port "$mlflow_port" --workers 1 --app-name basic-auth --artifacts-destination s3://mlflow/artifacts \
        --allowed-hosts "$server_address:$mlflow_port"
}

wait_for_mlflow() { # until it has read its database and stored a file through the proxy
    wait_for mlflow 180 mlflow_answers
}

mlflow_answers() {
    local api=http://$server_address:$mlflow_port/api/2.0 request
    request=(curl --silent --fail --noproxy '*' --max-time 20 -K "$dir/secrets/login.curl")
    "${request[@]}" "$api/mlflow/experiments/get?experiment_id=0" &&
        "${request[@]}" --request PUT --data-binary ready "$api/mlflow-artifacts/artifacts/probe" &&
        [ "$("${request[@]}" "$api/mlflow-artifacts/artifacts/probe")" = ready ] &&
        "${request[@]}" --request DELETE "$api/mlflow-artifacts/artifacts/probe"
}

wait_for_jobs() { # the dashboard lists jobs before the agent that starts them is there
    local job
    wait_for head 120 submit true
    job=$(submit true | grep -o 'raysubmit_[A-Za-z0-9]*' | head -n 1)
    wait_for head 120 job_succeeded "$job"
}

submit() { ray_api jobs/ --data "{\"entrypoint\": \"$1\"}"; }

job_succeeded() { ray_api "jobs/$1" | grep -q '"status": *"SUCCEEDED"'; }

ray_api() { # ray_api PATH [OPTION…]; the token is no argument, since those are public
    printf 'header = "Authorization: Bearer %s"\n' "$(<"$dir/secrets/ray_token")" |
        curl --silent --fail --noproxy '*' --max-time 20 -K - "${@:2}" \
            "http://$head_address:$dashboard_port/api/$1"
}
