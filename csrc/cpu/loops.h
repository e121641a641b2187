// The loops of every instruction set, over the element rule of affine.h. Included once by avx512.cpp, avx2.cpp, neon.cpp
// and plain.cpp, inside the region that is compiled for that instruction set and after a struct `Isa`:
//
//   Isa::stream(char* p, int64_t lines, uint64_t pattern)     64-byte lines, written around the cache
//   Isa::half(half_bits* p, int64_t n, float scale, float offset, bool add)     n halves, rounded as affine.h does
//   Isa::bfloat(bfloat16_bits* p, int64_t n, float scale, float offset, bool add)     the same
//   Isa::fold(bfloat16_bits* p, int64_t groups, float* lanes, float scale, bool writes)     as fold_one_by_one below
//   Isa::decode(const half_bits* p, float* out, int64_t n), Isa::encode(const float* p, half_bits* out, int64_t n)
//   Isa::lookup(uint8_t* p, int64_t n, const uint8_t table[256])
//
// All other loops are plain C++ that the compiler vectorises for the region's instruction set. Everything has internal
// linkage: an inline function shared between regions would be kept once, perhaps with instructions the machine lacks.
// For the same reason nothing from the standard library's templates is called in here.

namespace neutralize::cpu {
namespace {

// 8 bytes that alias anything.
typedef uint64_t __attribute__((may_alias)) Word;

constexpr int64_t kLine = 64;
constexpr int64_t kBlock = 2048;  // elements per pass while a diagonal is put aside: stays in the first-level cache

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// What affine.h says, element by element. For float and double the compiler makes of it what there is to be made; for the
// others these are the tails of vector loops, and all of `plain`.
template <typename T, typename Compute>
inline void one_by_one(T* p, int64_t n, Compute scale, Compute offset, bool add) {
  if (add) {
    for (int64_t i = 0; i < n; ++i) p[i] = Element<T>::store(scale * Element<T>::load(p[i]) + offset);
  } else {
    for (int64_t i = 0; i < n; ++i) p[i] = Element<T>::store(scale * Element<T>::load(p[i]));
  }
}

// Whole groups of Fold<T>::kLanes columns, added into lanes that are all zero before; with `writes`, each times scale.
template <typename T, typename Compute>
inline void fold_one_by_one(T* w, int64_t groups, Compute* __restrict__ lanes, Compute scale, bool writes) {
  constexpr int64_t kLanes = Fold<T>::kLanes;
  for (int64_t group = 0; group < groups; ++group, w += kLanes) {
    if (writes) {
      for (int64_t i = 0; i < kLanes; ++i) {
        const Compute old = Element<T>::load(w[i]);
        lanes[i] += old;
        w[i] = Element<T>::store(scale * old);
      }
    } else {
      for (int64_t i = 0; i < kLanes; ++i) lanes[i] += Element<T>::load(w[i]);
    }
  }
}

template <typename T>
struct Runs {
  using Compute = typename Element<T>::compute;
  using Rule = AffineRule<Compute>;
  static constexpr bool kByte = sizeof(T) == 1;

  // ---- everything off the diagonal ---------------------------------------------------------------------------------
  static void fill(T* p, int64_t n, T value, bool stream) {
    uint64_t pattern = 0;
    for (size_t i = 0; i < 8 / sizeof(T); ++i) {
      std::memcpy(reinterpret_cast<char*>(&pattern) + i * sizeof(T), &value, sizeof(T));
    }
    const auto address = reinterpret_cast<uintptr_t>(p);
    const int64_t bytes = n * static_cast<int64_t>(sizeof(T));
    const int64_t head = smaller(bytes, static_cast<int64_t>(-address & (kLine - 1)));
    for (int64_t i = 0; i < head / static_cast<int64_t>(sizeof(T)); ++i) p[i] = value;
    char* body = reinterpret_cast<char*>(p) + head;
    const int64_t lines = (bytes - head) / kLine;
    if (stream) {
      Isa::stream(body, lines, pattern);
    } else {
      Word* words = reinterpret_cast<Word*>(body);
      for (int64_t i = 0; i < lines * (kLine / 8); ++i) words[i] = pattern;
    }
    for (int64_t i = (head + lines * kLine) / static_cast<int64_t>(sizeof(T)); i < n; ++i) p[i] = value;
  }

  static void affine(T* p, int64_t n, const Rule& rule) {
    if constexpr (kByte) {
      constexpr int64_t kWorthATable = 512;
      if (n >= kWorthATable) {
        uint8_t table[256];
        for (int code = 0; code < 256; ++code) {
          const T old{static_cast<uint8_t>(code)};
          table[code] = Element<T>::store(rule.apply(Element<T>::load(old), rule.fill)).bits;
        }
        return Isa::lookup(reinterpret_cast<uint8_t*>(p), n, table);
      }
      for (int64_t i = 0; i < n; ++i) p[i] = Element<T>::store(rule.apply(Element<T>::load(p[i]), rule.fill));
    } else if constexpr (__is_same(T, half_bits)) {
      Isa::half(p, n, rule.scale, rule.fill, rule.fill != 0);
    } else if constexpr (__is_same(T, bfloat16_bits)) {
      Isa::bfloat(p, n, rule.scale, rule.fill, rule.fill != 0);
    } else {
      one_by_one(p, n, rule.scale, rule.fill, rule.fill != Compute(0));
    }
  }

  // A contiguous run whose elements at first_one, first_one + gap, ... (ones of them) are on the diagonal.
  static void run(T* p, int64_t n, const Rule& rule, bool stream, int64_t first_one, int64_t gap, int64_t ones) {
    if (!rule.reads()) {
      fill(p, n, Element<T>::store(rule.fill), stream);
      const T on_diagonal = Element<T>::store(rule.diagonal_fill);
      for (int64_t i = 0; i < ones; ++i) p[first_one + i * gap] = on_diagonal;
      return;
    }
    const bool untouched = rule.scale == Compute(1) && rule.fill == Compute(0);
    if (ones == 0) {
      if (!untouched) affine(p, n, rule);
      return;
    }
    // The new diagonal is put aside while its neighbours are rewritten, block by block: no branch per element.
    T aside[kBlock];
    int64_t one = 0;
    for (int64_t block = 0; block < n && (one < ones || !untouched); block += kBlock) {
      const int64_t end = smaller(block + kBlock, n);
      const int64_t from = one;
      for (int64_t at = first_one + one * gap; one < ones && at < end; ++one, at += gap) {
        aside[one - from] = Element<T>::store(rule.apply(Element<T>::load(p[at]), rule.diagonal_fill));
      }
      if (!untouched) affine(p + block, end - block, rule);
      for (int64_t i = from; i < one; ++i) p[first_one + i * gap] = aside[i - from];
    }
  }

  static void rewrite(const RewriteJob& job, int64_t first, int64_t last) {
    const Matrix& m = job.matrix;
    const Rule rule(job.scale, job.diagonal, job.fill);
    const bool diagonal = rule.writes_diagonal() && job.ones_rows.first < job.ones_rows.last;
    T* base = reinterpret_cast<T*>(m.data);
    if (m.contiguous()) {
      int64_t from = 0, to = 0, first_one = 0;
      const int64_t gap = m.cols + job.ones.step;  // one row on; positive wherever two rows have a one
      if (diagonal) {
        // A one lies in its own row of the flattened matrix, so only the first and last row of the range need a look.
        from = larger(job.ones_rows.first, first / m.cols);
        to = smaller(job.ones_rows.last, (last - 1) / m.cols + 1);
        if (from < to && from * m.cols + job.ones.column(from) < first) ++from;
        if (from < to && (to - 1) * m.cols + job.ones.column(to - 1) >= last) --to;
        if (from < to) first_one = from * m.cols + job.ones.column(from) - first;
      }
      run(base + first, last - first, rule, job.stream, first_one, gap, larger(to - from, 0));
      return;
    }
    for (int64_t row = first / m.cols; row * m.cols < last; ++row) {
      const int64_t begin = larger(first - row * m.cols, 0);
      const int64_t end = smaller(last - row * m.cols, m.cols);
      int64_t at = -1;
      if (diagonal && row >= job.ones_rows.first && row < job.ones_rows.last) at = job.ones.column(row) - begin;
      run(base + row * m.row_stride + begin, end - begin, rule, job.stream, at, 0, at >= 0 && at < end - begin);
    }
  }

  // ---- fold ----------------------------------------------------------------------------------------------------------
  static constexpr int64_t kLanes = Fold<T>::kLanes;

  static void rescale_fold(const FoldJob& job, int64_t first, int64_t last) {
    const Rule rule(job.scale, 0.0, 0.0);
    const Compute shift = static_cast<Compute>(job.shift);
    const int64_t cols = job.weight.cols;
    // A type of one byte has 256 values: both conversions become tables, worked out once per call.
    Compute decoded[kByte ? 256 : 1];
    T scaled[kByte ? 256 : 1];
    if constexpr (kByte) {
      for (int code = 0; code < 256; ++code) {
        decoded[code] = Element<T>::load(T{static_cast<uint8_t>(code)});
        scaled[code] = Element<T>::store(rule.reads() ? rule.scale * decoded[code] : Compute(0));
      }
    }
    const bool writes = rule.scale != Compute(1);
    const T zero = Element<T>::store(Compute(0));
    for (int64_t row = first; row < last; ++row) {
      T* w = reinterpret_cast<T*>(job.weight.data) + row * job.weight.row_stride;
      T* b = reinterpret_cast<T*>(job.bias.data) + row * job.bias.row_stride;
      Compute lanes[kLanes] = {};
      int64_t col = 0;
      if constexpr (__is_same(T, bfloat16_bits)) {
        if (rule.reads()) {
          col = cols / kLanes * kLanes;
          Isa::fold(w, cols / kLanes, lanes, rule.scale, writes);
        }
      }
      for (; col + kLanes <= cols; col += kLanes)
        group<true>(w + col, kLanes, lanes, rule, writes, decoded, scaled, zero);
      if (col < cols) group<false>(w + col, cols - col, lanes, rule, writes, decoded, scaled, zero);
      for (int64_t half = kLanes / 2; half > 0; half /= 2) {
        for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
      }
      *b = Element<T>::store(Fold<T>::bias(Element<T>::load(*b), shift, lanes[0]));
    }
  }

  // At most one column per lane. `Whole`: exactly one, a count the compiler knows.
  template <bool Whole>
  static void group(T* w, int64_t given, Compute* __restrict__ lanes, const Rule& rule, bool writes,
                    const Compute* decoded, const T* scaled, T zero) {
    const int64_t n = Whole ? kLanes : given;
    if constexpr (kByte) {
      for (int64_t i = 0; i < n; ++i) {
        const uint8_t code = w[i].bits;
        lanes[i] += decoded[code];
        w[i] = scaled[code];
      }
    } else if constexpr (__is_same(T, half_bits)) {
      float values[kLanes];
      Isa::decode(w, values, n);
      for (int64_t i = 0; i < n; ++i) lanes[i] += values[i];
      if (!writes) return;
      for (int64_t i = 0; i < n; ++i) values[i] = rule.reads() ? rule.scale * values[i] : 0.0f;
      Isa::encode(values, w, n);
    } else if (!writes) {
      for (int64_t i = 0; i < n; ++i) lanes[i] += Element<T>::load(w[i]);
    } else if (rule.reads()) {
      const Compute scale = rule.scale;
      for (int64_t i = 0; i < n; ++i) {
        const Compute old = Element<T>::load(w[i]);
        lanes[i] += old;
        w[i] = Element<T>::store(scale * old);
      }
    } else {
      for (int64_t i = 0; i < n; ++i) {
        lanes[i] += Element<T>::load(w[i]);
        w[i] = zero;
      }
    }
  }
};

void rewrite(const RewriteJob& job, int64_t first, int64_t last) {
  dispatch(job.matrix.storage, [&](auto tag) { Runs<typename decltype(tag)::type>::rewrite(job, first, last); });
}

void rescale_fold(const FoldJob& job, int64_t first, int64_t last) {
  dispatch(job.weight.storage, [&](auto tag) { Runs<typename decltype(tag)::type>::rescale_fold(job, first, last); });
}

}  // namespace
}  // namespace neutralize::cpu
