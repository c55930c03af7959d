#!/usr/bin/env bash
# Runs a command on a node of up.sh's cluster as if logged in there: its address, host name, disk.
#
#   infra/local/on.sh DIR NODE COMMAND…      NODE: head, worker-1, …
# shellcheck disable=SC1091,SC2154  # what is sourced sets the rest
set -euo pipefail
[ $# -ge 3 ] || { echo "usage: $0 DIR NODE COMMAND…" >&2; exit 2; }
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/processes.sh"
dir=$1
pid=$(cat "$dir/pids/$2" 2>/dev/null) || { echo "error: $dir has no node $2" >&2; exit 2; }
. "$dir/network"
shift 2
[ "$kind" = namespaces ] || exec "$@"
child=()
find_children
# The recorded process is outside of the namespace of processes that it made.
read -r inner _ <<<"${child[$pid]:?has ended}"
exec nsenter --target "$inner" --net --mount --uts --pid --wd="$PWD" -- "$@"
