// The loops of betti_local.h, for one instruction set (per_instruction_set.h).

// Comparisons as bits, a lane each.
template <class K>
struct Lanes {
  using V = K;
  static constexpr int kCount = 1;
  static V load(const K* p) { return *p; }
  static V fill(K x) { return x; }
  static V larger(V a, V b) { return a > b ? a : b; }
  static uint64_t not_above(V a, V b) { return a <= b; }
  static uint64_t equal(V a, V b) { return a == b; }
};
#if PYLOSS_VECTOR_BYTES == 64
template <>
struct Lanes<int32_t> {
  using V = __m512i;
  static constexpr int kCount = 16;
  static V load(const int32_t* p) { return _mm512_loadu_si512(p); }
  static V fill(int32_t x) { return _mm512_set1_epi32(x); }
  static V larger(V a, V b) { return _mm512_maskz_max_epi32(0xffff, a, b); }
  static uint64_t not_above(V a, V b) { return _mm512_cmple_epi32_mask(a, b); }
  static uint64_t equal(V a, V b) { return _mm512_cmpeq_epi32_mask(a, b); }
};
template <>
struct Lanes<int64_t> {
  using V = __m512i;
  static constexpr int kCount = 8;
  static V load(const int64_t* p) { return _mm512_loadu_si512(p); }
  static V fill(int64_t x) { return _mm512_set1_epi64(x); }
  static V larger(V a, V b) { return _mm512_maskz_max_epi64(0xff, a, b); }
  static uint64_t not_above(V a, V b) { return _mm512_cmple_epi64_mask(a, b); }
  static uint64_t equal(V a, V b) { return _mm512_cmpeq_epi64_mask(a, b); }
};
#elif PYLOSS_VECTOR_BYTES == 32
template <>
struct Lanes<int32_t> {
  using V = __m256i;
  static constexpr int kCount = 8;
  static V load(const int32_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static V fill(int32_t x) { return _mm256_set1_epi32(x); }
  static V larger(V a, V b) { return _mm256_max_epi32(a, b); }
  static uint64_t bits(V a) { return uint32_t(_mm256_movemask_ps(_mm256_castsi256_ps(a))); }
  static uint64_t not_above(V a, V b) { return bits(_mm256_cmpgt_epi32(a, b)) ^ 0xff; }
  static uint64_t equal(V a, V b) { return bits(_mm256_cmpeq_epi32(a, b)); }
};
template <>
struct Lanes<int64_t> {
  using V = __m256i;
  static constexpr int kCount = 4;
  static V load(const int64_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static V fill(int64_t x) { return _mm256_set1_epi64x(x); }
  static V larger(V a, V b) { return _mm256_blendv_epi8(b, a, _mm256_cmpgt_epi64(a, b)); }
  static uint64_t bits(V a) { return uint32_t(_mm256_movemask_pd(_mm256_castsi256_pd(a))); }
  static uint64_t not_above(V a, V b) { return bits(_mm256_cmpgt_epi64(a, b)) ^ 0xf; }
  static uint64_t equal(V a, V b) { return bits(_mm256_cmpeq_epi64(a, b)); }
};
#endif

template <class R, class K>
bool make_keys(const R* image, const Grid& g, bool superlevel, K* keys, Range<K>& range) {
  constexpr int kBits = 8 * sizeof(K);
  std::fill_n(keys, g.pitch, kFrame<K>);
  std::fill_n(keys + (g.rows + 1) * g.pitch, g.pitch + 64, kFrame<K>);
  bool nan = false;
  K low = kFrame<K>, high = -kFrame<K>;
  const R sign = superlevel ? R(-1) : R(1);
  for (uint32_t row = 0; row < g.rows; ++row) {
    const R* const x = image + int64_t(row) * g.cols;
    K* const out = keys + (row + 1) * g.pitch;
    int bad = 0;
    for (uint32_t col = 0; col < g.cols; ++col) {
      bad |= x[col] != x[col];
      const R value = sign * x[col] + R(0);  // -0 becomes +0
      K u;
      memcpy(&u, &value, sizeof u);
      const K key = u ^ ((u >> (kBits - 1)) & kFrame<K>);
      low = key < low ? key : low;
      high = key > high ? key : high;
      out[col] = key;
    }
    nan |= bad != 0;
    for (uint32_t col = g.cols; col < g.pitch; ++col) out[col] = kFrame<K>;
  }
  range = {low, high};
  return !nan;
}

template <class K>
Range<K> min_keys(const K* a, const K* b, const Grid& g, K* keys) {
  K low = kFrame<K>, high = -kFrame<K>;
  std::fill_n(keys, g.pitch, kFrame<K>);
  std::fill_n(keys + (g.rows + 1) * g.pitch, g.pitch + 64, kFrame<K>);
  for (uint32_t row = 1; row <= g.rows; ++row) {
    const uint32_t begin = row * g.pitch;
    for (uint32_t v = begin; v < begin + g.cols; ++v) {
      const K key = a[v] < b[v] ? a[v] : b[v];
      low = key < low ? key : low;
      high = key > high ? key : high;
      keys[v] = key;
    }
    for (uint32_t v = begin + g.cols; v < begin + g.pitch; ++v) keys[v] = kFrame<K>;
  }
  return {low, high};
}

// Of a word of voxels p: q at the right, r below, s at the lower right; bits as named.
struct Compared {
  uint64_t p_le_q, p_le_r, p_ge_r;
  uint64_t top_le_bottom, bottom_le_top;  // of the larger ends of the two edges of a square
  uint64_t left_below, left_above;        // the lower left not below p, the upper left above p
};

template <class K>
PYLOSS_INLINE Compared compare(const K* p, uint32_t pitch) {
  using L = Lanes<K>;
  Compared c{};
  for (int i = 0; i < 64; i += L::kCount) {
    const auto a = L::load(p + i), b = L::load(p + i + 1), below = L::load(p + i + pitch);
    const auto top = L::larger(a, b), bottom = L::larger(below, L::load(p + i + pitch + 1));
    c.p_le_q |= L::not_above(a, b) << i;
    c.p_le_r |= L::not_above(a, below) << i;
    c.p_ge_r |= L::not_above(below, a) << i;
    c.top_le_bottom |= L::not_above(top, bottom) << i;
    c.bottom_le_top |= L::not_above(bottom, top) << i;
    c.left_below |= L::not_above(a, L::load(p + i + pitch - 1)) << i;
    c.left_above |= L::not_above(L::load(p + i - pitch - 1), a) << i;
  }
  c.left_above = ~c.left_above;
  return c;
}

// What later words and rows need to know of a word.
struct Paired {
  Compared is;
  uint64_t left, down, right;                                             // voxels
  uint64_t to_bottom, to_right, to_top, to_left, to_up_left;  // squares
};

// From the word's own bits and the one before: those of the neighbours at the left.
PYLOSS_INLINE uint64_t from_left(uint64_t before, uint64_t word) {
  return word << 1 | before >> 63;
}
PYLOSS_INLINE uint64_t from_right(uint64_t word, uint64_t next) {
  return word >> 1 | next << 63;
}

template <class K>
void pair_locally(const K* keys, const Grid& g, const Range<K>* range, Planes& planes) {
  // Two rows, each with an empty word before and after.
  std::vector<Paired> rows(2 * (g.words + 2), Paired{});
  Paired *above = rows.data() + 1, *here = above + g.words + 2;
  uint32_t vertices = 0, peaks = 1, rest = 0;
  for (uint32_t w = 0; w < g.words; ++w) {
    for (const uint32_t at : {w, w + (g.rows + 1) * g.words}) {
      planes.voxels.steps[at] = planes.squares.steps[at] = {{0, 0, 0}, ~uint64_t(0)};
      planes.voxels.roots[at] = {0, at ? 0u : vertices};
      planes.squares.roots[at] = {0, peaks};
      planes.rest[at] = {0, 0};
      if (range) {
        planes.rises[at] = {0, 0};
        planes.lowest[at] = planes.highest[at] = 0;
      }
    }
  }
  for (uint32_t row = 1; row <= g.rows; ++row) {
    const bool last = row == g.rows;
    for (uint32_t w = 0; w < g.words; ++w) {
      const uint32_t at = row * g.words + w;
      const K* const key = keys + 64 * size_t(at);
      const uint64_t voxels = Grid::below(w, g.cols);
      const uint64_t squares = last ? 0 : Grid::below(w, g.cols - 1);
      Paired& x = here[w];
      x.is = compare(key, g.pitch);
      const Compared &c = x.is, &north = above[w].is;

      // A voxel: the first of its edges, up, left, down, right, to one that is not larger.
      const uint64_t not_below_left = from_left(here[int(w) - 1].is.p_le_q, c.p_le_q);
      const uint64_t up = voxels & north.p_le_r;
      x.left = voxels & ~up & not_below_left;
      const uint64_t others = voxels & ~up & ~x.left;
      x.down = others & ~c.p_le_r;
      x.right = others & ~c.p_ge_r & ~c.p_le_q;
      const uint64_t minima = others & ~(x.down | x.right);
      planes.voxels.steps[at] = {{x.right | x.left, up | x.left, 0},
                                 ~(up | x.left | x.down | x.right)};
      planes.voxels.roots[at] = {minima, vertices};
      vertices += uint32_t(__builtin_popcountll(minima));

      // A square: the last of its edges, bottom, right, top, left, that has its value.
      x.to_bottom = squares & c.top_le_bottom;
      x.to_right = squares & ~c.top_le_bottom & c.p_le_q;
      const uint64_t corner = squares & ~c.top_le_bottom & ~c.p_le_q;  // it is the one maximum
      x.to_top = corner & ~north.top_le_bottom;
      // Its top edge leads to a younger square: further along the edges of the same voxel.
      const uint64_t further = corner & north.top_le_bottom & ~north.bottom_le_top;
      x.to_left = further & (~not_below_left | c.left_below);
      x.to_up_left = further & ~x.to_left & c.left_above;
      const uint64_t go = x.to_bottom | x.to_right | x.to_top | x.to_left | x.to_up_left;
      planes.squares.steps[at] = {{x.to_right | x.to_left, x.to_top | x.to_left, x.to_up_left},
                                  ~go};
      planes.squares.roots[at] = {squares & ~go, peaks};
      peaks += uint32_t(__builtin_popcountll(squares & ~go));

      if (range) {
        using L = Lanes<K>;
        uint64_t low = 0, high = 0;
        const auto lowest = L::fill(range->low), highest = L::fill(range->high);
        for (int i = 0; i < 64; i += L::kCount) {
          const auto a = L::load(key + i);
          low |= L::equal(a, lowest) << i;
          high |= L::equal(a, highest) << i;
        }
        planes.rises[at] = {c.p_le_r, c.p_le_q};
        planes.lowest[at] = low & voxels;
        planes.highest[at] = high & voxels;
      }
    }
    for (uint32_t w = 0; w < g.words; ++w) {
      const Paired &x = here[w], &before = here[int(w) - 1], &next = here[w + 1];
      const uint64_t down = (last ? 0 : Grid::below(w, g.cols)) &
                            ~(x.is.p_le_r | x.down | from_left(before.to_right, x.to_right) |
                              x.to_left);
      const uint64_t right = Grid::below(w, g.cols - 1) &
                             ~(from_right(x.left, next.left) | x.right | x.to_top |
                               above[w].to_bottom | from_right(x.to_up_left, next.to_up_left));
      planes.rest[row * g.words + w] = {down, right};
      rest += uint32_t(__builtin_popcountll(down) + __builtin_popcountll(right));
    }
    std::swap(above, here);
  }
  for (uint32_t w = 0; w < g.words; ++w) {
    planes.voxels.roots[(g.rows + 1) * g.words + w].before = vertices;
    planes.squares.roots[(g.rows + 1) * g.words + w].before = peaks;
  }
  planes.voxels.count = vertices;
  planes.squares.count = peaks;
  planes.rest_count = rest;
}

template <class K>
void square_rises(const K* keys, const Grid& g, Edges* rises) {
  using L = Lanes<K>;
  const uint32_t pitch = g.pitch;
  std::fill_n(rises, g.words, Edges{0, 0});
  std::fill_n(rises + g.rows * g.words, 2 * g.words, Edges{0, 0});
  for (uint32_t at = g.words; at < g.rows * g.words; ++at) {
    const K* const key = keys + 64 * size_t(at);
    Edges found{0, 0};
    for (int i = 0; i < 64; i += L::kCount) {
      const K* const p = key + i;
      const auto b = L::load(p + 1), c = L::load(p + pitch), d = L::load(p + pitch + 1);
      const auto bottom = L::larger(c, d), right = L::larger(b, d);
      const auto own = L::larger(L::larger(L::load(p), b), bottom);
      const auto below = L::larger(
          bottom, L::larger(L::load(p + 2 * pitch), L::load(p + 2 * pitch + 1)));
      const auto beside = L::larger(right, L::larger(L::load(p + 2), L::load(p + pitch + 2)));
      found.down |= L::not_above(own, below) << i;
      found.right |= L::not_above(own, beside) << i;
    }
    rises[at] = found;
  }
}

// --------------------------------------------------------------------------------------------------
// From cells to roots

struct Finder {
  const Steps* steps;
  const Roots* roots;
  uint32_t* kept;
  int32_t offset[8];

  Finder(const Walks& w, const Grid& g)
      : steps(w.steps.get()),
        roots(w.roots.get()),
        kept(w.kept.get()),
        offset{int32_t(g.pitch), 1, -int32_t(g.pitch), -1, -int32_t(g.pitch) - 1, 0, 0, 0} {}

  PYLOSS_INLINE uint32_t step(const Steps& s, uint32_t v) const {
    const uint32_t bit = v & 63;
    return (s.bit[0] >> bit & 1) | (s.bit[1] >> bit & 1) << 1 | (s.bit[2] >> bit & 1) << 2;
  }
  PYLOSS_INLINE uint32_t number(uint32_t v) const {
    const Roots& r = roots[v >> 6];
    const uint64_t bit = uint64_t(1) << (v & 63);
    return r.cells & bit ? r.before + uint32_t(__builtin_popcountll(r.cells & (bit - 1))) : kept[v];
  }
  PYLOSS_INLINE uint32_t operator()(uint32_t cell) const {
    uint32_t v = cell, length = 0;
    for (const Steps* s = steps + (v >> 6); !(s->stop >> (v & 63) & 1); s = steps + (v >> 6)) {
      v += uint32_t(offset[step(*s, v)]);
      ++length;
    }
    const uint32_t found = number(v);
    if (length > 32) keep(cell, length, found);
    return found;
  }
  // Bounds the time of all walks by the number of cells.
  __attribute__((noinline)) void keep(uint32_t v, uint32_t length, uint32_t found) const {
    for (; length > 0; --length) {
      Steps& s = const_cast<Steps&>(steps[v >> 6]);
      const uint32_t code = step(s, v);
      s.stop |= uint64_t(1) << (v & 63);
      kept[v] = found;
      v += uint32_t(offset[code]);
    }
  }
};

void find_roots(const Walks& walks, const Grid& g, const uint32_t* cells, uint32_t n,
                uint32_t* found) {
  const Finder find(walks, g);
  for (uint32_t i = 0; i < n; ++i) found[i] = find(cells[i]);
}

// Bit i to bit 2 i.
PYLOSS_INLINE uint64_t spread(uint32_t word) {
  uint64_t x = word;
  x = (x | x << 16) & 0x0000ffff0000ffffu;
  x = (x | x << 8) & 0x00ff00ff00ff00ffu;
  x = (x | x << 4) & 0x0f0f0f0f0f0f0f0fu;
  x = (x | x << 2) & 0x3333333333333333u;
  return (x | x << 1) & 0x5555555555555555u;
}

template <class K>
uint32_t collect(const K* keys, const Grid& g, const Planes& planes, const Events* events,
                 Item* items, Sortable<K>* order) {
  const Finder find(planes.voxels, g);
  const Finder squares(planes.squares, g);
  const uint32_t second[2] = {g.pitch, 1};
  uint32_t n = 0;
  for (uint32_t at = g.words; at < (g.rows + 1) * g.words; ++at) {
    const Edges rest = planes.rest[at];
    const Edges extra = events ? events->edges[at] : Edges{0, 0};
    if (!(rest.down | rest.right | extra.down | extra.right)) continue;
    for (uint32_t half = 0; half < 64; half += 32) {
      const uint64_t special =
          spread(uint32_t(extra.down >> half)) | spread(uint32_t(extra.right >> half)) << 1;
      uint64_t edges = special | spread(uint32_t(rest.down >> half)) |
                       spread(uint32_t(rest.right >> half)) << 1;
      const uint32_t first = 2 * (64 * at + half);
      for (; edges; edges &= edges - 1) {
        const uint32_t bit = uint32_t(__builtin_ctzll(edges));
        const uint32_t e = first + bit, p = e >> 1, q = p + second[e & 1];
        const K key = keys[p] > keys[q] ? keys[p] : keys[q];
        order[n] = {key, n};
        if (!(special >> bit & 1)) {
          items[n] = {e, find(p), find(q)};
        } else if (!events->squares) {
          const uint32_t v = keys[p] <= keys[q] ? q : p;
          items[n] = {v, find(v), kEvent};
        } else {
          // The one of the squares beside it whose local pair has this edge.
          const auto leads = [&](uint32_t s, uint32_t direction) {
            return (events->cells[s >> 6] >> (s & 63) & 1) &&
                   squares.step(squares.steps[s >> 6], s) == direction;
          };
          uint32_t s = p;
          if (!(e & 1)) {
            if (leads(p - 1, kRight)) s = p - 1;
          } else if (leads(p - g.pitch, kDown)) {
            s = p - g.pitch;
          } else if (!leads(p, kUp)) {
            s = p + 1;
          }
          items[n] = {s, 0, kOther};
        }
        ++n;
      }
    }
  }
  return n;
}
