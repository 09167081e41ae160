from collections.abc import Sequence

version: str
built_with_cuda: bool
cuda_archs: str

def cuda_device_count() -> int: ...
def simd_level() -> str: ...

# The records of an op and their fields, as the NamedTuples of pyloss/ops/<op>/records.py have them.
def fields(op: str, /) -> dict[str, tuple[str, ...]]: ...

# `problem`, `options`: see csrc/bind/betti_matching.cpp.
def betti_loss(
    problem: Sequence[int],
    options: Sequence[float],
    input: int,
    target: int,
    loss: int,
    grad: int,
    threads: int,
    /,
) -> None: ...
def betti_matching(
    problem: Sequence[int], input: int, target: int, threads: int, /
) -> tuple[bytearray, bytearray, bytearray]: ...
def persistence_pairs(
    problem: Sequence[int], input: int, essential: bool, threads: int, /
) -> bytearray: ...

# Of the permutahedron; `problem`: pyloss/ops/permutahedron/records.py.
def permutahedron_fwd(
    problem: tuple[object, ...], x: int, y: int, packed: int, threads: int, /
) -> None: ...
def permutahedron_bwd(
    problem: tuple[object, ...], g: int, x: int, packed: int, dx: int, threads: int, /
) -> None: ...

# `problem`, `options`: see csrc/bind/row_softmax.cpp. Every other integer is an address (0: none),
# a dtype code, a count, or a stream handle.
def row_softmax_fwd(
    problem: Sequence[int],
    options: Sequence[float],
    loss: int,
    loss_dtype: int,
    stats: int,
    norm: int,
    extras: int,
    index: int,
    grad: int,
    grad_strides: Sequence[int],
    threads: int,
    /,
) -> None: ...
def row_softmax_bwd(
    problem: Sequence[int],
    options: Sequence[float],
    grad_loss: int,
    grad_extras: int,
    stats: int,
    norm: int,
    extras: int,
    grad: int,
    grad_strides: Sequence[int],
    threads: int,
    /,
) -> None: ...
def row_softmax_hvp(
    problem: Sequence[int],
    options: Sequence[float],
    grad_loss: int,
    grad_extras: int,
    stats: int,
    norm: int,
    extras: int,
    grad: int,
    grad_strides: Sequence[int],
    v: int,
    v_strides: Sequence[int],
    grad_rows: int,
    grad_grad_extras: int,
    threads: int,
    /,
) -> None: ...
def scale_inplace(data: int, dtype: int, n: int, factor: int, threads: int, /) -> None: ...
def accumulate(total: int, part: int, dtype: int, n: int, first: bool, threads: int, /) -> None: ...
def column_sums(
    total: int, x: int, dtype: int, rows: int, columns: int, row_stride: int, first: bool,
    threads: int, /,
) -> None: ...  # fmt: skip
def advise_huge_pages(data: int, bytes: int, /) -> None: ...

# `problem`: see csrc/bind/sorting_network.cpp; `options`: steepness, art_lambda.
def sorting_network_sort(
    problem: Sequence[int], options: Sequence[float], y: int, threads: int, /
) -> None: ...
def sorting_network_sort_bwd(
    problem: Sequence[int], options: Sequence[float], gy: int, gx: int, threads: int, /
) -> None: ...

# `features`: f, whether all rows of the batch share it, transpose, d.
def sorting_network_apply(
    problem: Sequence[int],
    options: Sequence[float],
    features: Sequence[int],
    out: int,
    threads: int,
    /,
) -> None: ...
def sorting_network_apply_bwd(
    problem: Sequence[int],
    options: Sequence[float],
    features: Sequence[int],
    g: int,
    gx: int,
    gf: int,
    threads: int,
    /,
) -> None: ...
def sorting_network_permutation(
    problem: Sequence[int], options: Sequence[float], y: int, permutation: int, threads: int, /
) -> None: ...
def sorting_network_permutation_bwd(
    problem: Sequence[int],
    options: Sequence[float],
    gy: int,
    gp: int,
    gx: int,
    threads: int,
    /,
) -> None: ...
def sorting_network_loss(
    problem: Sequence[int],
    options: Sequence[float],
    targets: Sequence[int],
    loss: int,
    gx: int,
    threads: int,
    /,
) -> None: ...

# Of tensor attention; `problem`, `backward`: pyloss/ops/tensor_attention/records.py.
def tensor_attention_scratch_bytes(
    problem: tuple[object, ...], backward: bool, mask_gradients: bool, threads: int, /
) -> int: ...
def tensor_attention_fwd(
    problem: tuple[object, ...],
    out: int,
    lse: int,
    scratch: int,
    scratch_bytes: int,
    threads: int,
    /,
) -> None: ...
def tensor_attention_bwd(
    problem: tuple[object, ...],
    backward: tuple[object, ...],
    scratch: int,
    scratch_bytes: int,
    threads: int,
    /,
) -> None: ...

# The records: pyloss/ops/tensor_attention_lowrank/records.py.
def tensor_attention_lowrank_scratch_bytes(
    problem: tuple[object, ...], backward: bool, threads: int, /
) -> int: ...
def tensor_attention_lowrank_largest(x: int, dtype: int, count: int, threads: int, /) -> float: ...
def tensor_attention_lowrank_fwd(
    problem: tuple[object, ...],
    forward: tuple[object, ...],
    scratch: int,
    scratch_bytes: int,
    threads: int,
    /,
) -> int: ...
def tensor_attention_lowrank_bwd(
    problem: tuple[object, ...],
    backward: tuple[object, ...],
    scratch: int,
    scratch_bytes: int,
    threads: int,
    /,
) -> None: ...

# Present when built_with_cuda.
# `problem`, `numbers`: see csrc/bind/betti_matching_cuda.cpp.
def cuda_betti_in_double(problem: Sequence[int], /) -> bool: ...
def cuda_betti_matching_scratch_bytes(problem: Sequence[int], /) -> int: ...
def cuda_betti_loss(
    problem: Sequence[int],
    numbers: Sequence[float],
    extreme: bool,
    essential: bool,
    loss: int,
    grad_input: int,
    grad_target: int,
    scratch: int,
    scratch_bytes: int,
    stream: int,
    /,
) -> None: ...
def cuda_betti_pairs(
    problem: Sequence[int],
    birth: int,
    death: int,
    mate: int,
    essential: int,
    scratch: int,
    scratch_bytes: int,
    stream: int,
    /,
) -> None: ...
def cuda_permutahedron_scratch_bytes(problem: tuple[object, ...], /) -> int: ...
def cuda_permutahedron_fwd(
    problem: tuple[object, ...],
    sorted: int,
    order: int,
    y: int,
    packed: int,
    scratch: int,
    scratch_bytes: int,
    stream: int,
    /,
) -> None: ...
def cuda_permutahedron_bwd(
    problem: tuple[object, ...], g: int, x: int, packed: int, dx: int, stream: int, /
) -> None: ...
def cuda_row_softmax_scratch_bytes(problem: Sequence[int], options: Sequence[float], /) -> int: ...
def cuda_row_softmax_fwd(
    problem: Sequence[int],
    options: Sequence[float],
    loss: int,
    loss_dtype: int,
    stats: int,
    norm: int,
    extras: int,
    index: int,
    grad: int,
    grad_strides: Sequence[int],
    scratch: int,
    scratch_bytes: int,
    stream: int,
    /,
) -> None: ...
def cuda_row_softmax_bwd(
    problem: Sequence[int],
    options: Sequence[float],
    grad_loss: int,
    grad_extras: int,
    stats: int,
    norm: int,
    extras: int,
    grad: int,
    grad_strides: Sequence[int],
    stream: int,
    /,
) -> None: ...
def cuda_row_softmax_hvp(
    problem: Sequence[int],
    options: Sequence[float],
    grad_loss: int,
    grad_extras: int,
    stats: int,
    norm: int,
    extras: int,
    grad: int,
    grad_strides: Sequence[int],
    v: int,
    v_strides: Sequence[int],
    grad_rows: int,
    grad_grad_extras: int,
    stream: int,
    /,
) -> None: ...
def cuda_scale_inplace(data: int, dtype: int, n: int, factor: int, stream: int, /) -> None: ...

# `problem`, `options`, `call`: see csrc/bind/sorting_network_cuda.cpp.
def cuda_sorting_network_scratch_bytes(
    problem: Sequence[int], options: Sequence[float], call: Sequence[int], /
) -> int: ...
def cuda_sorting_network(
    problem: Sequence[int],
    options: Sequence[float],
    call: Sequence[int],
    scratch: int,
    scratch_bytes: int,
    stream: int,
    /,
) -> None: ...
