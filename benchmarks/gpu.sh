#!/usr/bin/env bash
# All parts of gpu.py, one after the other, into a folder of rows; each is called again while rows
# are left, three times at most. Give names of parts for some of them:
#     benchmarks/gpu.sh FOLDER [build|tests|sanitizer|ops|steps|waits|table]...
# PYTHON, GPU_OPTIONS (such as "--device cpu --small") and GPU_SHARDS (of the tests) may be set.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:?FOLDER of the rows}
shift
parts=("$@")
((${#parts[@]})) || parts=(build tests sanitizer ops steps waits table)
python=${PYTHON:-python3}
shards=${GPU_SHARDS:-4}
read -ra options <<< "${GPU_OPTIONS:-}"
failed=()

part() {
    local status=3 turn
    for turn in 1 2 3; do
        status=0
        "$python" "$here/gpu.py" "$1" --out "$out" "${options[@]}" "${@:2}" || status=$?
        ((status == 3)) || break
    done
    ((status == 0)) || failed+=("$* (status $status)")
}

for name in "${parts[@]}"; do
    if [[ $name == tests ]]; then
        for ((k = 1; k <= shards; k++)); do
            part tests --shard "$k/$shards"
        done
    else
        part "$name"
    fi
done
((${#failed[@]} == 0)) || printf 'failed or unfinished: %s\n' "${failed[@]}" >&2
exit $((${#failed[@]} > 0))
