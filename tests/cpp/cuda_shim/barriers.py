"""Leaves every barrier of the CUDA kernels out, one at a time: the race detector must notice.

The detector's own test on real kernels. The programs are those of the shim under ThreadSanitizer
(`race_<op>`, tests/cpp/CMakeLists.txt); PYLOSS_SHIM_SKIP names the barrier. A barrier that is not
needed carries the comment `spare:` and a reason in its line.

    python barriers.py FOLDER-OF-PROGRAMS [file.cu:line ...]
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).resolve().parents[3] / "csrc/cuda"
# Problems, the first of which are enough for most barriers.
PROBLEMS = {
    "aldr": 40,
    "betti_matching": 6,
    "frame_pca": 60,
    "permutahedron": 40,
    "row_moments": 60,
    "row_softmax": 120,
    "segment": 6,
    "sorting_network": 70,
}
LIMIT_S = 600


def run(program: Path, problems: int, **variables: str) -> int:
    """Exit status: 66 where a race was found, which ends the program."""
    environment = os.environ | variables | {"PYLOSS_CUDA_CLUSTER": "1"}
    environment["TSAN_OPTIONS"] = "history_size=1:halt_on_error=1:symbolize=0"
    command = [str(program), str(problems), "0", "--few"]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=LIMIT_S)
    return done.returncode


def barriers_of(program: Path, problems: int) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        places = Path(folder, "places")
        status = run(program, problems, PYLOSS_SHIM_BARRIERS=str(places))
        assert status == 0, f"{program.name} fails with all of its barriers: {status}"
        return sorted(set(places.read_text().split())) if places.exists() else []


def spare(place: str) -> bool:
    name, line = place.split(":")
    found = list(SOURCES.glob(name))
    return bool(found) and "spare:" in found[0].read_text().splitlines()[int(line) - 1]


def main() -> int:
    folder, only = Path(sys.argv[1]), sys.argv[2:]
    programs = {op: folder / f"race_{op}" for op in PROBLEMS}
    if absent := [p.name for p in programs.values() if not p.exists()]:
        sys.exit(f"not built, as where the compiler has no ThreadSanitizer: {', '.join(absent)}")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        seen = pool.map(lambda op: barriers_of(programs[op], PROBLEMS[op]), programs)
        # A place in a header belongs to several ops: one of them must notice.
        tries = [
            (place, op)
            for op, places in zip(programs, seen)
            for place in places
            if (not only or place in only) and (SOURCES / place.split(":")[0]).exists()
        ]
        results = pool.map(
            lambda t: run(programs[t[1]], PROBLEMS[t[1]], PYLOSS_SHIM_SKIP=t[0]), tries
        )
        noticed: dict[str, bool] = {}
        for (place, op), status in zip(tries, results):
            noticed[place] = noticed.get(place, False) or status == 66
            said = {66: "race", 0: "nothing"}.get(status, f"other results ({status})")
            print(f"{place:34} {op:16} {said}", flush=True)
    missed = [place for place, found in noticed.items() if not found and not spare(place)]
    needed = [place for place, found in noticed.items() if found and spare(place)]
    for place in missed:
        print(f"FAILED {place}: no race without this barrier")
    for place in needed:
        print(f"FAILED {place}: said to be spare, but is needed")
    found = sum(noticed.values())
    print(f"{len(noticed)} barriers left out, {found} noticed, {len(missed)} missed")
    return bool(missed or needed or not noticed)


if __name__ == "__main__":
    sys.exit(main())
