#!/usr/bin/env bash
# Runs a command on a node of up.sh's cluster as if logged in there: its address, host name, disk.
#
#   infra/local/on.sh DIR NODE COMMAND…      NODE: head, worker-1, …
# shellcheck disable=SC1091,SC2154  # what is sourced sets the rest
set -euo pipefail
[ $# -ge 3 ] || { echo "usage: $0 DIR NODE COMMAND…" >&2; exit 2; }
pid=$(cat "$1/pids/$2" 2>/dev/null) || { echo "error: $1 has no node $2" >&2; exit 2; }
. "$1/network"
shift 2
[ "$kind" = namespaces ] || exec "$@"
exec nsenter --target "$pid" --net --mount --uts --wd="$PWD" -- "$@"
