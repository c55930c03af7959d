# shellcheck shell=bash disable=SC2034,SC2154
# Sourced by the scripts beside it: where the nodes are, in network namespaces or on this host.
# Expects dir; for claim_network also kind. $dir/network keeps what was chosen.

can_isolate() {
    [ "$(id -u)" = 0 ] && command -v ip nsenter unshare >/dev/null || return 1
    local probe=alexnet-probe-$$
    ip netns add "$probe" 2>/dev/null || return 1
    ip netns del "$probe"
}

claim_network() { # an address range, or free ports, that no other cluster here has
    network=0
    if [ "$kind" = namespaces ]; then
        # Adding a namespace succeeds for one only.
        until [ -z "$(ip route show "10.77.$network.0/24")" ] &&
            ip netns add "alexnet-$network-servers" 2>/dev/null; do
            network=$((network + 1))
            [ $network -lt 256 ] || { echo "error: 10.77.0.0/16 is all taken" >&2; return 1; }
        done
        server_address=10.77.$network.2 head_address=10.77.$network.3
        gcs_port=6379 dashboard_port=8265 client_port=10001 mlflow_port=5000 s3_port=8333
    else
        server_address=127.0.0.1 head_address=127.0.0.1
        free_ports gcs_port dashboard_port client_port mlflow_port s3_port
    fi
    # SeaweedFS leaves sockets in /tmp that are named by these.
    free_ports master_port volume_port filer_port s3_grpc_port
    local name
    for name in kind network server_address head_address cpus {gcs,dashboard,client,mlflow,s3}_port \
        {master,volume,filer,s3_grpc}_port; do
        echo "$name=${!name}"
    done >"$dir/network"
    if [ "$kind" = namespaces ]; then
        make_bridge
        join_network servers 2
    fi
}

make_bridge() {
    ip link add "alexnet-$network" type bridge
    ip addr add "10.77.$network.1/24" dev "alexnet-$network"
    ip link set "alexnet-$network" up
}

join_network() { # join_network NAME LAST_NUMBER_OF_ITS_ADDRESS
    local space=alexnet-$network-$1 cable=ax$network-$2
    [ "$1" = servers ] || ip netns add "$space"
    ip link add "$cable" type veth peer name eth0 netns "$space"
    ip link set "$cable" master "alexnet-$network" up
    ip -n "$space" link set lo up
    ip -n "$space" addr add "10.77.$network.$2/24" dev eth0
    ip -n "$space" link set eth0 up
    mkdir -p "$dir/nodes/$1"
    hosts "$1" >"$dir/nodes/$1/hosts"
    chmod 644 "$dir/nodes/$1/hosts"
}

hosts() { # as Debian writes it: the name of a host leads to its loopback address
    local number
    printf '127.0.0.1 localhost\n127.0.1.1 %s\n' "$1"
    printf '10.77.%s.%s %s\n' "$network" 2 servers "$network" 3 head
    for number in 1 2 3 4 5 6 7 8 9; do echo "10.77.$network.$((number + 10)) worker-$number"; done
}

inside() { # inside NAME: the words in front of a command that is to run on that new machine
    words=()
    [ "$kind" = namespaces ] || return 0
    # Its folder becomes its disk. Its processes are its own: all of them end with `unshare`.
    # shellcheck disable=SC2016  # expanded over there
    words=(ip netns exec "alexnet-$network-$1"
        unshare --uts --pid --fork --kill-child --mount-proc bash -c
        'hostname "$1"
         mount --bind "$2/nodes/$1" "$2/node"
         mount --bind "$2/nodes/$1/hosts" /etc/hosts
         mount -t tmpfs -o size=1g tmpfs /dev/shm
         shift 2
         exec "$@"' bash "$1" "$dir")
}

pids_in_namespaces() {
    [ "$kind" = namespaces ] || return 0
    local space
    for space in $(namespaces); do ip netns pids "$space" 2>/dev/null || true; done
}

namespaces() { ip netns list | cut -d' ' -f1 | grep "^alexnet-$network-" || true; }

remove_network() {
    [ "$kind" = namespaces ] || return 0
    local space
    for space in $(namespaces); do ip netns del "$space"; done
    ip link del "alexnet-$network" 2>/dev/null || true
}

free_ports() { # free_ports NAME…: sets each to a port that nobody listens on
    local name port
    for name in "$@"; do
        # Below the kernel's own choice; outside of 10002-19999, which Ray gives to its workers.
        # SeaweedFS adds 10000 for gRPC.
        until port=$((20000 + RANDOM % 2500)) && [[ " ${taken:=} " != *" $port "* ]] &&
            ! (: </dev/tcp/127.0.0.1/$port) 2>/dev/null; do :; done
        taken+=" $port"
        printf -v "$name" %s "$port"
    done
}

gcs_address() { # host:port, on one host with the interface that Ray chose
    if [ "$kind" = namespaces ]; then
        echo "$head_address:$gcs_port"
    else
        cat "$dir/node/ray/ray_current_cluster"
    fi
}
