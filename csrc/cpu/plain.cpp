// Any processor: the same loops for whatever the build's baseline is, conversions by affine.h alone.
#include "kernels.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace neutralize::cpu {
namespace {

struct Isa {
  static void stream(char* p, int64_t lines, uint64_t pattern) {
#if defined(__SSE2__)
    const __m128i value = _mm_set1_epi64x(static_cast<long long>(pattern));
    for (int64_t i = 0; i < 4 * lines; ++i) _mm_stream_si128(reinterpret_cast<__m128i*>(p + 16 * i), value);
    _mm_sfence();
#else
    for (int64_t i = 0; i < 8 * lines; ++i) std::memcpy(p + 8 * i, &pattern, 8);
#endif
  }
  static void half(half_bits* p, int64_t n, float scale, float offset, bool add);
  static void bfloat(bfloat16_bits* p, int64_t n, float scale, float offset, bool add);
  static void fold(bfloat16_bits* p, int64_t groups, float* lanes, float scale, bool writes);
  static void decode(const half_bits* p, float* out, int64_t n);
  static void encode(const float* p, half_bits* out, int64_t n);
  static void lookup(uint8_t* p, int64_t n, const uint8_t* table) {
    for (int64_t i = 0; i < n; ++i) p[i] = table[p[i]];
  }
};

}  // namespace
}  // namespace neutralize::cpu

#include "loops.h"

namespace neutralize::cpu {
namespace {

void Isa::half(half_bits* p, int64_t n, float scale, float offset, bool add) { one_by_one(p, n, scale, offset, add); }

void Isa::bfloat(bfloat16_bits* p, int64_t n, float scale, float offset, bool add) {
  one_by_one(p, n, scale, offset, add);
}

void Isa::fold(bfloat16_bits* p, int64_t groups, float* lanes, float scale, bool writes) {
  fold_one_by_one(p, groups, lanes, scale, writes);
}

void Isa::decode(const half_bits* p, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = Element<half_bits>::load(p[i]);
}

void Isa::encode(const float* p, half_bits* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = Element<half_bits>::store(p[i]);
}

}  // namespace

const Kernels* plain_kernels() {
  static const Kernels kernels{"plain", rewrite, rescale_fold};
  return &kernels;
}

}  // namespace neutralize::cpu
