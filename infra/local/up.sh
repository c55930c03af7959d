#!/usr/bin/env bash
# A cluster on this one machine, made of the real parts: Ray nodes, an S3 server with credentials
# (SeaweedFS), MLflow on PostgreSQL. For trying and for tests: down.sh ends it and deletes its data.
#
#   infra/local/up.sh [--dir DIR] [--nodes 2] [--cpus 1] [--same-network]
#   . DIR/env                        addresses and keys for this shell; DIR is /tmp/alexnet-local
#   ray job submit --working-dir . -- python -m pipelines build --raw s3://alexnet/raw ...
#   infra/local/on.sh DIR head COMMAND      as if logged in on the node `head`
#   infra/local/down.sh DIR
#
# As root, with iproute2, each node is a machine of its own to its programs: an address of its own
# (network namespace, veth, bridge 10.77.N.1/24), a host name, a disk for Ray and $ALEXNET_HOME, and
# nothing of it can be reached from outside of this host. Otherwise, and with --same-network, the
# nodes share this host's address; Ray then listens for the whole network, guarded by its token.
#
# Exit codes: 0 up; 1 something did not start, and nothing is left of it; 2 wrong usage;
# 69 this host lacks a program, which the one line on stderr names.
# shellcheck disable=SC1091,SC2154  # what is sourced sets the rest
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/processes.sh"
. "$here/network.sh"
. "$here/servers.sh"

refuse() { # refuse CODE TEXT…
    echo "error: ${*:2}" >&2
    exit "$1"
}

parse() {
    dir=/tmp/alexnet-local nodes=2 cpus=1 kind=namespaces
    while [ $# -gt 0 ]; do
        case $1 in
            --same-network) kind=host ;;
            --dir | --nodes | --cpus)
                [ $# -ge 2 ] || refuse 2 "$1 needs a value; see the head of infra/local/up.sh"
                printf -v "${1#--}" %s "$2"
                shift
                ;;
            *) refuse 2 "$1 is no option; see the head of infra/local/up.sh" ;;
        esac
        shift
    done
    [[ $nodes =~ ^[1-9]$ ]] || refuse 2 "--nodes $nodes: pass 1 to 9"
    [[ $cpus =~ ^[1-9][0-9]*$ ]] || refuse 2 "--cpus $cpus: pass 1 or more"
    [[ $dir =~ ^/[A-Za-z0-9._/-]+$ ]] || refuse 2 "--dir $dir: pass an absolute plain path"
    # The path of a Unix socket has at most 107 bytes, and Ray's session takes 75 of them.
    [ ${#dir} -le 28 ] || refuse 2 "--dir $dir has ${#dir} characters; pass one of at most 28"
    [ ! -e "$dir" ] || refuse 2 "$dir is there already; end it with infra/local/down.sh $dir"
}

check_programs() {
    local program
    for program in ray mlflow python weed curl setsid; do
        command -v "$program" >/dev/null ||
            refuse 69 "no program $program in the PATH; see infra/local/up.sh for what it starts"
    done
    python -c 'import psycopg2' 2>/dev/null ||
        refuse 69 "this Python has no psycopg2, MLflow's way to PostgreSQL; pip install it"
    find_postgres || refuse 69 "no PostgreSQL server here (initdb, postgres); install one"
    if [ "$kind" = namespaces ] && ! can_isolate; then
        kind=host
        echo "no network namespaces (they need root and iproute2): all nodes share one address"
    fi
}

write_secrets() {
    secret() { head -c 24 /dev/urandom | od -An -tx1 | tr -d ' \n'; }
    local key access pair
    install -d -m 700 "$dir/secrets"
    secret >"$dir/secrets/ray_token"
    printf '*:*:*:mlflow:%s\n' "$(secret)" >"$dir/secrets/pgpass"
    secret >"$dir/secrets/mlflow_password"
    printf 'user = "alexnet:%s"\n' "$(<"$dir/secrets/mlflow_password")" >"$dir/secrets/login.curl"
    # Two identities: nodes and users have the bucket `alexnet`, MLflow's server has `mlflow`.
    for key in alexnet mlflow; do
        access=$(secret | head -c 20) pair=$(secret)
        cat >"$dir/secrets/$key.env" <<END
AWS_ACCESS_KEY_ID=$access
AWS_SECRET_ACCESS_KEY=$pair
AWS_DEFAULT_REGION=us-east-1
AWS_ENDPOINT_URL=http://$server_address:$s3_port
END
        printf 'user = "%s:%s"\naws-sigv4 = "aws:amz:us-east-1:s3"\n' "$access" "$pair" \
            >"$dir/secrets/$key.curl"
        printf '{"name": "%s", "credentials": [{"accessKey": "%s", "secretKey": "%s"}],
 "actions": ["Read:%s", "Write:%s", "List:%s", "Tagging:%s"]}\n' \
            "$key" "$access" "$pair" "$key" "$key" "$key" "$key" >"$dir/secrets/$key.identity"
    done
    (
        cd "$dir/secrets"
        printf '{"identities": [%s, %s]}\n' "$(<alexnet.identity)" "$(<mlflow.identity)" >s3.json
        rm alexnet.identity mlflow.identity
        cat >>alexnet.env <<END
MLFLOW_TRACKING_URI=http://$server_address:$mlflow_port
MLFLOW_TRACKING_USERNAME=alexnet
MLFLOW_TRACKING_PASSWORD=$(<mlflow_password)
RAY_AUTH_MODE=token
RAY_AUTH_TOKEN_PATH=$dir/secrets/ray_token
END
    )
}

write_env() {
    {
        echo "# To be sourced: $here/up.sh has written it, down.sh deletes it. Holds secrets."
        echo "unset RAY_ADDRESS AWS_PROFILE AWS_SESSION_TOKEN"
        sed 's/^/export /' "$dir/secrets/alexnet.env"
        echo "export RAY_API_SERVER_ADDRESS=http://$head_address:$dashboard_port"
        echo "export RAY_GCS=$(gcs_address)  # for --address, on a node"
    } >"$dir/env.new"
    mv "$dir/env.new" "$dir/env"
}

finished() {
    local code=$?
    [ -e "$dir/env" ] || bash "$here/down.sh" "$dir" || true
    exit "$code"
}

parse "$@"
check_programs
umask 077
mkdir -p "$dir"/{logs,nodes,pids,node}
trap finished EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
# PostgreSQL's server, which refuses root, has to reach its folder.
chmod 711 "$dir"
claim_network
write_secrets
start_postgres
start_store
bash "$here/node.sh" "$dir" head
create_buckets
start_mlflow
for _ in $(seq "$nodes"); do bash "$here/node.sh" "$dir" "$cpus"; done
wait_for_mlflow
wait_for_jobs
write_env
cat <<END
$nodes nodes of $cpus CPU(s) and a head are up in $dir
Ray's dashboard and jobs  http://$head_address:$dashboard_port (asks for the token)
MLflow                    http://$server_address:$mlflow_port (user and password are in the file below)
S3                        http://$server_address:$s3_port with the bucket s3://alexnet
next: . $dir/env          end it with: $here/down.sh $dir
END
