"""What the processes of one test share. Each is `python NAME_worker.py RANK WORLD RENDEZVOUS_FILE`
(helpers.check_ranks), and they are joined by gloo.

Exit status 0: all cases agree with one process. 3: one does not, or raised. Anything else: the
processes did not get that far.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta

if sys.platform == "linux":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

import torch
import torch.distributed as dist
from helpers import WRONG_NUMBERS


def run(cases: Callable[[], dict[str, Callable[[], None]]]) -> None:
    """Joins the group, runs the cases that are there then, and ends the process."""
    rank, world, rendezvous = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    store = dist.FileStore(rendezvous, world)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    for name, case in cases().items():
        try:
            case()
        except Exception:
            print(f"rank {rank}, {name}:", file=sys.stderr)
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(WRONG_NUMBERS)  # others may wait in a collective: no orderly shutdown
        print(f"rank {rank}, {name}: ok", flush=True)
    print("all cases done", flush=True)
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may end a process that shuts down in order


def raises(kind, words: str, call: Callable) -> None:
    try:
        call()
    except kind as error:
        assert words in str(error), error
    else:
        raise AssertionError(f"no {kind}: {words}")
