#!/usr/bin/env bash
# Builds, tests, sanitizes and benchmarks on a machine with a GPU and no network, in one call.
#
#   bench/gpu_check.sh OUT [WHEELS]
#
# OUT     folder for the results, at most 8 files: build.log tests.log tests_gpu.xml tests_cpu.xml
#         sanitizer.log bench.log bench.json summary.json (which also holds the results of the other
#         ops and of the cluster kernel: bench.json is that of row_softmax)
# WHEELS  folder with wheels of peers (liger-kernel, cut-cross-entropy), optional
#
# Needs python3 with torch, pip, pytest, pybind11, cmake, ninja, setuptools; nvcc for the kernels.
# Nothing outside OUT and a temporary folder is written: the package goes to a folder of its own,
# because a virtual environment on top of another one would not see that one's torch.
#
# Environment:
#   PYLOSS_GPU_CHECK_SECONDS  time for everything (default 560)
#   PYLOSS_CUDA_ARCHS         what to compile for (default 90)
#
# Exit status 1 if the build, a test, a sanitizer or a benchmark's check of our results failed.
# A sanitizer that refuses the device and a benchmark that runs out of time are not failures. The
# thread-block-cluster kernel (PYLOSS_CUDA_CLUSTER=1) is off by default and checked apart: what goes
# wrong there is reported as "bad" and does not fail the whole.
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
LIMIT=${PYLOSS_GPU_CHECK_SECONDS:-560}
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
STEPS=$WORK/steps.tsv
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

left() { echo $((LIMIT - SECONDS)); }

# Seconds for a step: what it may take at most, and no more than is left minus a reserve.
allow() { # MOST RESERVE
  local seconds=$(($(left) - $2))
  ((seconds > $1)) && seconds=$1
  ((seconds < 1)) && seconds=1
  echo "$seconds"
}

note() { # STEP STATUS SECONDS REMARK
  printf '%s\t%s\t%s\t%s\n' "$1" "$2" "$3" "${4:-}" >>"$STEPS"
  echo "== $1: $2 after $3 s ${4:-}"
}

# Runs a command with a time limit; its output goes to a log, its exit status comes back. The first
# signal is an interrupt, at which pytest still reports what it has.
limited() { # SECONDS LOG COMMAND...
  local seconds=$1 log=$2
  shift 2
  echo "\$ $*" >>"$log"
  timeout --signal="${SIGNAL:-INT}" --kill-after=10 "$seconds" "$@" >>"$log" 2>&1
}

finish() {
  rm -f "$OUT"/*.part
  "$PYTHON" "$ROOT/bench/_gpu_summary.py" "$STEPS" "$OUT"
  exit $?
}

# --- build --------------------------------------------------------------------------------------

BUILD_LOG=$OUT/build.log
: >"$BUILD_LOG"
limited 20 "$BUILD_LOG" nvidia-smi
limited 20 "$BUILD_LOG" nvcc --version
limited 60 "$BUILD_LOG" "$PYTHON" -c \
  'import sys, torch; print(sys.version, torch.__version__, torch.version.cuda, sep="\n")'
GPU=no
if limited 60 "$BUILD_LOG" "$PYTHON" -c 'import torch; raise SystemExit(not torch.cuda.is_available())'
then
  GPU=yes
fi

# A copy, so that build products do not land in the tree.
mkdir -p "$WORK/src" "$WORK/path"
tar -C "$ROOT" --exclude=./.git --exclude='./.venv*' --exclude=./build --exclude='*.so' -cf - . \
  | tar -C "$WORK/src" -xf -
ln -s "$WORK/src/bench" "$WORK/path/bench"

begin=$SECONDS
CUDA_MODE=AUTO
command -v nvcc >/dev/null && CUDA_MODE=ON
export PYLOSS_CMAKE_ARGS="-DPYLOSS_CUDA=$CUDA_MODE -DPYLOSS_CUDA_ARCHS=${PYLOSS_CUDA_ARCHS:-90}"
if limited "$(allow 200 60)" "$BUILD_LOG" "$PYTHON" -m pip install --verbose --no-build-isolation \
  --no-deps --no-cache-dir --target "$WORK/site" "$WORK/src"; then
  note build ok $((SECONDS - begin)) "CUDA $CUDA_MODE"
else
  note build failed $((SECONDS - begin)) "see build.log"
  tail -n 40 "$BUILD_LOG"
  finish
fi

# The current directory must not be searched: its pyloss/ has no compiled module.
export PYTHONSAFEPATH=1
export PYTHONPATH=$WORK/site:$WORK/peers:$WORK/path${PYTHONPATH:+:$PYTHONPATH}
cd "$WORK/src" || exit 1
if ! limited 60 "$BUILD_LOG" "$PYTHON" -c "
import pyloss, pyloss._C as c, sys
pyloss.show_config()
if '$GPU' == 'yes' and not c.built_with_cuda:
    sys.exit('the machine has a GPU but pyloss was built without CUDA')"; then
  note import failed 0 "see build.log"
  tail -n 20 "$BUILD_LOG"
  finish
fi

if [[ -n $WHEELS ]]; then
  for wheel in "$WHEELS"/*.whl; do
    # One by one: a peer that cannot be installed must not take the others along.
    if ! limited 60 "$BUILD_LOG" "$PYTHON" -m pip install --no-deps --no-cache-dir --no-compile \
      --target "$WORK/peers" "$wheel"; then
      note "peer $(basename "$wheel")" skipped 0 "does not install"
    fi
  done
fi

# --- tests and sanitizers -----------------------------------------------------------------------

TEST_LOG=$OUT/tests.log
: >"$TEST_LOG"
PARALLEL=()
if "$PYTHON" -c 'import xdist' 2>/dev/null; then
  WORKERS=$(($(nproc) / 2))
  ((WORKERS > 8)) && WORKERS=8
  ((WORKERS > 1)) && PARALLEL=(-n "$WORKERS")
fi

run_tests() { # NAME MARKS MOST RESERVE
  local begin=$SECONDS status remark=
  limited "$(allow "$3" "$4")" "$TEST_LOG" "$PYTHON" -m pytest tests -q -m "$2" --tb=short \
    --durations=10 --junitxml="$OUT/$1.xml" "${PARALLEL[@]}"
  status=$?
  if ((status == 1)); then
    # Alone and one by one: a test that measures time can fail beside seven others. What failed
    # at first stays in the XML and in the summary.
    limited "$(allow 60 $(($4 - 20)))" "$TEST_LOG" "$PYTHON" -m pytest tests -q -m "$2" \
      --tb=short --last-failed --last-failed-no-failures none --junitxml="$WORK/$1_again.xml"
    status=$?
    remark="failures were run again alone"
  fi
  case $status in
    0) note "$1" ok $((SECONDS - begin)) "$remark" ;;
    5) note "$1" skipped $((SECONDS - begin)) "no such test" ;;
    124 | 137) note "$1" failed $((SECONDS - begin)) "out of time, see tests.log" ;;
    *) note "$1" failed $((SECONDS - begin)) "pytest exit status $status, see tests.log" ;;
  esac
}

SANITIZER=$(command -v compute-sanitizer || true)
SANITIZER_LOG=$OUT/sanitizer.log
: >"$SANITIZER_LOG"
# How the tool says that it cannot work here, in its own lines ("========= ...").
REFUSED='^=====.*([Nn]ot supported|[Ff]ailed to initialize|[Uu]nable to|[Ii]nternal error)'

# Only our kernels: PyTorch's own are slow to instrument and not ours to judge. The option was
# renamed between releases, so ask the tool. The name is a substring: that of the CUDA kernels and of
# the Triton kernels with a softmax in them (not of the masked products).
filter=()
if [[ -n $SANITIZER ]]; then
  help=$("$SANITIZER" --help 2>&1)
  for option in --kernel-regex --kernel-name --filter; do
    if grep -q -e "$option" <<<"$help"; then
      filter=("$option" kns=_softmax_)
      break
    fi
  done
fi

sanitize() { # TOOL CLUSTER SECONDS
  local base=$WORK/$1_$2
  : >"$base.log"
  # Without torch's caching allocator every tensor has its own bounds.
  # A job in the background ignores interrupts.
  SIGNAL=TERM PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYLOSS_CUDA_CLUSTER=$2 \
    limited "$3" "$base.log" "$SANITIZER" \
    --tool "$1" --error-exitcode 99 "${filter[@]}" "$PYTHON" -m bench._sanitizer_cases cuda
  echo $? >"$base.status"
}

judge() { # TOOL CLUSTER SECONDS
  local log=$WORK/$1_$2.log name=$1 bad=failed status
  status=$(<"$WORK/$1_$2.status")
  if (($2 == 1)); then
    name="$1, cluster" bad=bad
  fi
  { echo "==== $name, exit status $status"; tail -c 2000000 "$log"; } >>"$SANITIZER_LOG"
  if ((status == 0)); then
    note "$name" ok "$3" "$(grep -E -o '[0-9]+ of [0-9]+ cases agree' "$log" | tail -n 1)"
  elif ((status == 124 || status == 137)); then
    note "$name" skipped "$3" "out of time"
  elif grep -q -E "$REFUSED" "$log"; then
    note "$name" skipped "$3" "$(grep -E "$REFUSED" "$log" | head -n 1 | cut -c 1-120)"
  elif ((status == 99)); then
    note "$name" "$bad" "$3" "$(grep -E 'SUMMARY' "$log" | tail -n 1)"
  else
    note "$name" "$bad" "$3" "exit status $status, see sanitizer.log"
  fi
}

TOOLS=(memcheck racecheck synccheck)
if [[ $GPU == yes ]]; then
  run_tests tests_gpu gpu 150 290
  begin=$SECONDS
  if limited "$(allow 60 260)" "$TEST_LOG" env PYLOSS_CUDA_CLUSTER=1 "$PYTHON" -m pytest tests -q \
    -m gpu --tb=short -p no:cacheprovider "${PARALLEL[@]}"; then
    note "tests_gpu, cluster" ok $((SECONDS - begin))
  else
    note "tests_gpu, cluster" bad $((SECONDS - begin)) "exit status $?, see tests.log"
  fi
fi

# The other tests leave the GPU alone, so the sanitizers have it meanwhile.
begin=$SECONDS
if [[ $GPU == yes && -n $SANITIZER ]]; then
  seconds=$(allow 120 170)
  for cluster in 0 1; do
    for tool in "${TOOLS[@]}"; do sanitize "$tool" "$cluster" "$seconds" & done
  done
else
  reason="no CUDA device"
  [[ $GPU == yes ]] && reason="compute-sanitizer is not installed"
  for tool in "${TOOLS[@]}"; do note "$tool" skipped 0 "$reason"; done
fi
run_tests tests_cpu "not gpu" 150 170
wait
for cluster in 0 1; do
  for tool in "${TOOLS[@]}"; do
    [[ -e $WORK/${tool}_$cluster.status ]] && judge "$tool" "$cluster" $((SECONDS - begin))
  done
done
grep -q '^tests.*failed' "$STEPS" && tail -n 30 "$TEST_LOG"

# --- benchmarks ---------------------------------------------------------------------------------

BENCH_LOG=$OUT/bench.log
: >"$BENCH_LOG"

bench() { # OP SECONDS ARGUMENTS...
  local op=$1 seconds=$2
  shift 2
  # The budget ends before the limit: a case that has begun may still end, and the file is whole.
  limited "$seconds" "$BENCH_LOG" "$PYTHON" -m bench.run --op "$op" \
    --budget $((seconds > 40 ? seconds - 25 : seconds)) "$@"
}

judge_bench() { # NAME STATUS SECONDS
  case $2 in
    0) note "$1" ok "$3" ;;
    124 | 137) note "$1" skipped "$3" "out of time; the JSON holds what was done" ;;
    *) note "$1" failed "$3" "exit status $2, see bench.log" ;;
  esac
}

if [[ $GPU == yes ]]; then
  BENCH=(--device cuda)
  begin=$SECONDS
  if PYLOSS_CUDA_CLUSTER=1 bench row_softmax "$(allow 30 150)" --device cuda --case 'new buffer' \
    --providers pyloss --json "$WORK/bench_cluster.json"; then
    note "bench, cluster" ok $((SECONDS - begin))
  else
    note "bench, cluster" bad $((SECONDS - begin)) "see bench.log"
  fi
else
  BENCH=(--device cpu --quick --threads 1)
fi
for op in linear_cross_entropy tensor_attention tensor_attention_lowrank betti_matching \
  permutahedron sorting_network; do
  begin=$SECONDS
  bench "$op" "$(allow 60 70)" "${BENCH[@]}" --json "$WORK/bench_$op.json"
  judge_bench "bench, $op" $? $((SECONDS - begin))
done
begin=$SECONDS
bench row_softmax "$(allow 600 12)" "${BENCH[@]}" --json "$OUT/bench.json"
judge_bench bench $? $((SECONDS - begin))
finish
