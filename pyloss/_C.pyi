version: str
built_with_cuda: bool
cuda_archs: str

def cuda_device_count() -> int: ...

# Empty, or why the driver of this machine cannot run these kernels.
def cuda_driver_problem() -> str: ...
def simd_level() -> str: ...

# The records of an op and their fields, as the NamedTuples of pyloss/ops/<op>/records.py have them.
def fields(op: str, /) -> dict[str, tuple[str, ...]]: ...

_records: dict[str, dict[str, tuple[str, ...]]]

# Records: pyloss/ops/betti_matching/records.py.
def betti_loss(
    problem: tuple[object, ...],
    options: tuple[object, ...],
    loss: int,
    grad: int,
    threads: int,
    /,
) -> None: ...
def betti_loss_of_residue(
    problem: tuple[object, ...],
    options: tuple[object, ...],
    residue: tuple[object, ...],
    loss: int,
    grad: int,
    threads: int,
    /,
) -> None: ...
def betti_matching(
    problem: tuple[object, ...], threads: int, /
) -> tuple[bytearray, bytearray, bytearray]: ...
def betti_matching_of_residue(
    problem: tuple[object, ...], residue: tuple[object, ...], threads: int, /
) -> tuple[bytearray, bytearray, bytearray]: ...
def persistence_pairs_of_residue(
    problem: tuple[object, ...], residue: tuple[object, ...], threads: int, /
) -> bytearray: ...
def betti_loops(problem: tuple[object, ...], squares: int, count: int, /) -> bytearray: ...
def persistence_pairs(
    problem: tuple[object, ...], essential: bool, threads: int, /
) -> bytearray: ...

# Of frame_pca; the records: pyloss/ops/frame_pca/records.py.
def frame_pca_fwd(problem: tuple[object, ...], frames: int, threads: int, /) -> None: ...
def frame_pca_bwd(
    problem: tuple[object, ...], backward: tuple[object, ...], threads: int, /
) -> None: ...

# Of Lion-K; `problem`: pyloss/ops/lion_k/records.py.
def lion_k_step(problem: tuple[object, ...], threads: int, /) -> None: ...

# Of margin_shift; the records: pyloss/ops/margin_shift/records.py.
def margin_shift_fwd(
    problem: tuple[object, ...], shift: int, total: int, threads: int, /
) -> None: ...
def margin_shift_bwd(
    problem: tuple[object, ...], backward: tuple[object, ...], threads: int, /
) -> None: ...

# Of aldr; `problem`: pyloss/ops/aldr/records.py. The rest are addresses, 0 for no gradient.
def aldr_fwd(
    problem: tuple[object, ...], stats: int, factor: int, grad: int, threads: int, /
) -> None: ...
def aldr_bwd(
    problem: tuple[object, ...], stats: int, factor: int, grad: int, threads: int, /
) -> None: ...

# Of the permutahedron; `problem`: pyloss/ops/permutahedron/records.py.
def permutahedron_fwd(
    problem: tuple[object, ...], x: int, y: int, packed: int, threads: int, /
) -> None: ...
def permutahedron_bwd(
    problem: tuple[object, ...], g: int, x: int, packed: int, dx: int, threads: int, /
) -> None: ...

# Of segment; the record: pyloss/ops/segment/records.py.
def segment_fold(problem: tuple[object, ...], kind: int, out: int, threads: int, /) -> None: ...
def segment_map(problem: tuple[object, ...], kind: int, out: int, threads: int, /) -> None: ...
def segment_scratch_numbers(rows: int, width: int, /) -> int: ...

# Of row_moments; the records: pyloss/ops/row_moments/records.py.
def row_moments_fwd(problem: tuple[object, ...], moments: int, threads: int, /) -> None: ...
def row_moments_bwd(
    problem: tuple[object, ...], backward: tuple[object, ...], threads: int, /
) -> None: ...

# Of row_softmax; the records: pyloss/ops/row_softmax/records.py. Every integer is an address (0:
# none), a dtype code, a count, or a stream handle.
def row_softmax_fwd(
    problem: tuple[object, ...], forward: tuple[object, ...], threads: int, /
) -> None: ...
def row_softmax_bwd(
    problem: tuple[object, ...], backward: tuple[object, ...], threads: int, /
) -> None: ...
def row_softmax_hvp(
    problem: tuple[object, ...],
    backward: tuple[object, ...],
    hvp: tuple[object, ...],
    threads: int,
    /,
) -> None: ...
def small_row_softmax(
    rows: int, classes: int, x: int, target: int, target_dtype: int, ignore_index: int, mean: bool,
    loss: int, grad: int, /,
) -> None: ...  # fmt: skip
def scale_inplace(data: int, dtype: int, n: int, factor: int, threads: int, /) -> None: ...
def accumulate(total: int, part: int, dtype: int, n: int, first: bool, threads: int, /) -> None: ...
def column_sums(
    total: int, x: int, dtype: int, rows: int, columns: int, row_stride: int, first: bool,
    threads: int, /,
) -> None: ...  # fmt: skip
def small_linear_cross_entropy(
    rows: int,
    classes: int,
    features: int,
    x: int,
    w: int,
    bias: int,
    target: int,
    target_dtype: int,
    ignore_index: int,
    mean: bool,
    loss: int,
    dx: int,
    dw: int,
    dbias: int,
    /,
) -> None: ...
def advise_huge_pages(data: int, bytes: int, /) -> None: ...
def similarity_topk(
    dtype: int,
    rows: int,
    columns: int,
    depth: int,
    queries: int,
    query_stride: int,
    keys: int,
    key_stride: int,
    k: int,
    first: int,
    values: int,
    indices: int,
    threads: int,
    /,
) -> None: ...

# Records: pyloss/ops/sorting_network/records.py.
def sorting_network_sort(problem: tuple[object, ...], y: int, threads: int, /) -> None: ...
def sorting_network_sort_bwd(
    problem: tuple[object, ...], gy: int, gx: int, threads: int, /
) -> None: ...
def sorting_network_apply(
    problem: tuple[object, ...], features: tuple[object, ...], out: int, threads: int, /
) -> None: ...
def sorting_network_apply_bwd(
    problem: tuple[object, ...],
    features: tuple[object, ...],
    g: int,
    gx: int,
    gf: int,
    threads: int,
    /,
) -> None: ...
def sorting_network_permutation(
    problem: tuple[object, ...], y: int, permutation: int, threads: int, /
) -> None: ...
def sorting_network_permutation_bwd(
    problem: tuple[object, ...], gy: int, gp: int, gx: int, threads: int, /
) -> None: ...
def sorting_network_loss(
    problem: tuple[object, ...], targets: tuple[object, ...], loss: int, gx: int, threads: int, /
) -> None: ...
def gemm(
    dtype: int,
    m: int,
    n: int,
    k: int,
    a: int,
    a_row: int,
    a_column: int,
    b: int,
    b_row: int,
    b_column: int,
    c: int,
    c_row: int,
    bias: int,
    add: bool,
    threads: int,
    /,
) -> None: ...
def multiply_adds(dtype: int, operations: int, /) -> float: ...
def prefers_own_gemm() -> bool: ...

# Of similarity_softmax; the records: pyloss/ops/similarity_softmax/records.py.
def similarity_counts_scratch_bytes(problem: tuple[object, ...], threads: int, /) -> int: ...
def similarity_counts(
    problem: tuple[object, ...], counts: int, scratch: int, scratch_bytes: int, threads: int, /
) -> None: ...
def similarity_softmax_fwd_scratch_bytes(
    problem: tuple[object, ...], columns: bool, threads: int, /
) -> int: ...
def similarity_softmax_bwd_scratch_bytes(
    problem: tuple[object, ...], dq: bool, dk: bool, dscale: bool, dbias: bool, threads: int, /
) -> int: ...
def similarity_softmax_fwd(
    problem: tuple[object, ...],
    forward: tuple[object, ...],
    scratch: int,
    scratch_bytes: int,
    threads: int,
    /,
) -> None: ...
def similarity_softmax_bwd(
    problem: tuple[object, ...],
    backward: tuple[object, ...],
    scratch: int,
    scratch_bytes: int,
    threads: int,
    /,
) -> None: ...
def pair_sums_fwd_scratch_bytes(problem: tuple[object, ...], threads: int, /) -> int: ...
def pair_sums_fwd(
    problem: tuple[object, ...],
    sums: tuple[object, ...],
    results: tuple[object, ...],
    scratch: int,
    scratch_bytes: int,
    threads: int,
    /,
) -> None: ...
def pair_sums_bwd(
    problem: tuple[object, ...],
    sums: tuple[object, ...],
    gradients: tuple[object, ...],
    scratch: int,
    scratch_bytes: int,
    threads: int,
    /,
) -> None: ...
def similarity_loss_fwd_scratch_bytes(loss: tuple[object, ...], threads: int, /) -> int: ...
def similarity_loss_fwd(
    loss: tuple[object, ...],
    x1: int,
    x2: int,
    result: int,
    scratch: int,
    scratch_bytes: int,
    threads: int,
    /,
) -> None: ...
def similarity_loss_bwd_scratch_bytes(
    loss: tuple[object, ...], dx1: bool, dx2: bool, dscale: bool, dbias: bool, threads: int, /
) -> int: ...
def similarity_loss_bwd(
    loss: tuple[object, ...],
    gradients: tuple[object, ...],
    scratch: int,
    scratch_bytes: int,
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
def cuda_betti_matching_scratch_bytes(problem: tuple[object, ...], device: int, /) -> int: ...
def cuda_betti_group(problem: tuple[object, ...], device: int, /) -> int: ...
def cuda_betti_prefix_bytes(problem: tuple[object, ...], device: int, /) -> int: ...
def cuda_betti_columns(
    problem: tuple[object, ...],
    counts: int,
    scratch: int,
    scratch_bytes: int,
    device: int,
    stream: int,
    /,
) -> None: ...
def cuda_betti_column_keys(
    problem: tuple[object, ...],
    count: int,
    names: int,
    keys: int,
    scratch: int,
    scratch_bytes: int,
    device: int,
    stream: int,
    /,
) -> None: ...
def cuda_betti_pairs(
    problem: tuple[object, ...],
    essential: bool,
    counts: int,
    scratch: int,
    scratch_bytes: int,
    device: int,
    stream: int,
    /,
) -> None: ...
def cuda_betti_rows(
    problem: tuple[object, ...],
    rows: tuple[object, ...],
    scratch: int,
    scratch_bytes: int,
    device: int,
    stream: int,
    /,
) -> None: ...
def cuda_betti_loss(
    problem: tuple[object, ...],
    options: tuple[object, ...],
    loss: int,
    grad: int,
    scratch: int,
    scratch_bytes: int,
    device: int,
    stream: int,
    /,
) -> None: ...
def cuda_lion_k_step(
    problem: tuple[object, ...],
    lr: int,
    found_inf: int,
    step: int,
    device: int,
    stream: int,
    /,
) -> None: ...
def cuda_margin_shift_fwd(
    problem: tuple[object, ...], shift: int, total: int, device: int, stream: int, /
) -> None: ...
def cuda_margin_shift_bwd(
    problem: tuple[object, ...], backward: tuple[object, ...], device: int, stream: int, /
) -> None: ...
def cuda_aldr_fwd(
    problem: tuple[object, ...], stats: int, factor: int, grad: int, device: int, stream: int, /
) -> None: ...
def cuda_aldr_bwd(
    problem: tuple[object, ...], stats: int, factor: int, grad: int, device: int, stream: int, /
) -> None: ...
def cuda_permutahedron_scratch_bytes(problem: tuple[object, ...], device: int, /) -> int: ...
def cuda_permutahedron_fwd(
    problem: tuple[object, ...],
    sorted: int,
    order: int,
    y: int,
    packed: int,
    scratch: int,
    scratch_bytes: int,
    device: int,
    stream: int,
    /,
) -> None: ...
def cuda_permutahedron_bwd(
    problem: tuple[object, ...], g: int, x: int, packed: int, dx: int, device: int, stream: int, /
) -> None: ...
def cuda_segment_fold(
    problem: tuple[object, ...],
    kind: int,
    out: int,
    scratch: int,
    device: int,
    stream: int,
    /,
) -> None: ...
def cuda_segment_map(
    problem: tuple[object, ...], kind: int, out: int, device: int, stream: int, /
) -> None: ...
def cuda_frame_pca_fwd(
    problem: tuple[object, ...], frames: int, device: int, stream: int, /
) -> None: ...
def cuda_frame_pca_bwd(
    problem: tuple[object, ...], backward: tuple[object, ...], device: int, stream: int, /
) -> None: ...
def cuda_row_moments_fwd(
    problem: tuple[object, ...], moments: int, device: int, stream: int, /
) -> None: ...
def cuda_row_moments_bwd(
    problem: tuple[object, ...], backward: tuple[object, ...], device: int, stream: int, /
) -> None: ...
def cuda_row_softmax_scratch_bytes(problem: tuple[object, ...], device: int, /) -> int: ...
def cuda_row_softmax_fwd(
    problem: tuple[object, ...],
    forward: tuple[object, ...],
    scratch: int,
    scratch_bytes: int,
    device: int,
    stream: int,
    /,
) -> None: ...
def cuda_row_softmax_bwd(
    problem: tuple[object, ...], backward: tuple[object, ...], device: int, stream: int, /
) -> None: ...
def cuda_row_softmax_hvp(
    problem: tuple[object, ...],
    backward: tuple[object, ...],
    hvp: tuple[object, ...],
    device: int,
    stream: int,
    /,
) -> None: ...
def cuda_scale_inplace(
    data: int, dtype: int, n: int, factor: int, device: int, stream: int, /
) -> None: ...
def cuda_sorting_network_scratch_bytes(
    problem: tuple[object, ...], call: tuple[object, ...], device: int, /
) -> int: ...
def cuda_sorting_network(
    problem: tuple[object, ...],
    call: tuple[object, ...],
    scratch: int,
    scratch_bytes: int,
    device: int,
    stream: int,
    /,
) -> None: ...
