"""Specs on a device that has no kernel of pyloss (fake_device.py): {sample: what came}, as JSON.

A process of its own, because the device is there for all that follows. Arguments: names of Specs,
none: all of them; `--float64`: the device has it.
"""

from __future__ import annotations

import json
import sys
import warnings

import fake_device
import torch
from specs import SPECS
from specs._checks import run
from specs._spec import F32, F64, Spec

import pyloss
from pyloss.ops import _launch
from pyloss.testing import assert_matches_reference


def seeded_run(spec: Spec, sample) -> dict[str, torch.Tensor]:
    torch.default_generator.manual_seed(0)
    return run(spec, sample)


def problem(spec: Spec, name: str, wide: bool, read_back: set[str]) -> str | None:
    """What is wrong with values and gradients of a sample on the device, beside those here.

    `read_back` gets the operations whose results came to the host meanwhile.
    """
    sample = spec.cast(spec.samples[name](), F32 if F32 in spec.dtypes else F64)
    with pyloss.backend("reference"):
        expected = seeded_run(spec, sample)
    fake_device.settings["float64"] = True
    given = sample.each(lambda _, t: t.to(fake_device.DEVICE))
    fake_device.settings["float64"] = wide
    fake_device.read_back.clear()
    try:
        found = seeded_run(spec, given)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    read_back.update(fake_device.read_back)
    elsewhere = [k for k, t in found.items() if t.device != fake_device.DEVICE]
    if elsewhere:
        return f"on another device: {', '.join(elsewhere)}"
    rtol, atol = (None, None) if wide else (1e-3, 1e-5)  # sums are float32
    for k, t in found.items():
        want = expected[k]
        try:
            if want.is_floating_point():
                assert_matches_reference(t.cpu(), want, rtol=rtol, atol=atol, what=k)
            else:
                assert torch.equal(t.cpu(), want), f"{k} differs"
        except AssertionError as error:
            return str(error)
    return None


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    wide = "--float64" in sys.argv
    if not wide:
        _launch.WITHOUT_FLOAT64.add(fake_device.NAME)
    names = [a for a in sys.argv[1:] if not a.startswith("-")]
    found, read_back = {}, {}
    for spec in [SPECS[n] for n in names] if names else SPECS.values():
        for name in list(spec.samples)[: 1 if names else None]:
            seen = read_back.setdefault(spec.name, set())
            found[f"{spec.name}: {name}"] = problem(spec, name, wide, seen)
    read_back = {name: sorted(seen) for name, seen in read_back.items() if seen}
    print(json.dumps({"problems": found, "read_back": read_back}))


if __name__ == "__main__":
    main()
