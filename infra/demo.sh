#!/usr/bin/env bash
# The whole road on one machine: drawn ImageNet-like archives → shards → a small AlexNet → registry
# → prediction. Everything it writes is under .demo/; it stops the Ray it started, by pid.
set -euo pipefail
cd "$(dirname "$0")/.."

demo="$PWD/.demo"
raw="$demo/raw"
out="$demo/shards"
logs="$demo/logs"
mkdir -p "$logs"
export ALEXNET_HOME="$demo/home" RAY_USAGE_STATS_ENABLED=0 MLFLOW_DISABLE_TELEMETRY=true
unset MLFLOW_TRACKING_URI RAY_ADDRESS PYTHONPATH
# The token lives as long as this script: nobody else on the host can use its Ray.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
# A job's working directory comes without .git: the run takes its commit from here.
ALEXNET_COMMIT=$(git describe --always --abbrev=40 --dirty 2>/dev/null || true)
export ALEXNET_COMMIT
ray_pid="" ray_folder="" ray=(python -m ray.scripts.scripts)

stop_ray() {
    if [ -n "$ray_pid" ] && kill -TERM "$ray_pid" 2>/dev/null; then
        for _ in $(seq 400); do kill -0 "$ray_pid" 2>/dev/null || break; sleep 0.1; done
        kill -KILL -- "-$ray_pid" 2>/dev/null || true
    fi
    [ -z "$ray_folder" ] || rm -rf "$ray_folder"
}
trap stop_ray EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

step() { # step NAME COMMAND…: one line, output in the log; on failure the log's end
    local name=$1 began=$SECONDS
    shift
    printf '%-52s' "$name"
    if ! "$@" >"$logs/${name%%:*}.log" 2>&1; then
        printf 'FAILED\n\n'
        tail -n 25 "$logs/${name%%:*}.log"
        echo "the whole log: $logs/${name%%:*}.log"
        exit 1
    fi
    printf '%3d s\n' $((SECONDS - began))
}

start_ray() {
    local ports
    # Outside of 10002-19999, which Ray gives to its workers.
    ports=$(python - <<'PY'
import random, socket
free = []
while len(free) < 4:
    port = random.randint(20000, 32000)
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) and port not in free:
            free.append(port)
print(*free)
PY
    )
    read -r gcs dashboard client agent <<<"$ports"
    ray_folder=$(mktemp -d /tmp/alexnet-XXXXXX) # short: Ray's socket paths have a limit
    # Ray does not start from a folder with a space in its name: this way the Python has none.
    ln -s "$(python -c 'import sys; print(sys.prefix)')" "$ray_folder/python"
    export PATH="$ray_folder/python/bin:$PATH"
    setsid "${ray[@]}" start --head --block --port "$gcs" --dashboard-host 127.0.0.1 \
        --dashboard-port "$dashboard" --ray-client-server-port "$client" \
        --dashboard-agent-listen-port "$agent" --temp-dir "$ray_folder" \
        >"$logs/ray-head.log" 2>&1 &
    ray_pid=$!
    export RAY_ADDRESS="http://127.0.0.1:$dashboard"
    for _ in $(seq 30); do
        # Only a job tells: the dashboard answers before the agent that starts jobs is there.
        if "${ray[@]}" job submit --no-wait -- true >/dev/null 2>&1; then return; fi
        if ! kill -0 "$ray_pid" 2>/dev/null; then cat "$logs/ray-head.log"; return 1; fi
        sleep 1
    done
    echo "Ray takes no job at $RAY_ADDRESS"
    return 1
}

image=ILSVRC2012_val_00000001
step "draw: ImageNet-like archives in .demo/raw" python -m pipelines demo-raw "$raw"
step "build: shards in .demo/shards" \
    python -m pipelines build --raw "$raw" --out "$out" --samples-per-shard 100
step "verify: every hash and every image" python -m pipelines verify --full "$out"
step "report: .demo/shards/report/index.html" python -m pipelines report "$out"
step "ray: a cluster of one node" start_ray
step "train: recipe smoke through ray job submit" \
    "${ray[@]}" job submit --working-dir . -- python training/run.py smoke --data "$out"
step "promote: the candidate, through the gate" python -m training.registry promote
tar -xf "$raw/ILSVRC2012_img_val.tar" -C "$demo" "$image.JPEG"
step "predict: one val image with the champion" python -m training.predict "$demo/$image.JPEG" --top 3

echo
grep -h 'step=.* val_top1=' "$logs/train.log" | tail -n 1 | sed 's/.*step=/last epoch: step=/'
cat "$logs/promote.log"
echo "truth:      $(python -m pipelines inspect "$image" --out "$out" | head -n 1)"
echo "prediction:"
grep '%' "$logs/predict.log"
cat <<EOF

Look further (.demo/shards/report/index.html is the data set, as a page):
  cd $(printf %q "$PWD") && . .venv/bin/activate
  export ALEXNET_HOME=$(printf %q "$ALEXNET_HOME") MLFLOW_TRACKING_URI=$(printf %q "sqlite:///$ALEXNET_HOME/mlflow.db")
  tar -tf .demo/shards/train-000000.tar | head                    # what a shard holds
  python -m training.registry list
  python -m mlflow server --backend-store-uri "\$MLFLOW_TRACKING_URI"    # runs, curves, models
EOF
