#!/usr/bin/env bash
# Builds, tests, sanitizes and times on a machine with a GPU and no network, in one call.
#
#   bench/gpu_check.sh OUT [WHEELS]
#
# OUT     folder for the results: summary.json (everything), a log a stage, and what the stages wrote
# WHEELS  folder with wheels of peers (liger-kernel, cut-cross-entropy), optional
#
# The stages, in the order in which a new kernel is most likely to fail:
#   build          for the one architecture
#   first          driver and device, the first launch of every kernel, compared; registers
#   betti          Betti matching against the CPU; permutahedron likewise
#   tests_gpu      every other test with the mark gpu
#   accuracy       half types where a review expected errors, against float64
#   memcheck, racecheck   compute-sanitizer on a small case of every kernel, each by name
#   graphs         every op in a CUDA graph; two host threads on one device
#   times          the shapes that were asked for, beside the predicted times
# and with what time is left: synccheck, cluster (PYLOSS_CUDA_CLUSTER=1, off by default), bench.
#
# summary.json is written again after each stage: a stage that dies, and the machine's end, take no
# earlier result along. It lists every stage, also those not reached, and predictions for all times.
#
# Needs python3 with torch, pip, pytest, pybind11, cmake, ninja, setuptools; nvcc for the kernels.
# Nothing outside OUT and a temporary folder is written: the package goes to a folder of its own,
# because a virtual environment on top of another one would not see that one's torch.
#
# Environment:
#   PYLOSS_GPU_CHECK_SECONDS   time for everything (default 470)
#   PYLOSS_GPU_CHECK_REHEARSE  1: without a device, run the stages' commands on the CPU with the
#                              pyloss that python3 imports and tiny shapes; a test of this file
#   PYLOSS_CUDA_ARCHS          what to compile for (default 90)
#
# Exit status 1 if a stage failed. Without a device every stage is skipped. A sanitizer that refuses
# the device and a stage that runs out of time are not failures; nor is the cluster kernel's ("bad").
set -uo pipefail

if [[ $# -lt 1 || $# -gt 2 ]]; then
  echo "usage: $0 OUT [WHEELS]" >&2
  exit 64
fi
mkdir -p "$1" || exit 64
OUT=$(cd "$1" && pwd)
WHEELS=
if [[ -n ${2:-} ]]; then
  WHEELS=$(cd "$2" && pwd) || exit 64
fi
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
LIMIT=${PYLOSS_GPU_CHECK_SECONDS:-470}
REHEARSE=${PYLOSS_GPU_CHECK_REHEARSE:-0}
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
STEPS=$OUT/steps.tsv
: >"$STEPS"
PYTHON=$(command -v python3) || { echo "python3 is not on PATH" >&2; exit 64; }

# Tools that pip or the CUDA toolkit put beside the interpreter or in the usual place.
SCRIPTS=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("scripts"))')
export PATH=$PATH:$SCRIPTS:${CUDA_HOME:-/usr/local/cuda}/bin

export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_NO_INDEX=1
export PYTHONUNBUFFERED=1
export TRITON_CACHE_DIR=$WORK/triton TORCHINDUCTOR_CACHE_DIR=$WORK/inductor
if [[ -z ${PYLOSS_REVISION:-} ]]; then
  PYLOSS_REVISION=$(git -C "$ROOT" rev-parse --short=12 HEAD 2>/dev/null || echo unknown)
fi
export PYLOSS_REVISION

# --- stages -------------------------------------------------------------------------------------

left() { echo $((LIMIT - SECONDS)); }

# Seconds for a stage: what it may take at most, and no more than is left minus a reserve.
allow() { # MOST RESERVE
  local seconds=$(($(left) - $2)) most=$1
  ((LIMIT > 470)) && most=$((most * LIMIT / 470)) # a slower machine: all stages alike
  ((seconds > most)) && seconds=$most
  ((seconds < 1)) && seconds=1
  echo "$seconds"
}

summarise() { "$PYTHON" "$ROOT/bench/_gpu_summary.py" "$STEPS" "$OUT" "$@"; }

note() { # STAGE STATUS SECONDS REMARK
  printf '%s\t%s\t%s\t%s\n' "$1" "$2" "$3" "${4:-}" >>"$STEPS"
  echo "== $1: $2 after $3 s ${4:-}"
  summarise --quiet
}

# Runs a command with a time limit; its output goes to a log, its exit status comes back. The first
# signal is an interrupt, at which pytest still reports what it has.
limited() { # SECONDS LOG COMMAND...
  local seconds=$1 log=$2
  shift 2
  echo "\$ $*" >>"$log"
  timeout --signal="${SIGNAL:-INT}" --kill-after=10 "$seconds" "$@" >>"$log" 2>&1
}

FAILED=failed # what a failure is called; "bad" where it does not count
stage() { # NAME MOST RESERVE COMMAND...
  local name=$1 most=$2 reserve=$3 begin=$SECONDS status seconds
  shift 3
  if [[ $GPU == no && $REHEARSE != 1 ]]; then
    note "$name" skipped 0 "no device"
    return 0
  fi
  if (($(left) - reserve < 5)); then
    note "$name" skipped 0 "out of time"
    return 0
  fi
  seconds=$(allow "$most" "$reserve")
  limited "$seconds" "$OUT/$name.log" "$@"
  status=$?
  # 137: killed, by the limit or by itself.
  ((status == 137 && SECONDS - begin + 1 >= seconds)) && status=124
  case $status in
    0 | 5) # 5: pytest has found no test
      if [[ $GPU == no ]]; then
        note "$name" skipped $((SECONDS - begin)) "no device; rehearsed on the CPU"
      else
        note "$name" ok $((SECONDS - begin))
      fi
      return 0
      ;;
    124) note "$name" late $((SECONDS - begin)) "out of time, see $name.log" ;;
    *)
      note "$name" "$FAILED" $((SECONDS - begin)) "exit status $status, see $name.log"
      tail -n 15 "$OUT/$name.log"
      ;;
  esac
  return 1
}

finish() {
  rm -f "$OUT"/*.part
  summarise
  exit $?
}

# --- build --------------------------------------------------------------------------------------

BUILD_LOG=$OUT/build.log
: >"$BUILD_LOG"
limited 20 "$BUILD_LOG" nvidia-smi
limited 20 "$BUILD_LOG" nvcc --version
limited 60 "$BUILD_LOG" "$PYTHON" -c 'import sys, torch
print(sys.version, torch.__version__, torch.version.cuda, torch.cuda.device_count())
sys.exit(0 if torch.cuda.is_available() else 3)'
case $? in
  0) GPU=yes ;;
  3) GPU=no ;;
  *) # must not pass for a machine without a device
    note build failed 0 "torch cannot be imported, see build.log"
    finish
    ;;
esac

DEVICE=(--device cuda)
if [[ $GPU == yes ]]; then
  # A copy, so that build products do not land in the tree.
  mkdir -p "$WORK/src" "$WORK/path"
  tar -C "$ROOT" --exclude=./.git --exclude='./.venv*' --exclude=./build --exclude='*.so' -cf - . \
    | tar -C "$WORK/src" -xf -
  ln -s "$WORK/src/bench" "$WORK/path/bench"
  # The device is there, so its kernels must be: no falling back to a build without.
  export PYLOSS_CMAKE_ARGS="-DPYLOSS_CUDA=ON -DPYLOSS_CUDA_ARCHS=${PYLOSS_CUDA_ARCHS:-90}"
  if ! stage build 200 180 "$PYTHON" -m pip install --verbose --no-build-isolation --no-deps \
    --no-cache-dir --target "$WORK/site" "$WORK/src"; then
    finish
  fi
  # The current directory must not be searched: its pyloss/ has no compiled module.
  export PYTHONSAFEPATH=1
  export PYTHONPATH=$WORK/site:$WORK/peers:$WORK/path${PYTHONPATH:+:$PYTHONPATH}
  cd "$WORK/src" || exit 1
  if [[ -n $WHEELS ]]; then
    for wheel in "$WHEELS"/*.whl; do
      # One by one: a peer that cannot be installed must not take the others along.
      if ! limited 60 "$BUILD_LOG" "$PYTHON" -m pip install --no-deps --no-cache-dir --no-compile \
        --target "$WORK/peers" "$wheel"; then
        note "peer $(basename "$wheel")" skipped 0 "does not install"
      fi
    done
  fi
else
  note build skipped 0 "no device"
  cd "$ROOT" || exit 1
  export PYLOSS_TEST_DEVICE=cpu OMP_NUM_THREADS=1 # of a rehearsal
  DEVICE=(--device cpu)
fi

# --- the order of the review --------------------------------------------------------------------

# The first use of each kernel, alone: a fault here explains what fails below.
stage first 60 170 "$PYTHON" -m bench._gpu_first "${DEVICE[@]}" --json "$OUT/first.json"

TESTS=("$PYTHON" -m pytest -q -m gpu --tb=short --maxfail=10 -p no:cacheprovider --durations=5)
WIDE=()
if [[ $GPU == yes ]] && "$PYTHON" -c 'import xdist' 2>/dev/null; then
  WORKERS=$(($(nproc) / 2))
  ((WORKERS > 8)) && WORKERS=8
  ((WORKERS > 1)) && WIDE=(-n "$WORKERS")
fi
OWN=(betti_matching_gpu permutahedron_gpu gpu_accuracy gpu_graphs) # files with a stage of their own
tests() { # NAME MOST RESERVE ARGUMENTS...
  local name=$1 most=$2 reserve=$3
  shift 3
  stage "$name" "$most" "$reserve" "${TESTS[@]}" --junitxml="$OUT/$name.xml" "$@"
}
SHORT=()
# A part is enough to show that the commands work.
[[ $GPU == no ]] && SHORT=(-k "7 or graph or window or chunks")
tests betti 30 160 "${WIDE[@]}" "${SHORT[@]}" tests/test_betti_matching_gpu.py \
  tests/test_permutahedron_gpu.py
REST=("${WIDE[@]}" tests)
for file in "${OWN[@]}"; do REST+=("--ignore=tests/test_$file.py"); done
[[ $GPU == no ]] && REST=(tests/test_linear_cross_entropy_gpu.py -k "1000 and forward and float32")
tests tests_gpu 90 120 "${REST[@]}"
tests accuracy 40 100 "${SHORT[@]}" tests/test_gpu_accuracy.py

SANITIZER=$(command -v compute-sanitizer || true)
# How the tool says that it cannot work here, in its own lines ("========= ...").
REFUSED='^=====.*([Nn]ot supported|[Ff]ailed to initialize|[Uu]nable to|[Ii]nternal error)'
# Only our kernels: PyTorch's own are slow to instrument and not ours to judge. Every kernel is named;
# the option was renamed between releases, so ask the tool.
FILTERS=()
if [[ -n $SANITIZER ]]; then
  HELP=$("$SANITIZER" --help 2>&1)
  for option in --kernel-name --kernel-regex --filter; do
    if grep -q -e "$option" <<<"$HELP"; then
      mapfile -t FILTERS < <("$PYTHON" "$ROOT/bench/_gpu_kernels.py" --filters "$option")
      break
    fi
  done
fi

sanitize() { # TOOL MOST RESERVE
  local name=$1 most=$2 reserve=$3 begin=$SECONDS status log=$OUT/$1.log
  local cases=("$PYTHON" -m bench._sanitizer_cases)
  if [[ $GPU == no ]]; then
    stage "$name" "$most" "$reserve" "${cases[@]}" cpu
    return
  fi
  if [[ -z $SANITIZER ]]; then
    note "$name" skipped 0 "compute-sanitizer is not installed"
    return
  fi
  # Without torch's caching allocator every tensor has its own bounds.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 limited "$(allow "$most" "$reserve")" "$log" "$SANITIZER" \
    --tool "$1" --error-exitcode 99 "${FILTERS[@]}" "${cases[@]}" cuda
  status=$?
  if ((status == 0)); then
    note "$name" ok $((SECONDS - begin)) "$(grep -E -o '[0-9]+ of [0-9]+ cases agree' "$log" | tail -n 1)"
  elif ((status == 99)); then
    note "$name" failed $((SECONDS - begin)) "$(grep -E 'SUMMARY' "$log" | tail -n 1)"
  elif ((status == 124 || status == 137)); then
    # What it has seen until then counts.
    if grep -q -E '^=========     at |Error: ' "$log"; then
      note "$name" failed $((SECONDS - begin)) "errors, then out of time, see $name.log"
    else
      note "$name" late $((SECONDS - begin)) "nothing found until out of time"
    fi
  elif grep -q -E "$REFUSED" "$log"; then
    note "$name" skipped $((SECONDS - begin)) "$(grep -E "$REFUSED" "$log" | head -n 1 | cut -c 1-120)"
  else
    note "$name" failed $((SECONDS - begin)) "exit status $status, see $name.log"
  fi
}
sanitize memcheck 60 85
sanitize racecheck 60 70

tests graphs 30 50 "${SHORT[@]}" tests/test_gpu_graphs.py

TIMES=("$PYTHON" -m bench._gpu_times "${DEVICE[@]}" --json "$OUT/times.json")
[[ $GPU == no ]] && TIMES+=(--quick)
stage times 90 3 "${TIMES[@]}"

# --- with what time is left ---------------------------------------------------------------------

sanitize synccheck 40 3
FAILED=bad
CLUSTER=(env PYLOSS_CUDA_CLUSTER=1 "${TESTS[@]}" tests/test_row_softmax_gpu.py "${WIDE[@]}")
[[ $GPU == no ]] && CLUSTER=("${TESTS[@]}" tests/test_gpu_graphs.py -k window)
stage cluster 40 3 "${CLUSTER[@]}"
FAILED=failed
BENCH=(--budget "$(($(left) > 40 ? $(left) - 25 : 5))")
[[ $GPU == no ]] && BENCH=(--quick --threads 1 --case 'fwd 4096x1000 fp32')
stage bench 600 3 "$PYTHON" -m bench.run --op row_softmax "${DEVICE[@]}" "${BENCH[@]}" \
  --json "$OUT/bench.json"
finish
