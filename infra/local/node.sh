#!/usr/bin/env bash
# Starts one more Ray node of a cluster that up.sh made, or its head, and waits until it is there.
#
#   infra/local/node.sh DIR CPUS      the next worker node; prints its name, such as worker-3
#
# Its pid is in DIR/pids/NAME, its log DIR/logs/NAME.log.
# shellcheck disable=SC1091,SC2154  # what is sourced sets the rest
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/processes.sh"
. "$here/network.sh"
[ $# = 2 ] || { echo "usage: $0 DIR CPUS" >&2; exit 2; }
dir=$1
[ -e "$dir/network" ] || { echo "error: $dir holds no cluster of up.sh" >&2; exit 2; }
. "$dir/network"
umask 077

options=(--block --disable-usage-stats --object-store-memory 200000000)
if [ "$2" = head ]; then
    # No CPUs: it holds jobs' drivers and no work, and so the tests may kill every other node.
    name=head number=3
    options+=(--head --port "$gcs_port" --num-cpus 0 --temp-dir "$dir/node/ray")
    options+=(--dashboard-host "$head_address" --dashboard-port "$dashboard_port")
    options+=(--ray-client-server-port "$client_port")
else
    number=1
    until mkdir "$dir/nodes/worker-$number" 2>/dev/null; do number=$((number + 1)); done
    name=worker-$number
    number=$((number + 10))
    options+=(--address "$(gcs_address)" --num-cpus "$2")
fi
if [ "$kind" = namespaces ]; then
    join_network "$name" "$number"
    options+=(--node-ip-address "10.77.$network.$number" --metrics-export-port 8080)
else
    free_ports agent_port
    options+=(--dashboard-agent-listen-port "$agent_port")
fi
inside "$name"
launch "$name" "$dir/secrets/alexnet.env" "${words[@]}" ray start "${options[@]}"
# Started one after the other: two at once on two cores and one of them runs out of time.
wait_for "$name" 120 grep -q "Ray runtime started" "$dir/logs/$name.log"
echo "$name"
