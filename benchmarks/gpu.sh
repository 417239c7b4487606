#!/usr/bin/env bash
# Tests and measures fastopt on a machine with a GPU, in ten minutes and without a network: builds both libraries,
# runs the tests of the CUDA kernels, plain and under compute-sanitizer, and the benchmark.
#
#     benchmarks/gpu.sh [FOLDER]    default: benchmarks/results/<date>-<gpu>
#
# Leaves a log of each stage, bench.json and bench.png in FOLDER. A stage that hangs is stopped and the next one runs.
# Needs torch with CUDA, nvcc, a C++ compiler and pytest; installs nothing. Settings: PYTHON, MINUTES, SANITIZED_TESTS, CACHE
# (a folder of libraries built before).
set -uo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
deadline=$((SECONDS + ${MINUTES:-10} * 60 - 15))
gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1 | tr 'A-Z ' 'a-z-' | tr -cd 'a-z0-9-')
folder=${1:-benchmarks/results/$(date +%F)-${gpu:-no-gpu}}
mkdir -p "$folder"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} FASTOPT_CACHE_DIR=${CACHE:-$scratch} PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

summary=()

# stage NAME SECONDS COMMAND...: runs it within its time and what is left of all; its output goes to NAME.log.
stage() {
  local name=$1 limit=$2 start=$SECONDS status
  shift 2
  local left=$((deadline - SECONDS))
  ((limit < left)) || limit=$left
  if ((limit < 5)); then
    summary+=("$name: not run, no time left")
    return 1
  fi
  echo "=== $name (at most $limit s): $*"
  timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$folder/$name.log" | tail -n 40
  status=${PIPESTATUS[0]}
  case $status in
    0) result="ok" ;;
    5) result="no such tests" ;;  # pytest's status
    124 | 137) result="STOPPED after $limit s" ;;
    *) result="FAILED with $status" ;;
  esac
  summary+=("$name: $result, $((SECONDS - start)) s")
  return "$status"
}

# Tests that need what is not installed here stay out.
test_options=(-p no:cacheprovider)
"$python" -c 'import pytest_timeout' 2>/dev/null && test_options+=(--timeout=60)
if ! "$python" -c 'import hypothesis' 2>/dev/null; then
  for file in $(grep -lE '^(import|from) hypothesis' -r tests --include=*.py); do test_options+=("--ignore=$file"); done
fi

stage machine 60 bash -c "nvidia-smi; nvcc --version; $python -c 'import torch; print(torch.__version__, torch.version.cuda)'; lscpu"
stage build 240 "$python" -m fastopt build
stage info 60 "$python" -m fastopt info
stage tests 150 "$python" -m pytest -m cuda -q "${test_options[@]}"

# Only our kernels, few tests: a sanitizer makes code a hundred times slower.
read -ra sanitized <<<"${SANITIZED_TESTS:-tests/cuda/test_sanitizer.py}"
for tool in memcheck racecheck; do
  if command -v compute-sanitizer >/dev/null; then
    stage "$tool" 50 compute-sanitizer --tool "$tool" --kernel-name kernel_substring=fastopt --error-exitcode 99 \
      "$python" -m pytest --all -q -m cuda "${sanitized[@]}" "${test_options[@]}"
  else
    summary+=("$tool: not run, no compute-sanitizer")
  fi
done

stage bench 600 "$python" benchmarks/libraries.py --device cuda --quick --compile loss --json "$folder/bench.json" --timeout 90
if [[ -s $folder/bench.json ]]; then  # of the cases that were run, if not all were
  deadline=$((deadline + 15))
  stage picture 15 "$python" benchmarks/table.py "$folder/bench.json" --png "$folder/bench.png"
  "$python" benchmarks/table.py "$folder/bench.json" >"$folder/bench.md"
fi

printf '\n=== summary, %s\n' "$folder"
printf '%s\n' "${summary[@]}" | tee "$folder/summary.txt"
! grep -qE 'FAILED|STOPPED|not run' "$folder/summary.txt"
