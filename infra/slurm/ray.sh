# shellcheck shell=bash
# Sourced by the batch scripts beside it: Ray on the nodes of a Slurm job, for as long as that job.

start_ray() { # sets RAY_ADDRESS, once every node has joined; needs `ray` in the PATH
    local first address options log=${ALEXNET_HOME:-$HOME/.alexnet}/slurm/ray-$SLURM_JOB_ID.log
    mkdir -p "${log%/*}"
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    # A job's own port and token: others may have a Ray on the same nodes.
    address=$(python -c 'import ray.util; print(ray.util.get_node_ip_address())')
    RAY_ADDRESS=$address:$((20000 + SLURM_JOB_ID % 10000))
    RAY_AUTH_TOKEN=$(head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n')
    export RAY_AUTH_MODE=token RAY_AUTH_TOKEN RAY_ADDRESS
    options=(--block --disable-usage-stats --num-cpus "${SLURM_CPUS_PER_TASK:-1}"
        --num-gpus "${SLURM_GPUS_ON_NODE:-0}")
    srun --nodes 1 --ntasks 1 --nodelist "$first" ray start --head --include-dashboard false \
        --node-ip-address "$address" --port "${RAY_ADDRESS##*:}" "${options[@]}" >"$log" 2>&1 &
    if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
        srun --nodes $((SLURM_JOB_NUM_NODES - 1)) --ntasks $((SLURM_JOB_NUM_NODES - 1)) --exclude "$first" \
            bash -c 'until ray start --address "$RAY_ADDRESS" "$@"; do sleep 2; done' - "${options[@]}" \
            >>"$log" 2>&1 &
    fi
    python - "$SLURM_JOB_NUM_NODES" 2>>"$log" <<'END' || {
import contextlib, logging, os, sys, time

import ray

for _ in range(60):
    with contextlib.suppress(Exception):
        ray.init(os.environ["RAY_ADDRESS"], logging_level=logging.ERROR, log_to_driver=False)
        if sum(node["Alive"] for node in ray.nodes()) == int(sys.argv[1]):
            sys.exit()
        ray.shutdown()
    time.sleep(2)
sys.exit(1)
END
        echo "error: Ray did not start, see $log" >&2
        exit 1
    }
}

until_the_limit() { # runs a command; warned of the time limit, it ends it and queues the job again
    local code=0 limit='' pid
    "$@" &
    pid=$!
    trap 'limit=1; kill -TERM $pid' USR1
    wait $pid || code=$?
    while kill -0 $pid 2>/dev/null; do
        code=0
        wait $pid || code=$?
    done
    [ -z "$limit" ] || scontrol requeue "$SLURM_JOB_ID"
    exit $code
}
