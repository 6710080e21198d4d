#!/usr/bin/env bash
# Runs all tests and benchmarks that need a GPU. The machine needs only torch, triton, pytest and pytest-benchmark.
#   bench/device.sh                 kernel tests, op and network benchmarks, bits of the generator; under 10 minutes
#   bench/device.sh --only PART     tests, ops, philox, encoder, decoder, profile, loader, resize, winograd, upsample,
#                                   compile or tune (may be repeated); the last four run only when they are named,
#                                   winograd and upsample also with --dry
#   bench/device.sh --seconds N     all parts within N seconds instead of 575
#   bench/device.sh --dry           all parts on a few tiny cases, in the interpreter without a GPU
#   bench/device.sh --help          prints these lines
# Each part gets its share of the time that is left, so fewer parts have more time each. A contestant that is not
# installed is left out by name. results.json (merge_parts.py: a part run again replaces its own data), logs.txt and
# summary.txt are written to $OUT, or else to bench/results/<device>; `make report` writes the pages' tables and pictures
# from them. Exits non-zero if a part failed, and names it.
set -uo pipefail
if [[ ${1:-} == --help ]]; then
    sed -n '2,/^set /s/^# \{0,1\}//p' "$0"
    exit
fi
cd "$(dirname "$0")/.." || exit 1
PYTHON=${PYTHON:-python3}
parts=() dry=() budget=575 # seconds of all parts together
while (($#)); do
    case $1 in
        --dry) dry=(--dry) ;;
        --only)
            case ${2:-} in
                tests | ops | philox | encoder | decoder | profile | loader | resize | winograd | upsample | compile | tune) parts+=("$2") && shift ;;
                *) echo "--only takes tests, ops, philox, encoder, decoder, profile, loader, resize, winograd, upsample, compile or tune, got '${2:-}'" >&2 && exit 2 ;;
            esac ;;
        --seconds)
            [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || { echo "--seconds takes a whole number, got '${2:-}'" >&2 && exit 2; }
            budget=$2 && shift ;;
        *) echo "unknown argument '$1': known are --dry, --only PART, --seconds N and --help" >&2 && exit 2 ;;
    esac
    shift
done
if ((${#parts[@]} == 0)); then
    parts=(tests ops philox encoder decoder profile loader resize)
    # These want the time of a whole run; compile takes minutes even on tiny cases.
    ((${#dry[@]})) && parts+=(winograd upsample)
fi
if ((${#dry[@]})); then
    device=dry
    [[ ${TRITON_INTERPRET:-} == 1 ]] || "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
        export TRITON_INTERPRET=1
else
    unset TRITON_INTERPRET
    device=$("$PYTHON" -c 'import re, torch; print(re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-"))') ||
        { echo "no GPU that torch can see: bench/device.sh --dry runs without one" >&2; exit 2; }
fi
out=${OUT:-bench/results/$device}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD:$PWD/kernels:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}"
pytest=("$PYTHON" -m pytest -p no:cacheprovider -p no:randomly -p no:logging -p no:hypothesispytest --benchmark-columns=median,iqr,rounds --color=no)
tested=(tests/ops tests/gpu --durations=15)
# The kernels' tests mostly compile, on one core each.
"$PYTHON" -c 'import xdist' 2>/dev/null && tested+=(-n "$(($(nproc) < 12 ? $(nproc) : 12))")
((${#dry[@]})) && tested=(tests/ops/test_tiles.py)
without=()
if ((${#dry[@]})); then
    # These contestants run on a CPU only; a machine with a GPU need not have them.
    without=(--without diffusers --without "ONNX Runtime" --without OpenVINO)
elif ! "$PYTHON" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("diffusers") is None)'; then
    without=(--without diffusers)
fi

declare -A share=([tests]=8 [ops]=6 [philox]=1 [encoder]=7 [decoder]=4 [profile]=2 [loader]=2 [resize]=2 [winograd]=8 [upsample]=2 [compile]=8 [tune]=30)
failed=() lines=() statuses=() ahead=0
for name in "${parts[@]}"; do ((ahead += share[$name])); done
part() { # name, command
    local name=$1 begin=$SECONDS status limit
    limit=$(((budget - SECONDS) * share[$name] / ahead))
    ((limit > 5)) || limit=5
    ((ahead -= share[$name]))
    shift
    # Interrupted, not killed, so that pytest still writes its results.
    timeout --foreground -s INT -k 5 "$limit" "$@" >"$out/$name.log" 2>&1 </dev/null
    status=$?
    case $status in
        0) status=passed ;;
        124 | 137) status="stopped after $limit s" ;;
        *) status="FAILED (exit $status)" ;;
    esac
    statuses+=("$name=$status")
    [[ $status == passed ]] || failed+=("$name")
    lines+=("$(printf '%-8s %-22s %4d s   %s' "$name" "$status" $((SECONDS - begin)) "$(grep -oE '[0-9]+ (passed|failed|error).* in [0-9.]+s' "$out/$name.log" | tail -1)")")
}

measure() { # name, file, more arguments
    local name=$1 file=$2
    shift 2
    part "$name" "${pytest[@]}" "bench/timing/$file.py" "$@" "${dry[@]}" --results "$out/$name.json" -q -rfE
}
for name in "${parts[@]}"; do
    case $name in
        tests) part tests "${pytest[@]}" "${tested[@]}" -q -rfEs ;;
        ops) measure ops test_ops -k "not generator" ;;
        philox) measure philox test_ops -k generator ;;
        encoder | decoder) measure "$name" test_networks -k "$name and not compiled" "${without[@]}" ;;
        compile) measure compile test_networks -k compiled "${without[@]}" ;;
        profile | loader) measure "$name" "test_$name" ;;
        resize) measure resize pictures/test_resize ;;
        winograd) part winograd "${pytest[@]}" bench/timing/forms -k winograd "${dry[@]}" --results "$out/winograd.json" -q -rfE ;;
        upsample) measure upsample forms/test_upsample ;;
        tune) part tune "$PYTHON" -m bench.kernels.tune --copy "$out" ;;
    esac
done
"$PYTHON" -m bench.pages.merge_parts "$out" "${statuses[@]}" "${dry[@]}" || failed+=(merge)
# All logs become one file.
declare -A logs=()
for name in "${parts[@]}"; do
    logs[$name]=$(cat "$out/$name.log")
    printf '===== %s\n%s\n\n' "$name" "${logs[$name]}"
    rm "$out/$name.log"
done >"$out/logs.txt"

{
    for name in "${parts[@]}"; do
        case $name in
            ops) grep -E '^(roof measured|[a-z_]+ [0-9x]+ )|^FAILED' <<<"${logs[ops]}" ;;
            encoder | decoder | profile | loader) grep -E '^(encoder|decoder) |^FAILED' <<<"${logs[$name]}" | grep -v 'left out: \(takes\|compiling\|this case\)' ;;
            resize) grep -E '^resize |^FAILED' <<<"${logs[resize]}" ;;
            tests | philox) grep -E '^(FAILED|ERROR)' <<<"${logs[$name]}" | cut -c1-200 | head -40 ;;
            tune) tail -40 <<<"${logs[tune]}" ;;
        esac
    done
    echo
    printf '%s\n' "${lines[@]}"
    if ((${#failed[@]})); then echo "failed: ${failed[*]}"; else echo "all parts passed"; fi
} | tee "$out/summary.txt"
((${#failed[@]} == 0))
