"""Soft Dice with and without Betti matching on the vessels of a retina image, at any size.

The demo section "segmentation" with arguments; the defaults here are larger: under three minutes.
Run: python examples/segment_vessels.py [--seeds 3] [--alphas 0.02 0.5] [--help]
Needs scikit-image, whose wheel brings the image along; matplotlib for the picture.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from pyloss.demo import segmentation
from pyloss.demo.sections import Options

LONGER = dataclasses.replace(segmentation.FULL, width=12, batch=8, test_patches=96)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--seeds", type=int, default=LONGER.seeds)
    add("--patch", type=int, default=LONGER.patch, help="side of a patch, divisible by 4")
    add("--batch", type=int, default=LONGER.batch)
    add("--width", type=int, default=LONGER.width, help="channels of the U-Net's first level")
    add("--warmup", type=int, default=LONGER.warmup, help="steps with soft Dice alone, shared")
    add("--steps", type=int, default=LONGER.steps, help="steps with each loss")
    add("--rate", type=float, default=LONGER.rate)
    add("--alphas", type=float, nargs="+", default=LONGER.alphas, help="of the Betti matching loss")
    add("--dims", type=int, nargs="+", default=LONGER.dims, help="0: pieces, 1: holes")
    add(
        "--padding",
        default=LONGER.padding,
        choices=["foreground", "foreground_detached", "background", "none"],
    )
    add("--blur", type=float, default=LONGER.blur)
    add("--noise", type=float, default=LONGER.noise)
    add("--gaps", type=int, default=LONGER.gaps, help="holes in the vessels of a patch")
    add("--test-patches", type=int, default=LONGER.test_patches)
    add("--out", type=Path, default=Path("demo_out"))
    add("--threads", type=int, help="None: what PyTorch chooses")
    chosen = vars(parser.parse_args())

    out, threads = chosen.pop("out"), chosen.pop("threads")
    out.mkdir(parents=True, exist_ok=True)
    chosen["dims"], chosen["alphas"] = tuple(chosen["dims"]), tuple(chosen["alphas"])
    chosen["padding"] = None if chosen["padding"] == "none" else chosen["padding"]
    size = dataclasses.replace(LONGER, **chosen)
    failures = segmentation.run_all(Options(out=out, threads=threads), size)
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
