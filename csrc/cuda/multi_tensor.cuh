// The kernels' device code, once: compiled by nvcc, and by g++ through tests/emulation/emulation.h, which defines the
// CUDA keywords and walks the grid on the CPU. It is the same text, because whatever needs a barrier is cut into phases
// and the barriers stand in one place, `run`. Who owns what: Note [Chunks] in launch_plan.h.
//
// Note [Same bits]
//   The element rule is affine.h's; nothing is contracted (--fmad=false), shuffled or reassociated. On a GPU half and
//   bfloat16 go through the conversion instructions, which round as affine.h does; the payload and sign of a NaN are
//   theirs.
#pragma once

#include "launch_plan.h"

// The emulated grid watches every access to tensor memory here; on a GPU this is nothing.
#if !defined(NEUTRALIZE_WATCH)
#define NEUTRALIZE_WATCH(pointer, bytes, writes)
#endif

namespace neutralize {
namespace cuda {

__device__ __forceinline__ uint4 load_word(const unsigned char* pointer) {
  NEUTRALIZE_WATCH(pointer, kWord, false);
  return *reinterpret_cast<const uint4*>(pointer);
}
__device__ __forceinline__ void store_word(unsigned char* pointer, const uint4& value) {
  NEUTRALIZE_WATCH(pointer, kWord, true);
  *reinterpret_cast<uint4*>(pointer) = value;
}
template <typename T>
__device__ __forceinline__ T load_element(const unsigned char* pointer) {
  NEUTRALIZE_WATCH(pointer, sizeof(T), false);
  return *reinterpret_cast<const T*>(pointer);
}
template <typename T>
__device__ __forceinline__ void store_element(unsigned char* pointer, T value) {
  NEUTRALIZE_WATCH(pointer, sizeof(T), true);
  *reinterpret_cast<T*>(pointer) = value;
}

template <typename Compute>
__device__ __forceinline__ Compute coefficient(uint64_t bits);
template <>
__device__ __forceinline__ float coefficient<float>(uint64_t bits) {
  return float_of(static_cast<uint32_t>(bits));
}
template <>
__device__ __forceinline__ double coefficient<double>(uint64_t bits) {
#if defined(__CUDA_ARCH__)
  return __longlong_as_double(static_cast<long long>(bits));
#else
  double value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

// ---- sixteen bytes as elements -------------------------------------------------------------------------------------
template <typename T>
constexpr int kElementsPerWord = kWord / static_cast<int>(sizeof(T));

template <typename T>
union Word {
  uint4 bits;
  T elements[kElementsPerWord<T>];
};

template <typename T>
struct Convert {
  using Compute = typename Element<T>::compute;
  static __device__ __forceinline__ Compute load(T stored) { return Element<T>::load(stored); }
  static __device__ __forceinline__ T store(Compute value) { return Element<T>::store(value); }
  static __device__ __forceinline__ void unpack(const uint4& bits, Compute (&values)[kElementsPerWord<T>]) {
    Word<T> word;
    word.bits = bits;
#pragma unroll
    for (int i = 0; i < kElementsPerWord<T>; ++i) values[i] = Element<T>::load(word.elements[i]);
  }
  static __device__ __forceinline__ uint4 pack(const Compute (&values)[kElementsPerWord<T>]) {
    Word<T> word;
#pragma unroll
    for (int i = 0; i < kElementsPerWord<T>; ++i) word.elements[i] = Element<T>::store(values[i]);
    return word.bits;
  }
};

// A byte's exponent and mantissa, put where float has them, are its value times a power of two: the product is exact,
// subnormals included. A handful of instructions where the branches of affine.h would take dozens. (Stores of one-byte
// types are looked up.)
template <typename T, typename Format>
struct ConvertByte {
  static __device__ __forceinline__ float decode(uint32_t code) {
    const uint32_t magnitude = code & Format::kMagnitude;
    const uint32_t shifted = (code & Format::kSignBit) << 24 | magnitude << Format::kShift;
    // Infinity and NaN take float's exponent; the mantissa above tells them apart.
    const bool special =
        Format::kOverflow == Format::kInfinity ? magnitude >= Format::kInfinity : magnitude == Format::kNan;
    const float power = float_of(static_cast<uint32_t>(127 + 127 - Format::kBias) << 23);
    return special ? float_of(shifted | 0x7f800000u) : float_of(shifted) * power;
  }
  static __device__ __forceinline__ float load(T stored) { return decode(stored.bits); }
  static __device__ __forceinline__ T store(float value) { return Element<T>::store(value); }
  static __device__ __forceinline__ void unpack(const uint4& bits, float (&values)[kWord]) {
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < kWord; ++i) values[i] = decode((words[i / 4] >> (8 * (i % 4))) & 255u);
  }
};
template <>
struct Convert<e4m3_bits> : ConvertByte<e4m3_bits, E4m3Format> {};
template <>
struct Convert<e5m2_bits> : ConvertByte<e5m2_bits, E5m2Format> {};

#if defined(__CUDA_ARCH__)
// The arithmetic of affine.h for these two would cost more instructions than memory bandwidth leaves time for.
template <>
struct Convert<half_bits> {
  static __device__ __forceinline__ float load(half_bits stored) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(stored.bits));
    return value;
  }
  static __device__ __forceinline__ half_bits store(float value) {
    half_bits stored;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(stored.bits) : "f"(value));
    return stored;
  }
  static __device__ __forceinline__ void unpack(const uint4& bits, float (&values)[8]) {
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = load({static_cast<uint16_t>(words[i / 2] >> (16 * (i % 2)))});
  }
  static __device__ __forceinline__ uint32_t pack_pair(float low, float high) {
#if __CUDA_ARCH__ >= 800
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#else
    return store(low).bits | static_cast<uint32_t>(store(high).bits) << 16;
#endif
  }
  static __device__ __forceinline__ uint4 pack(const float (&values)[8]) {
    return make_uint4(pack_pair(values[0], values[1]), pack_pair(values[2], values[3]), pack_pair(values[4], values[5]),
                      pack_pair(values[6], values[7]));
  }
};

#if __CUDA_ARCH__ >= 800
template <>
struct Convert<bfloat16_bits> {
  static __device__ __forceinline__ float load(bfloat16_bits stored) { return Element<bfloat16_bits>::load(stored); }
  static __device__ __forceinline__ bfloat16_bits store(float value) {
    bfloat16_bits stored;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(stored.bits) : "f"(value));
    return stored;
  }
  static __device__ __forceinline__ void unpack(const uint4& bits, float (&values)[8]) {
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = float_of(i % 2 == 0 ? words[i / 2] << 16 : words[i / 2] & 0xffff0000u);
  }
  static __device__ __forceinline__ uint32_t pack_pair(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
  }
  static __device__ __forceinline__ uint4 pack(const float (&values)[8]) {
    return make_uint4(pack_pair(values[0], values[1]), pack_pair(values[2], values[3]), pack_pair(values[4], values[5]),
                      pack_pair(values[6], values[7]));
  }
};
#endif
#endif

// ---- where the block stands ----------------------------------------------------------------------------------------
// The last entry that starts at or before this chunk. Every thread of the block asks the same, so each probe is one
// uniform read of the parameters.
template <typename Table>
__device__ __forceinline__ uint32_t find_entry(const Table& table, uint32_t chunk) {
  uint32_t low = 0, high = table.entries;
  while (high - low > 1) {
    const uint32_t middle = (low + high) / 2;
    if (table.entry(middle).first_chunk <= chunk) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// The ones of D within one segment, as offsets in bytes from its begin.
struct Hits {
  int32_t first;  // greater than last: none
  int32_t last;
  uint32_t distance;
  uint32_t reciprocal;

  __device__ __forceinline__ bool any() const { return first <= last; }

  // Bit b: a one starts at offset + b, for b < width <= 16. One multiplication per word, whatever it holds.
  __device__ __forceinline__ uint32_t within(int32_t offset, int32_t width) const {
    if (offset + width <= first || offset > last) return 0;
    int32_t hit = first;
    if (offset > first) {
      // The rounded-down reciprocal undershoots the quotient by one at most.
      hit += static_cast<int32_t>(__umulhi(static_cast<uint32_t>(offset - first), reciprocal) * distance);
      while (hit < offset) hit += static_cast<int32_t>(distance);
    }
    uint32_t bits = 0;
    for (; hit < offset + width && hit <= last; hit += static_cast<int32_t>(distance)) bits |= 1u << (hit - offset);
    return bits;
  }
};

// A run of consecutive bytes inside a chunk, and the lanes that walk it.
struct Segment {
  unsigned char* begin;
  int32_t bytes;
  int32_t lane;
  int32_t lanes;
  Hits hits;

  __device__ __forceinline__ int32_t head() const {
    const int32_t to_word = static_cast<int32_t>(-reinterpret_cast<uintptr_t>(begin) & (kWord - 1));
    return to_word < bytes ? to_word : bytes;
  }
};

__device__ __forceinline__ Hits contiguous_hits(const RewriteForm& form, int64_t begin, int64_t end) {
  Hits hits{1, 0, form.chunk_hit_distance, form.chunk_hit_reciprocal};
  if (form.hit_count == 0) return hits;
  const int64_t last = form.hit_first + (form.hit_count - 1) * form.hit_distance;
  int64_t hit = form.hit_first;
  if (begin > hit) {
    hit +=
        static_cast<int64_t>(__umul64hi(static_cast<uint64_t>(begin - hit), form.hit_reciprocal)) * form.hit_distance;
    while (hit < begin) hit += form.hit_distance;
  }
  if (hit > last || hit >= end) return hits;
  hits.first = static_cast<int32_t>(hit - begin);
  hits.last = static_cast<int32_t>((last < end ? last : end - 1) - begin);
  return hits;
}

__device__ __forceinline__ Hits row_hits(const RewriteForm& form, int64_t row, int64_t begin, int64_t end) {
  Hits hits{1, 0, form.chunk_hit_distance, form.chunk_hit_reciprocal};
  const int64_t at = row - form.hit_row;
  if (at < 0 || at >= form.hit_count) return hits;
  const int64_t column = form.hit_first + at * form.hit_distance;
  if (column >= begin && column < end) hits.first = hits.last = static_cast<int32_t>(column - begin);
  return hits;
}

// Calls body(segment) for each segment of the chunk that this thread takes part in. Contiguous memory is one row.
template <typename Body>
__device__ __forceinline__ void for_each_segment(const RewriteEntry& entry, const RewriteForm& form, uint32_t chunk,
                                                 int32_t thread, Body&& body) {
  const bool contiguous = form.row_stride == 0;
  const int64_t whole = contiguous ? entry.extent : form.row_bytes;
  uint32_t piece = chunk - entry.first_chunk, group = 0;
  if (!contiguous) {
    group = piece / form.pieces;
    piece -= group * form.pieces;
  }
  int64_t begin = 0, end = whole;
  if (contiguous || form.pieces > 1) {
    const int64_t lead = static_cast<int64_t>(reinterpret_cast<uintptr_t>(entry.data) & (kLine - 1));
    begin = static_cast<int64_t>(piece) * kChunkBytes - lead;
    end = begin + kChunkBytes;
    begin = begin < 0 ? 0 : begin;
    end = end < whole ? end : whole;
  }
  const int64_t row_begin = static_cast<int64_t>(group) * form.rows_per_chunk;
  const int64_t rows = contiguous ? 1 : entry.extent;
  const int64_t row_end = row_begin + form.rows_per_chunk < rows ? row_begin + form.rows_per_chunk : rows;
  const int32_t lanes = 1 << form.lanes_log2;
  for (int64_t row = row_begin + (thread >> form.lanes_log2); row < row_end; row += kThreads >> form.lanes_log2) {
    body(Segment{entry.data + row * form.row_stride + begin, static_cast<int32_t>(end - begin), thread & (lanes - 1),
                 lanes, contiguous ? contiguous_hits(form, begin, end) : row_hits(form, row, begin, end)});
  }
}

// ---- W <- diagonal * D + fill: reads nothing, every storage type ---------------------------------------------------
template <int TableBytes>
struct Fill {
  using Parameters = Table<RewriteLayout, TableBytes>;
  static constexpr bool kSetup = false;
  static constexpr int kPhases = 1;
  static constexpr int kBlocksPerProcessor = 8;
  struct Shared {};

  const Parameters& table;
  uint32_t entry_index;
  uint32_t chunk;
  int32_t thread;

  __device__ __forceinline__ int32_t steps() const { return 1; }

  template <int kPhase>
  __device__ __forceinline__ void phase(Shared&, int32_t) {
    const RewriteEntry& entry = table.entry(entry_index);
    const RewriteForm& form = table.form(entry.form);
    const uint64_t fill = form.fill, diagonal_fill = form.diagonal_fill;
    const int32_t size = static_cast<int32_t>(form.element_bytes);
    for_each_segment(entry, form, chunk, thread,
                     [&](const Segment& segment) { walk(segment, fill, diagonal_fill, size); });
  }

  // Four bits, one per byte, as a mask of four bytes.
  static __device__ __forceinline__ uint32_t byte_mask(uint32_t bits) {
    return (((bits & 15u) * 0x00204081u) & 0x01010101u) * 255u;
  }

  static __device__ __forceinline__ void walk(const Segment& segment, uint64_t fill, uint64_t diagonal_fill,
                                              int32_t size) {
    const int32_t head = segment.head();
    const int32_t words = (segment.bytes - head) / kWord;
    const int32_t edge = segment.bytes - words * kWord;  // bytes of head and tail
    for (int32_t at = segment.lane; at < edge; at += segment.lanes) {
      const int32_t offset = at < head ? at : at + words * kWord;
      // Elements are aligned to their size, so an address gives the byte of the pattern.
      const uint64_t pattern = segment.hits.within(offset & -size, 1) != 0 ? diagonal_fill : fill;
      const int32_t byte = static_cast<int32_t>(reinterpret_cast<uintptr_t>(segment.begin + offset) & 7);
      store_element<unsigned char>(segment.begin + offset, static_cast<unsigned char>(pattern >> (8 * byte)));
    }
    const uint32_t low = static_cast<uint32_t>(fill), high = static_cast<uint32_t>(fill >> 32);
    const uint4 plain = make_uint4(low, high, low, high);
    unsigned char* body = segment.begin + head;
    if (!segment.hits.any()) {
      for (int32_t word = segment.lane; word < words; word += segment.lanes * kUnroll) {
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          const int32_t at = word + u * segment.lanes;
          if (at < words) store_word(body + at * kWord, plain);
        }
      }
      return;
    }
    const uint32_t flip_low = low ^ static_cast<uint32_t>(diagonal_fill);
    const uint32_t flip_high = high ^ static_cast<uint32_t>(diagonal_fill >> 32);
    for (int32_t word = segment.lane; word < words; word += segment.lanes) {
      // A bit per element that is a one; the product spreads it over the element's bytes.
      const uint32_t bytes = segment.hits.within(head + word * kWord, kWord) * ((1u << size) - 1u);
      store_word(body + word * kWord,
                 make_uint4(low ^ (flip_low & byte_mask(bytes)), high ^ (flip_high & byte_mask(bytes >> 4)),
                            low ^ (flip_low & byte_mask(bytes >> 8)), high ^ (flip_high & byte_mask(bytes >> 12))));
    }
  }
};

// ---- W <- scale * W + diagonal * D + fill --------------------------------------------------------------------------
// One word of elements through the rule.
template <typename T, bool kOneByte = sizeof(T) == 1>
struct WordRule {
  using Compute = typename Element<T>::compute;
  static constexpr bool kSetup = false;
  struct Shared {};
  AffineRule<Compute> rule;

  __device__ __forceinline__ void setup(Shared&, int32_t) const {}

  __device__ __forceinline__ T element(const Shared&, T old, bool hit) const {
    return Convert<T>::store(rule.apply(Convert<T>::load(old), hit ? rule.diagonal_fill : rule.fill));
  }

  // Bit i * sizeof(T) of hits: element i is on the diagonal.
  __device__ __forceinline__ uint4 word(const Shared&, const uint4& old, uint32_t hits) const {
    Compute values[kElementsPerWord<T>];
    Convert<T>::unpack(old, values);
    if (hits == 0) {
#pragma unroll
      for (int i = 0; i < kElementsPerWord<T>; ++i) values[i] = rule.apply(values[i], rule.fill);
    } else {
#pragma unroll
      for (int i = 0; i < kElementsPerWord<T>; ++i) {
        values[i] = rule.apply(values[i], (hits >> (i * sizeof(T))) & 1u ? rule.diagonal_fill : rule.fill);
      }
    }
    return Convert<T>::pack(values);
  }
};

// A byte has 256 values: the block tabulates the rule once and looks it up. A table of 256 bytes is two words per bank
// of shared memory, so even random bytes conflict two ways at most.
template <typename T>
struct WordRule<T, true> {
  static constexpr bool kSetup = true;
  struct Shared {
    unsigned char codes[2][256];  // off the diagonal, on it
  };
  static_assert(kThreads == 256, "each thread computes one code of each table");
  AffineRule<float> rule;

  __device__ __forceinline__ void setup(Shared& shared, int32_t thread) const {
    const float old = Element<T>::load(T{static_cast<unsigned char>(thread)});
    shared.codes[0][thread] = Element<T>::store(rule.apply(old, rule.fill)).bits;
    shared.codes[1][thread] = Element<T>::store(rule.apply(old, rule.diagonal_fill)).bits;
  }

  __device__ __forceinline__ T element(const Shared& shared, T old, bool hit) const {
    return T{shared.codes[hit][old.bits]};
  }

  static __device__ __forceinline__ uint32_t four(const Shared& shared, uint32_t old, uint32_t hits) {
    return static_cast<uint32_t>(shared.codes[hits & 1u][old & 255u]) |
           static_cast<uint32_t>(shared.codes[(hits >> 1) & 1u][(old >> 8) & 255u]) << 8 |
           static_cast<uint32_t>(shared.codes[(hits >> 2) & 1u][(old >> 16) & 255u]) << 16 |
           static_cast<uint32_t>(shared.codes[(hits >> 3) & 1u][old >> 24]) << 24;
  }

  __device__ __forceinline__ uint4 word(const Shared& shared, const uint4& old, uint32_t hits) const {
    if (hits == 0) {
      return make_uint4(four(shared, old.x, 0), four(shared, old.y, 0), four(shared, old.z, 0), four(shared, old.w, 0));
    }
    return make_uint4(four(shared, old.x, hits), four(shared, old.y, hits >> 4), four(shared, old.z, hits >> 8),
                      four(shared, old.w, hits >> 12));
  }
};

template <typename T, int TableBytes>
struct Rescale {
  using Parameters = Table<RewriteLayout, TableBytes>;
  using Rule = WordRule<T>;
  using Shared = typename Rule::Shared;
  using Compute = typename Element<T>::compute;
  static constexpr bool kSetup = Rule::kSetup;
  static constexpr int kPhases = 1;
  static constexpr int kBlocksPerProcessor = 5;
  static constexpr int32_t kSize = static_cast<int32_t>(sizeof(T));

  const Parameters& table;
  uint32_t entry_index;
  uint32_t chunk;
  int32_t thread;

  __device__ __forceinline__ int32_t steps() const { return 1; }

  __device__ __forceinline__ Rule rule() const {
    const RewriteForm& form = table.form(table.entry(entry_index).form);
    Rule rule;
    rule.rule.scale = coefficient<Compute>(form.scale);
    rule.rule.fill = coefficient<Compute>(form.fill);
    rule.rule.diagonal_fill = coefficient<Compute>(form.diagonal_fill);
    return rule;
  }

  __device__ __forceinline__ void setup(Shared& shared) { rule().setup(shared, thread); }

  template <int kPhase>
  __device__ __forceinline__ void phase(Shared& shared, int32_t) {
    const RewriteEntry& entry = table.entry(entry_index);
    const Rule rule = this->rule();
    for_each_segment(entry, table.form(entry.form), chunk, thread,
                     [&](const Segment& segment) { walk(segment, rule, shared); });
  }

  static __device__ __forceinline__ void walk(const Segment& segment, const Rule& rule, const Shared& shared) {
    const int32_t head = segment.head();
    const int32_t words = (segment.bytes - head) / kWord;
    const int32_t edge = segment.bytes - words * kWord;  // bytes of head and tail
    for (int32_t at = segment.lane * kSize; at < edge; at += segment.lanes * kSize) {
      const int32_t offset = at < head ? at : at + words * kWord;
      const bool hit = segment.hits.within(offset, 1) != 0;
      const T old = load_element<T>(segment.begin + offset);
      store_element<T>(segment.begin + offset, rule.element(shared, old, hit));
    }
    unsigned char* body = segment.begin + head;
    for (int32_t word = segment.lane; word < words; word += segment.lanes * kUnroll) {
      uint4 old[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int32_t at = word + u * segment.lanes;
        old[u] = at < words ? load_word(body + at * kWord) : make_uint4(0, 0, 0, 0);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int32_t at = word + u * segment.lanes;
        if (at < words) {
          store_word(body + at * kWord, rule.word(shared, old[u], segment.hits.within(head + at * kWord, kWord)));
        }
      }
    }
  }
};

// ---- b <- b + shift * (W_old . 1); W <- scale * W ------------------------------------------------------------------
// The binary tree: sums[i] takes sums[i + kCount / 2], down to one. By recursion, as every index must be a constant.
template <int kCount, typename Compute, int kSize>
__device__ __forceinline__ void add_halves(Compute (&sums)[kSize]) {
  if constexpr (kCount > 1) {
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) sums[i] = sums[i] + sums[i + kCount / 2];
    add_halves<kCount / 2>(sums);
  }
}

// A block owns rows_per_chunk rows and takes them eight at a time, a warp to a row, in the lane order of Fold<T>:
//
//   phase 0   warp w, row w:  column c -> lane c mod kLanes = thread (c / V) mod 32, accumulator c mod V
//                             (V elements per word; a misaligned row goes element by element: thread c mod 32)
//             every thread puts its V lanes into shared memory
//   phase 1   thread t adds lanes t, t + 32, t + 64, ... as the upper levels of the tree
//   phase 2   thread w < 8 adds the 32 partial sums of row w as the lower levels, and writes the bias
template <typename T, int TableBytes>
struct RescaleFold {
  using Parameters = Table<RescaleFoldLayout, TableBytes>;
  using Compute = typename Element<T>::compute;
  static constexpr int kV = kElementsPerWord<T>;
  static constexpr int kLanes = Fold<T>::kLanes;
  static constexpr int32_t kSize = static_cast<int32_t>(sizeof(T));
  static constexpr bool kSetup = sizeof(T) == 1;
  static constexpr int kPhases = 3;
  static constexpr int kBlocksPerProcessor = sizeof(T) == 1 ? 2 : sizeof(T) == 2 ? 3 : 4;
  static_assert(kLanes == kWarp * kV, "a warp of 16-byte accesses covers the lanes once");

  // Lane i stands at [i mod V][i / V]; this pitch keeps both the writes of phase 0 and the reads of phase 1 free of
  // bank conflicts.
  static constexpr int kPitch = kWarp + kWarp / kV;
  struct Shared {
    Compute lanes[kWarps][kV * kPitch];
    Compute partial[kWarps][kWarp + 1];
    unsigned char codes[kSetup ? 256 : 1];  // scale * W of every one-byte W
  };

  const Parameters& table;
  uint32_t entry_index;
  uint32_t chunk;
  int32_t thread;

  static __device__ __forceinline__ int lane_at(int lane) { return (lane % kV) * kPitch + lane / kV; }

  __device__ __forceinline__ const RescaleFoldEntry& entry() const { return table.entry(entry_index); }

  __device__ __forceinline__ int32_t steps() const {
    const RescaleFoldEntry& entry = this->entry();
    const int64_t rows_per_chunk = table.form(entry.form).rows_per_chunk;
    const int64_t left = entry.rows - static_cast<int64_t>(chunk - entry.first_chunk) * rows_per_chunk;
    return static_cast<int32_t>((left < rows_per_chunk ? left : rows_per_chunk) + kWarps - 1) / kWarps;
  }

  static __device__ __forceinline__ int64_t row_of(const RescaleFoldEntry& entry, const RescaleFoldForm& form,
                                                   uint32_t chunk, int32_t step, int32_t warp) {
    return static_cast<int64_t>(chunk - entry.first_chunk) * form.rows_per_chunk + step * kWarps + warp;
  }

  __device__ __forceinline__ void setup(Shared& shared) {
    const Compute scale = coefficient<Compute>(table.form(entry().form).scale);
    const T code{static_cast<unsigned char>(thread)};
    shared.codes[thread] = Element<T>::store(product(scale, Element<T>::load(code))).bits;
  }

  // With scale 0 the weights vanish, NaN and infinity too.
  static __device__ __forceinline__ Compute product(Compute scale, Compute old) {
    return scale != Compute(0) ? scale * old : Compute(0);
  }

  static __device__ __forceinline__ T scaled(const Shared& shared, Compute scale, T old, Compute value) {
    if constexpr (kSetup) {
      return T{shared.codes[old.bits]};
    } else {
      return Convert<T>::store(product(scale, value));
    }
  }

  static __device__ __forceinline__ uint4 scaled_word(const Shared& shared, Compute scale, const uint4& old,
                                                      const Compute (&values)[kV]) {
    if constexpr (kSetup) {
      Word<T> word;
      word.bits = old;
#pragma unroll
      for (int i = 0; i < kV; ++i) word.elements[i].bits = shared.codes[word.elements[i].bits];
      return word.bits;
    } else {
      Compute products[kV];
#pragma unroll
      for (int i = 0; i < kV; ++i) products[i] = product(scale, values[i]);
      return Convert<T>::pack(products);
    }
  }

  template <int kPhase>
  __device__ __forceinline__ void phase(Shared& shared, int32_t step) {
    const int32_t warp = thread / kWarp, lane = thread % kWarp;
    if constexpr (kPhase == 0) {
      const RescaleFoldEntry& entry = this->entry();
      const RescaleFoldForm& form = table.form(entry.form);
      const int64_t row = row_of(entry, form, chunk, step, warp);
      if (row < entry.rows) sum_lanes(shared, form, entry.weight + row * form.row_stride, warp, lane);
    } else if constexpr (kPhase == 1) {
      Compute sums[kV];
#pragma unroll
      for (int i = 0; i < kV; ++i) sums[i] = shared.lanes[warp][lane_at(lane + kWarp * i)];
      add_halves<kV>(sums);
      shared.partial[warp][lane] = sums[0];
    } else if (thread < kWarps) {
      const RescaleFoldEntry& entry = this->entry();
      const RescaleFoldForm& form = table.form(entry.form);
      const int64_t row = row_of(entry, form, chunk, step, thread);
      if (row < entry.rows) {
        Compute sums[kWarp];
#pragma unroll
        for (int i = 0; i < kWarp; ++i) sums[i] = shared.partial[thread][i];
        add_halves<kWarp>(sums);
        unsigned char* bias = entry.bias + row * form.bias_stride;
        const Compute old = Convert<T>::load(load_element<T>(bias));
        store_element<T>(bias, Convert<T>::store(Fold<T>::bias(old, coefficient<Compute>(form.shift), sums[0])));
      }
    }
  }

  static __device__ __forceinline__ void sum_lanes(Shared& shared, const RescaleFoldForm& form, unsigned char* row,
                                                   int32_t warp, int32_t lane) {
    const Compute scale = coefficient<Compute>(form.scale);
    const bool writes = form.writes_weight != 0;
    Compute sums[kV];
#pragma unroll
    for (int i = 0; i < kV; ++i) sums[i] = Compute(0);

    if ((reinterpret_cast<uintptr_t>(row) & (kWord - 1)) == 0) {
      const int64_t words = form.cols / kV;
      for (int64_t word = lane; word < words; word += kWarp * kUnroll) {
        uint4 old[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          const int64_t at = word + u * kWarp;
          old[u] = at < words ? load_word(row + at * kWord) : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          const int64_t at = word + u * kWarp;
          if (at < words) {
            Compute values[kV];
            Convert<T>::unpack(old[u], values);
#pragma unroll
            for (int i = 0; i < kV; ++i) sums[i] = sums[i] + values[i];
            if (writes) store_word(row + at * kWord, scaled_word(shared, scale, old[u], values));
          }
        }
      }
      // The columns after the last word belong to the thread whose turn it would have been.
      const int32_t rest = static_cast<int32_t>(form.cols - words * kV);
      if (lane == static_cast<int32_t>(words % kWarp)) {
#pragma unroll
        for (int i = 0; i < kV; ++i) {
          if (i < rest) {
            unsigned char* at = row + words * kWord + i * kSize;
            const T old = load_element<T>(at);
            const Compute value = Convert<T>::load(old);
            sums[i] = sums[i] + value;
            if (writes) store_element<T>(at, scaled(shared, scale, old, value));
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kV; ++i) shared.lanes[warp][lane_at(lane * kV + i)] = sums[i];
      return;
    }

    for (int64_t base = lane; base < form.cols; base += kLanes) {
#pragma unroll
      for (int i = 0; i < kV; ++i) {
        if (base + i * kWarp < form.cols) {
          unsigned char* at = row + (base + i * kWarp) * kSize;
          const T old = load_element<T>(at);
          const Compute value = Convert<T>::load(old);
          sums[i] = sums[i] + value;
          if (writes) store_element<T>(at, scaled(shared, scale, old, value));
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kV; ++i) shared.lanes[warp][lane_at(lane + kWarp * i)] = sums[i];
  }
};

#if defined(__CUDACC__)
// Blocks of kThreads that a multiprocessor of this architecture can hold at all; to ask for more is ignored.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 750
constexpr int kMostBlocks = 4;
#elif defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
constexpr int kMostBlocks = 6;
#else
constexpr int kMostBlocks = 8;
#endif

// The only kernel, and the barriers between its phases. A step may start while the last phase of the step before is
// under way; the kernels above are written for that. kBlocksPerProcessor bounds the registers: never so few that they
// spill, and with kUnroll words per thread each choice keeps 32 KiB or more of loads in flight on a multiprocessor.
template <typename Kernel>
__global__ void __launch_bounds__(kThreads,
                                  Kernel::kBlocksPerProcessor < kMostBlocks ? Kernel::kBlocksPerProcessor : kMostBlocks)
    run(const __grid_constant__ typename Kernel::Parameters table) {
  __shared__ typename Kernel::Shared shared;
  Kernel kernel{table, find_entry(table, blockIdx.x), blockIdx.x, static_cast<int32_t>(threadIdx.x)};
  if constexpr (Kernel::kSetup) {
    kernel.setup(shared);
    __syncthreads();
  }
  const int32_t steps = kernel.steps();
  for (int32_t step = 0; step < steps; ++step) {
    kernel.template phase<0>(shared, step);
    if constexpr (Kernel::kPhases == 3) {
      __syncthreads();
      kernel.template phase<1>(shared, step);
      __syncthreads();
      kernel.template phase<2>(shared, step);
    }
  }
}
#endif

}  // namespace cuda
}  // namespace neutralize
