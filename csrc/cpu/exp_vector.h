// exp and tanh on the compiler's vector types, for one instruction set: included after gemm_tile.h.
// Those of cpu/lanes.h, for code that has vectors already.

// exp for x <= 88, as exp_lane of cpu/lanes.h.
PYLOSS_INLINE Vec<float>::V exp_of(Vec<float>::V x) {
  using namespace exp_poly;
  using V = Vec<float>::V;
  const float kRound = 12582912.0f + 127.0f;
  const V t = x * kLog2e + kRound;
  const V n = t - kRound;
  const V two_n = reinterpret_cast<V>(reinterpret_cast<Vec<float>::I>(t) << 23);
  const V r = (x - n * kLn2Hi) - n * kLn2Lo;
  const V tail = 1.0f + r * (kC2 + r * (kC3 + r * (kC4 + r * (kC5 + r * kC6))));
  const V y = (1.0f + r * tail) * two_n;
  return x < V{} + kMin ? V{} : y;
}
PYLOSS_INLINE Vec<double>::V exp_of(Vec<double>::V x) {
  for (int i = 0; i < Vec<double>::kLanes; ++i) x[i] = ::exp(x[i]);
  return x;
}

// As tanh_lane of cpu/lanes.h.
PYLOSS_INLINE Vec<float>::V tanh_of(Vec<float>::V x) {
  using namespace tanh_ratio;
  using V = Vec<float>::V;
  const V most = V{} + kMax, one = V{} + 1.0f;
  V c = x > most ? most : x;
  c = c < -most ? -most : c;
  const V s = c * c;
  const V p = kP0 + s * (kP1 + s * (kP2 + s * (kP3 + s * kP4)));
  const V q = 1.0f + s * (kQ1 + s * (kQ2 + s * (kQ3 + s * kQ4)));
  const V y = c * p / q;
  return y > one ? one : (y < -one ? -one : y);
}
PYLOSS_INLINE Vec<double>::V tanh_of(Vec<double>::V x) {
  for (int i = 0; i < Vec<double>::kLanes; ++i) x[i] = ::tanh(x[i]);
  return x;
}
