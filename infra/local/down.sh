#!/usr/bin/env bash
# Ends what up.sh started, half started or not, and deletes it with all its data.
#
#   infra/local/down.sh [DIR]      DIR: /tmp/alexnet-local
#
# Each process by its pid: `ray stop` would end every Ray on this host.
# shellcheck disable=SC1091,SC2154  # what is sourced sets the rest
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/processes.sh"
. "$here/network.sh"
dir=${1:-/tmp/alexnet-local}
[ -d "$dir/pids" ] || { echo "nothing of up.sh in $dir"; exit 0; }
if [ -e "$dir/network" ]; then . "$dir/network"; fi

end_database() { # by request: killed, it would leave its shared memory behind
    local pid
    pid=$(cat "$dir/pids/postgres" 2>/dev/null) || return 0
    # After a restart of the host the number may be somebody else's.
    grep -qsz "^$dir/postgres/data$" "/proc/$pid/cmdline" || return 0
    kill -QUIT "$pid" 2>/dev/null || return 0
    for _ in $(seq 100); do kill -0 "$pid" 2>/dev/null || return 0; sleep 0.1; done
}

end_all() {
    local pids
    for _ in $(seq 100); do
        pids=$(ours)
        [ -n "$pids" ] || return 0
        # shellcheck disable=SC2086  # one word each
        kill -KILL $pids 2>/dev/null || true
        sleep 0.1
    done
    echo "error: still there: $pids" >&2
    return 1
}

end_database
end_all
if [ -e "$dir/network" ]; then
    remove_network
    for port in {master,volume,filer,s3_grpc}_port; do
        rm -f /tmp/seaweedfs-*-{"${!port:-none}","$((${!port:-0} + 10000))"}.sock
    done
fi
rm -rf "$dir"
