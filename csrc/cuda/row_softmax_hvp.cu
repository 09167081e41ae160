// Row softmax, second derivative: the vector-Jacobian product of the backward. Formulas:
// row_hvp_coeffs in common/row_softmax.h.
//
// Decomposition: a team (one warp, or one block for longer rows) owns a row and walks it twice: the
// moments of the tangent under p, then the result. Element by element through strides; double
// backward is rare, and this is written to be right in every layout.
//
// Memory traffic per logit of b bytes: read 4 b (logits and tangent, twice), write b.
// Numerics: float (double for fp64). Paper: Mao, Mohri, Zhong, arXiv 2304.07288.
#include <stdexcept>

#include "cuda/launch.h"
#include "cuda/row_softmax.cuh"
#include "cuda/row_softmax.h"
#include "cuda/row_softmax_internal.h"

namespace pyloss::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kLongTeam)
    row_softmax_hvp_kernel(RowSoftmaxProblem p, RowTransform<RealOf<T>> f, RowSoftmaxHvp h) {
  using R = RealOf<T>;
  __shared__ R slots[3][kMaxWarps];
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y, n = p.rows();
  if (row >= n) return;
  const RowSoftmaxBackward& b = h.backward;
  T* out = static_cast<T*>(b.grad) + row_offset(p, b.grad_strides, row);
  const T* x = static_cast<const T*>(p.x) + row_offset(p, p.x_strides, row);
  const T* tangent = static_cast<const T*>(h.v) + row_offset(p, h.v_strides, row);
  R* grad_rows = static_cast<R*>(h.grad_rows);
  R* grad_extras = static_cast<R*>(h.grad_grad_extras);

  RowTarget<R> t;
  if (!load_target(p, row, &t)) {
    for (int64_t c = threadIdx.x; c < p.classes; c += blockDim.x) {
      out[c * b.grad_strides.cls] = from_real<T>(R(0));
    }
    if (threadIdx.x == 0) {
      grad_rows[row] = 0;
      for (int e = 0; grad_extras && e < 3; ++e) grad_extras[e * n + row] = 0;
    }
    return;
  }
  const bool valid = target_in_range(p, t);
  RowView<R> v = make_view(p, t, row, false, false);
  R soft_mass;
  const RowTerms<R> terms = load_terms<Mode::kSoft>(p, b.stats, row, t, &v.zy, &soft_mass);
  const R* norm = static_cast<const R*>(b.norm);
  const RowUpstream<R> u = load_upstream(p, b, row, t.token);
  const RowCoeffs<R> c = row_coeffs(p, t, terms, u, norm[kNormWeightSum], soft_mass);
  const R label_gradient = make_grad_row<Mode::kSoft>(f, terms, c, v.zy).label;

  const auto shift_of = [&](int64_t j) { return j == t.y ? R(p.options.margin) : R(0); };
  R vbar = 0, uv = 0, wv = 0;
  for (int64_t j = threadIdx.x; j < p.classes; j += blockDim.x) {
    const R z = transform<Mode::kSoft>(f, to_real(x[j * p.x_strides.cls]));
    const R vz = to_real(tangent[j * h.v_strides.cls]) * f.slope(z);
    const R uj = z - shift_of(j) - terms.m, pv = exp_fast(uj) / terms.sum * vz;
    vbar += pv;
    uv += fmax_(uj, R(-1e4)) * pv;
    wv += v.weight(int(j)) * vz;
  }
  vbar = team_reduce(vbar, AddOp{}, R(0), slots[0]);
  uv = team_reduce(uv, AddOp{}, R(0), slots[1]);
  wv = team_reduce(wv, AddOp{}, R(0), slots[2]);
  const auto tangent_at = [&](int64_t y) {
    if (!valid) return nan_<R>();
    const R z = transform<Mode::kSoft>(f, to_real(x[y * p.x_strides.cls]));
    return to_real(tangent[y * h.v_strides.cls]) * f.slope(z);
  };
  const R v1 = tangent_at(t.y), v2 = p.kind == TargetKind::kMix ? tangent_at(t.y2) : R(0);
  const RowHvpCoeffs<R> k = row_hvp_coeffs(p, t, terms, u, norm, vbar, uv, wv, v1, v2);
  if (threadIdx.x == 0) {
    grad_rows[row] = k.grad_row;
    if (grad_extras) {
      grad_extras[kExtraLse * n + row] = k.grad_lse;
      grad_extras[kExtraLogprob * n + row] = k.grad_logprob;
      grad_extras[kExtraEntropy * n + row] = k.grad_entropy;
    }
  }
  for (int64_t j = threadIdx.x; j < p.classes; j += blockDim.x) {
    const R z = transform<Mode::kSoft>(f, to_real(x[j * p.x_strides.cls]));
    const R vx = to_real(tangent[j * h.v_strides.cls]), slope = f.slope(z), vz = vx * slope;
    const R u = z - shift_of(j) - terms.m, uj = fmax_(u, R(-1e4)), e = exp_fast(u);
    R g = e * (c.a + c.b * uj);
    R dg = e * ((vz - vbar) * (c.a + c.b * uj + c.b) + k.da);
    if (j == t.y) {
      g = label_gradient;
      dg -= k.label;
    }
    if (j == t.y2) {
      g -= c.label2;
      dg -= k.label2;
    }
    if (c.spread != 0) g -= c.spread * v.weight(int(j));
    out[j * b.grad_strides.cls] = from_real<T>(slope * dg + f.curvature(z) * vx * g);
  }
}

}  // namespace

void row_softmax_hvp(const RowSoftmaxProblem& p, const RowSoftmaxHvp& h, void* stream) {
  if (p.soft()) throw std::invalid_argument("row_softmax_hvp takes class labels, not soft targets");
  check_classes(p);
  if (p.rows() == 0 || p.classes == 0) return;
  dispatch_float(p.dtype, [&](auto tag) {
    using T = decltype(tag);
    const int threads = team_threads(p), teams = teams_of_block(threads);
    launch(row_softmax_hvp_kernel<T>, dim3(grid_size(ceil_div(p.rows(), teams))),
           dim3(unsigned(threads), unsigned(teams)), 0, stream, p,
           RowTransform<RealOf<T>>(p.options), h);
  });
}

}  // namespace pyloss::cuda
