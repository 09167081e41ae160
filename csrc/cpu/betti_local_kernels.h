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

// Of a row of n values; the first n of `to`. Integers only, which the compiler vectorises.
template <class R, class K>
bool make_row(const R* x, uint32_t n, K flip, K* to, Range<K>& range) {
  constexpr K kSign = K(uint64_t(1) << (8 * sizeof(K) - 1));
  constexpr K kInfinity = sizeof(K) == 4 ? K(0x7f800000) : K(uint64_t(0x7ff) << 52);
  K low = range.low, high = range.high, largest = 0;
  for (uint32_t i = 0; i < n; ++i) {
    K u;
    const R value = x[i];
    memcpy(&u, &value, sizeof u);
    u ^= flip;
    u &= -K(u != kSign);  // -0 becomes +0
    largest = std::max(largest, K(u & kFrame<K>));
    const K key = u ^ ((u >> (8 * sizeof(K) - 1)) & kFrame<K>);
    low = std::min(low, key);
    high = std::max(high, key);
    to[i] = key;
  }
  range = {low, high};
  return largest <= kInfinity;
}

template <class K>
void fill_frame(const Grid& g, K* keys) {
  std::fill_n(keys, g.pitch, kFrame<K>);
  for (uint32_t row = 1; row <= g.rows; ++row) {
    std::fill(keys + row * g.pitch + g.cols, keys + (row + 1) * g.pitch, kFrame<K>);
  }
  std::fill_n(keys + (g.rows + 1) * g.pitch, g.pitch + 64, kFrame<K>);
}

template <class R, class K>
bool make_keys(const R* image, const Grid& g, bool superlevel, K* keys, Range<K>& range) {
  const K flip = superlevel ? K(uint64_t(1) << (8 * sizeof(K) - 1)) : K(0);
  range = {kFrame<K>, -kFrame<K>};
  fill_frame(g, keys);
  bool good = true;
  for (uint32_t row = 0; row < g.rows; ++row) {
    const R* const x = image + int64_t(row) * g.cols;
    good &= make_row(x, g.cols, flip, keys + (row + 1) * g.pitch, range);
  }
  return good;
}

template <class K>
void min_row(const K* a, const K* b, uint32_t n, K* to, Range<K>& range) {
  K low = range.low, high = range.high;
  for (uint32_t i = 0; i < n; ++i) {
    const K key = std::min(a[i], b[i]);
    low = std::min(low, key);
    high = std::max(high, key);
    to[i] = key;
  }
  range = {low, high};
}

template <class K>
Range<K> min_keys(const K* a, const K* b, const Grid& g, K* keys) {
  Range<K> range{kFrame<K>, -kFrame<K>};
  fill_frame(g, keys);
  for (uint32_t row = 1; row <= g.rows; ++row) {
    const size_t begin = size_t(row) * g.pitch;
    min_row(a + begin, b + begin, g.cols, keys + begin, range);
  }
  return range;
}

// Of a word of voxels p: q at the right, r below, s at the lower right; bits as named.
struct Compared {
  uint64_t p_le_q, p_le_r, p_ge_r, p_le_s;
  uint64_t p_le_below_left;
  uint64_t top_le_bottom, bottom_le_top;  // of the larger ends of the two edges of a square
};

template <class K>
PYLOSS_INLINE Compared compare(const K* p, uint32_t pitch) {
  using L = Lanes<K>;
  Compared c{};
  for (int i = 0; i < 64; i += L::kCount) {
    const auto a = L::load(p + i), b = L::load(p + i + 1);
    const auto below = L::load(p + i + pitch), across = L::load(p + i + pitch + 1);
    const auto top = L::larger(a, b), bottom = L::larger(below, across);
    c.p_le_q |= L::not_above(a, b) << i;
    c.p_le_r |= L::not_above(a, below) << i;
    c.p_ge_r |= L::not_above(below, a) << i;
    c.p_le_s |= L::not_above(a, across) << i;
    c.p_le_below_left |= L::not_above(a, L::load(p + i + pitch - 1)) << i;
    c.top_le_bottom |= L::not_above(top, bottom) << i;
    c.bottom_le_top |= L::not_above(bottom, top) << i;
  }
  return c;
}

// What later words and rows need to know of a word.
struct Paired {
  Compared is;
  Directions voxels, squares;
};

// From the word's own bits and the one before: those of the neighbours at the left.
PYLOSS_INLINE uint64_t from_left(uint64_t before, uint64_t word) {
  return word << 1 | before >> 63;
}
PYLOSS_INLINE uint64_t from_right(uint64_t word, uint64_t next) {
  return word >> 1 | next << 63;
}

// A byte of each cell of a set.
struct Bytes {
#if PYLOSS_VECTOR_BYTES == 64
  static constexpr int kCount = 64;
  using V = __m512i;
  static V load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static void store(uint8_t* p, V v) { _mm512_storeu_si512(p, v); }
  static V fill(uint8_t x) { return _mm512_set1_epi8(char(x)); }
  static V set(V v, uint64_t cells, V x) { return _mm512_mask_mov_epi8(v, cells, x); }
  // One more than x, or kRun.
  static V next_run(V x) { return _mm512_adds_epu8(_mm512_max_epu8(x, fill(kRun - 1)), fill(1)); }
#else
  static constexpr int kCount = 8;
  using V = uint64_t;
  static V load(const uint8_t* p) {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
  }
  static void store(uint8_t* p, V v) { memcpy(p, &v, sizeof v); }
  static V fill(uint8_t x) { return 0x0101010101010101u * x; }
  static V set(V v, uint64_t cells, V x) {
    const uint64_t spread = fill(uint8_t(cells)) & 0x8040201008040201u;
    const uint64_t ones = (spread + 0x7f7f7f7f7f7f7f7fu) >> 7 & 0x0101010101010101u;
    const uint64_t mask = ones * 0xff;
    return (v & ~mask) | (x & mask);
  }
  static V next_run(V x) {
    uint8_t bytes[8];
    store(bytes, x);
    for (uint8_t& b : bytes) b = b < kRun ? kRun : b < 255 ? b + 1 : 255;
    return load(bytes);
  }
#endif
};

// The codes of a word's cells, of which `runs` continue those of `before`.
PYLOSS_INLINE void write_codes(const Directions& d, uint64_t cells, uint64_t runs,
                               uint64_t vertical, const uint8_t* before, uint8_t* to) {
  using B = Bytes;
  for (int i = 0; i < 64; i += B::kCount) {
    B::V v = B::set(B::fill(kOutside), cells >> i, B::fill(kStop));
    v = B::set(v, d.right >> i, B::fill(kRight));
    v = B::set(v, d.left >> i, B::fill(kLeft));
    v = B::set(v, d.up_left >> i, B::fill(kUpLeft));
    v = B::set(v, vertical >> i, B::fill(kVertical));
    v = B::set(v, runs >> i, B::next_run(B::load(before + i)));
    B::store(to + i, v);
  }
}

template <class K>
void pair_locally(const K* keys, const Grid& g, const Range<K>* range, Planes& planes) {
  // Two rows, each with an empty word before and after.
  std::vector<Paired> rows(2 * (g.words + 2), Paired{});
  Paired *above = rows.data() + 1, *here = above + g.words + 2;
  uint32_t vertices = 0, peaks = 1, rest = 0;
  for (uint32_t w = 0; w < g.words; ++w) {
    planes.voxels.roots[w] = {0, 0};
    planes.squares.roots[w] = {0, peaks};
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
      const uint64_t left_not_above = from_left(here[int(w) - 1].is.p_le_q, c.p_le_q);
      Directions& v = x.voxels;
      v.up = voxels & north.p_le_r;
      v.left = voxels & ~v.up & left_not_above;
      const uint64_t others = voxels & ~v.up & ~v.left;
      v.down = others & ~c.p_le_r;
      v.right = others & ~c.p_ge_r & ~c.p_le_q;
      const uint64_t minima = others & ~(v.down | v.right);
      planes.voxels.directions[at] = v;
      planes.voxels.roots[at] = {minima, vertices};
      vertices += uint32_t(bit_count(minima));

      // A square: the last of its edges, bottom, right, top, left, that has its value.
      Directions& s = x.squares;
      s.down = squares & c.top_le_bottom;
      s.right = squares & ~c.top_le_bottom & c.p_le_q;
      const uint64_t corner = squares & ~c.top_le_bottom & ~c.p_le_q;  // it is the one maximum
      s.up = corner & ~north.top_le_bottom;
      // Its top edge leads to a younger square: further along the edges of the same voxel.
      const uint64_t further = corner & north.top_le_bottom & ~north.bottom_le_top;
      s.left = further & (~left_not_above | c.p_le_below_left);
      s.up_left = further & ~s.left & ~from_left(above[int(w) - 1].is.p_le_s, north.p_le_s);
      const uint64_t maxima = squares & ~(s.down | s.right | s.up | s.left | s.up_left);
      planes.squares.directions[at] = s;
      planes.squares.roots[at] = {maxima, peaks};
      peaks += uint32_t(bit_count(maxima));

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
                            ~(x.is.p_le_r | x.voxels.down |
                              from_left(before.squares.right, x.squares.right) | x.squares.left);
      const uint64_t right =
          Grid::below(w, g.cols - 1) &
          ~(from_right(x.voxels.left, next.voxels.left) | x.voxels.right | x.squares.up |
            above[w].squares.down | from_right(x.squares.up_left, next.squares.up_left));
      planes.rest[row * g.words + w] = {down, right};
      rest += uint32_t(bit_count(down) + bit_count(right));
    }
    std::swap(above, here);
  }
  planes.voxels.count = vertices;
  planes.squares.count = peaks;
  planes.rest_count = rest;
}

void fill_codes(const Walks& walks, const Grid& g) {
  uint8_t* const code = walks.code.get();
  std::fill_n(code, g.pitch, kOutside);
  std::fill_n(code + (g.rows + 1) * g.pitch, g.pitch, kOutside);
  for (uint32_t i = 0; i < g.rows; ++i) {
    // In the order of runs: upwards they continue those above, downwards those below.
    const uint32_t row = walks.squares ? g.rows - i : i + 1;
    for (uint32_t w = 0; w < g.words; ++w) {
      const uint32_t at = row * g.words + w;
      const Directions& d = walks.directions[at];
      uint8_t* const to = code + 64 * size_t(at);
      if (walks.squares) {
        const uint64_t cells = row == g.rows ? 0 : Grid::below(w, g.cols - 1);
        write_codes(d, cells, d.down, d.up, to + g.pitch, to);
      } else {
        write_codes(d, Grid::below(w, g.cols), d.up, d.down, to - g.pitch, to);
      }
    }
  }
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
      const auto below =
          L::larger(bottom, L::larger(L::load(p + 2 * pitch), L::load(p + 2 * pitch + 1)));
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
  uint8_t* code;
  const Roots* roots;
  uint32_t* kept;
  uint32_t offset[256];  // by code, modulo 2^32; 0 where a walk stops

  Finder(const Walks& w, const Grid& g)
      : code(w.code.get()), roots(w.roots.get()), kept(w.kept.get()) {
    const uint32_t run = w.squares ? g.pitch : 0 - g.pitch;
    offset[kStop] = offset[kOutside] = 0;
    offset[kRight] = 1;
    offset[kLeft] = uint32_t(-1);
    offset[kUpLeft] = 0 - g.pitch - 1;
    offset[kVertical] = 0 - run;
    for (uint32_t i = kRun; i < 256; ++i) offset[i] = run * (i - kRun + 1);
  }
  PYLOSS_INLINE uint32_t step(uint32_t v) const { return v + offset[code[v]]; }
  PYLOSS_INLINE uint32_t number(uint32_t v) const {
    const Roots& r = roots[v >> 6];
    const uint64_t bit = uint64_t(1) << (v & 63);
    if (r.cells & bit) return r.before + uint32_t(bit_count(r.cells & (bit - 1)));
    return code[v] == kStop ? kept[v] : 0;
  }
  // A few steps without a branch, which would be mispredicted: most walks are short.
  PYLOSS_INLINE uint32_t operator()(uint32_t cell) const {
    const uint32_t v = step(step(step(step(cell))));
    return PYLOSS_LIKELY(code[v] <= kOutside) ? number(v) : rest(cell, v);
  }
  PYLOSS_NOINLINE uint32_t rest(uint32_t cell, uint32_t v) const {
    uint32_t length = 4;
    for (; code[v] > kOutside; v = step(v)) ++length;
    const uint32_t found = number(v);
    // Bounds the time of all walks by the number of cells.
    if (length > 12) {
      for (uint32_t u = cell; u != v;) {
        const uint32_t next = step(u);
        code[u] = kStop;
        kept[u] = found;
        u = next;
      }
    }
    return found;
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
  const uint32_t second[2] = {g.pitch, 1};
  uint32_t n = 0;
  for (uint32_t at = g.words; at < (g.rows + 1) * g.words; ++at) {
    const Edges rest = planes.rest[at];
    const Edges extra = events ? events->edges[at] : Edges{0, 0};
    if (!(rest.down | rest.right | extra.down | extra.right)) continue;
    for (uint32_t half = 0; half < 64; half += 32) {
      const uint64_t special =
          spread(uint32_t(extra.down >> half)) | spread(uint32_t(extra.right >> half)) << 1;
      uint64_t edges =
          special | spread(uint32_t(rest.down >> half)) | spread(uint32_t(rest.right >> half)) << 1;
      const uint32_t first = 2 * (64 * at + half);
      for (; edges; edges &= edges - 1) {
        const uint32_t bit = uint32_t(lowest_bit(edges));
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
          const auto leads = [&](uint32_t s, uint64_t Directions::* direction) {
            const uint64_t set =
                events->cells[s >> 6] & planes.squares.directions[s >> 6].*direction;
            return set >> (s & 63) & 1;
          };
          uint32_t s = p;
          if (!(e & 1)) {
            if (leads(p - 1, &Directions::right)) s = p - 1;
          } else if (leads(p - g.pitch, &Directions::down)) {
            s = p - g.pitch;
          } else if (!leads(p, &Directions::up)) {
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

void find_sides(const Planes& planes, const Grid& g, Item* items, uint32_t n) {
  const Finder find(planes.squares, g);
  const uint32_t side[2] = {1, g.pitch};
  uint32_t which[512];
  for (uint32_t begin = 0; begin < n; begin += 512) {
    const uint32_t end = std::min(begin + 512, n);
    uint32_t count = 0;
    for (uint32_t i = begin; i < end; ++i) {
      which[count] = i;
      count += (items[i].b == kCycle) | (items[i].b == kOther);
    }
    for (uint32_t i = 0; i < count; ++i) {
      Item& x = items[which[i]];
      const bool event = x.b == kOther;
      const uint32_t p = x.cell >> 1;
      x.a = find(event ? x.cell : p - side[x.cell & 1]);
      x.b = event ? kOther : find(p);
    }
  }
}
