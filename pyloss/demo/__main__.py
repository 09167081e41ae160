"""Command line of the demo: `python -m pyloss.demo [--section NAME] [--quick] [--out DIR]`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pyloss.demo.sections import Options, load


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the sections asked for; 0 if all their checks passed, 1 otherwise."""
    sections = load()
    listing = "\n".join(f"  {s.name:<16} {s.summary}" for s in sections.values())
    parser = argparse.ArgumentParser(
        prog="python -m pyloss.demo",
        description="Trains on real input with pyloss and checks the result against PyTorch.",
        epilog=f"sections (all of them by default):\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--section",
        action="append",
        choices=list(sections),
        metavar="NAME",
        help="run this section only (may be given more than once)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("demo_out"), metavar="DIR", help="default: demo_out"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes: only shows that it runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=_positive, help="default: what PyTorch chooses")
    args = parser.parse_args(argv)

    args.out.mkdir(parents=True, exist_ok=True)
    options = Options(out=args.out, quick=args.quick, seed=args.seed, threads=args.threads)
    failures: list[str] = []
    start = time.perf_counter()
    for name in dict.fromkeys(args.section or sections):
        print(f"== {name}: {sections[name].summary}", flush=True)
        failures += [f"{name}: {failure}" for failure in sections[name].run(options)]
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    verdict = f"{len(failures)} check(s) failed" if failures else "all checks passed"
    print(f"== {verdict} in {time.perf_counter() - start:.0f} s; files in {args.out}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
