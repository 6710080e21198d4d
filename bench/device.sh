#!/usr/bin/env bash
# Everything that wants a GPU, in one command on a machine with torch, triton, pytest and pytest-benchmark alone:
#   bench/device.sh                 kernel tests, op benchmarks, bits of the generator; under 10 minutes
#   bench/device.sh --only PART     tests, ops, philox or tune (may be repeated; tune runs only when named)
#   bench/device.sh --dry           all parts on a few tiny cases, in the interpreter where there is no GPU
# Results and logs go to $OUT, else to bench/results/<device>. Exits non-zero when a part failed, and names it.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
PYTHON=${PYTHON:-python3}
parts=() dry=()
while (($#)); do
    case $1 in
        --dry) dry=(--dry) ;;
        --only)
            case ${2:-} in
                tests | ops | philox | tune) parts+=("$2") && shift ;;
                *) echo "--only takes tests, ops, philox or tune, got '${2:-}'" >&2 && exit 2 ;;
            esac ;;
        *) echo "unknown argument '$1': known are --dry and --only PART" >&2 && exit 2 ;;
    esac
    shift
done
((${#parts[@]})) || parts=(tests ops philox)
if ((${#dry[@]})); then
    device=dry
    "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || export TRITON_INTERPRET=1
else
    unset TRITON_INTERPRET
    device=$("$PYTHON" -c 'import re, torch; print(re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-"))') ||
        { echo "no GPU that torch can see: bench/device.sh --dry runs without one" >&2; exit 2; }
fi
out=${OUT:-bench/results/$device}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD/kernels:$PWD/bench:$PWD/tests:$PWD${PYTHONPATH:+:$PYTHONPATH}"
pytest=("$PYTHON" -m pytest -p no:cacheprovider -p no:randomly --benchmark-columns=median,iqr,rounds --color=no)
tested=(tests/ops --durations=15)
((${#dry[@]})) && tested=(tests/ops/test_tiles.py)

failed=() lines=()
part() { # name, seconds it may take, command
    local name=$1 limit=$2 begin=$SECONDS status
    shift 2
    # Interrupted rather than killed: pytest then still writes what it has.
    timeout --foreground -s INT -k 5 "$limit" "$@" >"$out/$name.log" 2>&1 </dev/null
    status=$?
    case $status in
        0) status=passed ;;
        124 | 137) status="stopped after $limit s" ;;
        *) status="FAILED (exit $status)" ;;
    esac
    [[ $status == passed ]] || failed+=("$name")
    lines+=("$(printf '%-8s %-22s %4d s   %s' "$name" "$status" $((SECONDS - begin)) "$(grep -oE '[0-9]+ (passed|failed|error).* in [0-9.]+s' "$out/$name.log" | tail -1)")")
}

for name in "${parts[@]}"; do
    case $name in
        tests) part tests 290 "${pytest[@]}" "${tested[@]}" -q -rfEs ;;
        ops) part ops 190 "${pytest[@]}" bench/test_ops.py -k "not generator" "${dry[@]}" --results "$out/ops.json" -q -rfE ;;
        philox) part philox 60 "${pytest[@]}" bench/test_ops.py -k generator "${dry[@]}" --results "$out/philox.json" -q -rfE ;;
        tune) part tune 500 "$PYTHON" bench/tune.py --copy "$out" ;;
    esac
done

{
    for name in "${parts[@]}"; do
        case $name in
            ops) grep -E '^(roof measured|[a-z_]+ [0-9x]+ )|^FAILED' "$out/ops.log" ;;
            tests | philox) grep -E '^(FAILED|ERROR)' "$out/$name.log" | cut -c1-200 | head -40 ;;
            tune) tail -40 "$out/tune.log" ;;
        esac
    done
    echo
    printf '%s\n' "${lines[@]}"
    if ((${#failed[@]})); then echo "failed: ${failed[*]}"; else echo "all parts passed"; fi
} | tee "$out/summary.txt"
((${#failed[@]} == 0))
