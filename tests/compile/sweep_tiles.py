"""Compiles one kernel of tensor attention with many tiles and prints what came out of each.

    python tests/compile/sweep_tiles.py "bwd q pairs" windows --tiles 64,32,4,1 64,32,4,2
    python tests/compile/sweep_tiles.py "bwd kv rows" masks --grid --capability 89

What the tables of kernels/tensor_attention/table.py are chosen by. A line: rows, keys, warps,
stages; registers, shared memory, programs of a multiprocessor; of each loop with products the
instructions, products, accesses of spilled registers, and warp instructions for a number of a
tile; warnings of ptxas. Another Triton is taken by PYTHONPATH, as `make gpu-proof` does it.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from unittest.mock import patch

from triton_compile import SHARED_LIMIT, Compiled, compile_launch
from triton_launches import record
from triton_scenarios import MORE, USUAL

from pyloss.kernels.tensor_attention import launch as launchers
from pyloss.kernels.tensor_attention.table import Config

GRID = [
    Config(*tile)
    for tile in itertools.product((32, 64, 128), (16, 32, 64), (4, 8), (1, 2))
    if tile[0] * tile[1] >= 1024
]


def compiled(
    name: str, scenario: str, config: Config, capability: int
) -> Iterator[tuple[dict[str, object], Compiled]]:
    """Each launch of the kernel that the table calls `name` ("bwd kv rows", ...)."""
    choose = launchers.choose_config
    kernel = f"tensor_attention_{name.replace(' ', '_')}_kernel"

    def chosen(which, p):
        return config if which == name else choose(which, p)

    call = {**USUAL["tensor_attention"], **MORE["tensor_attention"]}[scenario]
    with patch.object(launchers, "choose_config", chosen):
        # One of those that differ in nothing but which sizes are multiples of 16, or 1.
        launches = {one.form: one for one in record(call, capability) if one.name == kernel}
    for one in launches.values():
        constants = {n: one.constexprs.get((at,)) for at, n in enumerate(one.kernel.arg_names)}
        flags = {n: v for n, v in constants.items() if n.startswith("WANT_")}
        yield flags, compile_launch(one, capability)


def line(config: Config, flags: dict[str, object], done: Compiled, capability: int) -> str:
    size = config.block_m * config.block_n
    loops = " ".join(
        f"[{at.instructions} {at.matrix} {at.local} {at.instructions * done.warps / size:.2f}]"
        for at in done.loops
    )
    fits = "" if done.shared <= SHARED_LIMIT[capability] else " too much shared memory"
    wanted = "".join(key[5:] for key, yes in flags.items() if yes)
    return (
        f"{tuple(config)} {wanted} {done.registers} regs {done.shared} shared"
        f" {done.programs(capability)} programs {loops}{fits} {' '.join(done.warnings)[:90]}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="of the table, as 'bwd q pairs'")
    parser.add_argument("scenario", help="of triton_scenarios.py")
    parser.add_argument("--capability", type=int, default=90)
    parser.add_argument("--tiles", nargs="*", default=[], help="rows,keys,warps,stages")
    parser.add_argument("--grid", action="store_true", help="the usual ones")
    options = parser.parse_args()
    tiles = [Config(*map(int, text.split(","))) for text in options.tiles]
    for config in tiles + GRID * options.grid:
        try:
            for flags, done in compiled(options.name, options.scenario, config, options.capability):
                print(line(config, flags, done, options.capability), flush=True)
        except Exception as error:  # what does not compile is no candidate
            while error.__cause__ or error.__context__:
                error = error.__cause__ or error.__context__
            print(f"{tuple(config)} {type(error).__name__} {str(error)[-200:]}", flush=True)


if __name__ == "__main__":
    main()
