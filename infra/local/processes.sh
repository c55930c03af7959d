# shellcheck shell=bash disable=SC2034,SC2154
# Sourced by the scripts beside it: processes that are started by pid, awaited and found again.
# Expects dir, the cluster's folder.

# In the environment of all that is started here, so that down.sh finds it whoever is its parent.
mark() { echo "ALEXNET_LOCAL_CLUSTER=$dir"; }

launch() { # launch NAME ENV_FILE COMMAND…: in the background, its pid and log under NAME
    local name=$1 file=$2
    shift 2
    # A clean environment: nobody's settings or keys. From a file: the command line is public.
    # shellcheck disable=SC2016  # expanded over there
    setsid env -i "$(mark)" PATH="$PATH" HOME="$dir/node" LANG=C.UTF-8 ALEXNET_HOME="$dir/node" \
        bash -c 'set -a; [ -z "$0" ] || . "$0"; set +a; exec "$@"' "$file" "$@" \
        >"$dir/logs/$name.log" 2>&1 </dev/null &
    echo $! >"$dir/pids/$name"
    disown # or bash would tell that down.sh killed it
}

wait_for() { # wait_for NAME SECONDS COMMAND…: until it succeeds, while NAME lives
    local name=$1 end=$((SECONDS + $2))
    shift 2
    until "$@" >/dev/null 2>&1; do
        if ! kill -0 "$(cat "$dir/pids/$name" 2>/dev/null)" 2>/dev/null || [ $SECONDS -ge $end ]; then
            tail -n 20 "$dir/logs/$name.log" >&2
            echo "error: $name did not get ready; the end of its log is above" >&2
            return 1
        fi
        sleep 0.3
    done
}

ours() { # pids of all that was started here and still lives, with what descends from them
    local found pid child=() all=()
    found=$(grep -lzxF -- "$(mark)" /proc/[0-9]*/environ 2>/dev/null | cut -d/ -f3) || true
    [ ! -e "$dir/network" ] || found+=" $(pids_in_namespaces)"
    # Ray's workers write their title over their environment, but their parents are known.
    find_children
    for pid in $found; do descendants "$pid"; done
    [ ${#all[@]} -eq 0 ] || printf '%s\n' "${all[@]}" | sort -un
}

find_children() { # into the caller's array `child`, by the parent's pid
    local process stat
    for process in /proc/[0-9]*; do
        # It may be gone by now: `$(<` of a missing file ends the whole script, whatever follows it.
        stat=
        { IFS= read -r -d '' stat <"$process/stat"; } 2>/dev/null || [ -n "$stat" ] || continue
        stat=${stat##*) } # state, parent, …
        stat=${stat#* }
        child[${stat%% *}]+=" ${process#/proc/}"
    done
}

descendants() { # from the caller's array `child`, into its array `all`
    local pid
    all+=("$1")
    for pid in ${child[$1]:-}; do descendants "$pid"; done
}
