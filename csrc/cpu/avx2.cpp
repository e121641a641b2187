// x86-64 with AVX2 and F16C.
#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,f16c")
#endif

#include "x86.h"

namespace neutralize::cpu {
namespace {

struct Isa {
  static void stream(char* p, int64_t lines, uint64_t pattern) {
    const __m256i value = _mm256_set1_epi64x(static_cast<long long>(pattern));
    for (int64_t i = 0; i < lines; ++i) {
      _mm256_stream_si256(reinterpret_cast<__m256i*>(p + 64 * i), value);
      _mm256_stream_si256(reinterpret_cast<__m256i*>(p + 64 * i + 32), value);
    }
    _mm_sfence();
  }

  // The hardware rounds as affine.h does, but keeps the payload of a NaN: all but its sign is made canonical first.
  static __m128i rounded(__m256 value) {
    const __m256 sign = _mm256_and_ps(value, _mm256_set1_ps(-0.0f));
    const __m256 nan = _mm256_or_ps(sign, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000)));
    const __m256 clean = _mm256_blendv_ps(value, nan, _mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    return _mm256_cvtps_ph(clean, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }

  // Adds half a unit of the upper 16 bits, ties to even: these then are the rounded bfloat16.
  static __m256i nearest(__m256 value) {
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  }

  static void half(half_bits* p, int64_t n, float scale, float offset, bool add);
  static void bfloat(bfloat16_bits* p, int64_t n, float scale, float offset, bool add);
  static void fold(bfloat16_bits* p, int64_t groups, float* lanes, float scale, bool writes);
  static void decode(const half_bits* p, float* out, int64_t n);
  static void encode(const float* p, half_bits* out, int64_t n);
  static void lookup(uint8_t* p, int64_t n, const uint8_t* table) {
    for (int64_t i = lookup_by_shuffles(p, n, table); i < n; ++i) p[i] = table[p[i]];
  }

  // Two float vectors of bfloat16 values, the even and the odd ones of sixteen, as these sixteen.
  static __m256i joined(__m256 even, __m256 odd) {
    const __m256i rounded = _mm256_blend_epi16(_mm256_srli_epi32(nearest(even), 16), nearest(odd), 0xaa);
    const __m256i nan = _mm256_blend_epi16(_mm256_castps_si256(_mm256_cmp_ps(even, even, _CMP_UNORD_Q)),
                                           _mm256_castps_si256(_mm256_cmp_ps(odd, odd, _CMP_UNORD_Q)), 0xaa);
    return _mm256_blendv_epi8(rounded, _mm256_set1_epi16(0x7fc0), nan);
  }

  // As 32-bit words, the even ones of sixteen bfloat16 are floats once they are moved up, the odd ones once their
  // neighbours are cleared: no unpacking.
  static __m256 even_of(__m256i sixteen) { return _mm256_castsi256_ps(_mm256_slli_epi32(sixteen, 16)); }
  static __m256 odd_of(__m256i sixteen) {
    return _mm256_castsi256_ps(_mm256_and_si256(sixteen, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  }
};

}  // namespace
}  // namespace neutralize::cpu

#include "loops.h"

namespace neutralize::cpu {
namespace {

void Isa::half(half_bits* p, int64_t n, float scale, float offset, bool add) {
  const __m256 s = _mm256_set1_ps(scale);
  const __m256 o = _mm256_set1_ps(offset);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    auto* at = reinterpret_cast<__m128i*>(p + i);
    ahead(at);
    __m256 value = _mm256_mul_ps(s, _mm256_cvtph_ps(_mm_loadu_si128(at)));
    if (add) value = _mm256_add_ps(value, o);
    // A NaN is rare: a jump costs less than the cleaning.
    if (__builtin_expect(_mm256_movemask_ps(_mm256_cmp_ps(value, value, _CMP_UNORD_Q)), 0)) {
      _mm_storeu_si128(at, rounded(value));
    } else {
      _mm_storeu_si128(at, _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
  }
  one_by_one(p + i, n - i, scale, offset, add);
}

void Isa::bfloat(bfloat16_bits* p, int64_t n, float scale, float offset, bool add) {
  const __m256 s = _mm256_set1_ps(scale);
  const __m256 o = _mm256_set1_ps(offset);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    auto* at = reinterpret_cast<__m256i*>(p + i);
    ahead(at);
    const __m256i old = _mm256_loadu_si256(at);
    __m256 even = _mm256_mul_ps(s, even_of(old));
    __m256 odd = _mm256_mul_ps(s, odd_of(old));
    if (add) {
      even = _mm256_add_ps(even, o);
      odd = _mm256_add_ps(odd, o);
    }
    _mm256_storeu_si256(at, joined(even, odd));
  }
  one_by_one(p + i, n - i, scale, offset, add);
}

// Inside the loop each sixteen lanes stand as eight even and eight odd ones: addition is lane by lane, so that the order
// matters at the end alone. Two groups a pass: each lane still takes its columns one after the other.
void Isa::fold(bfloat16_bits* p, int64_t groups, float* lanes, float scale, bool writes) {
  constexpr int64_t kLanes = Fold<bfloat16_bits>::kLanes;
  const __m256 s = _mm256_set1_ps(scale);
  for (int64_t group = 0; group < groups;) {
    const int64_t together = groups - group >= 2 ? 2 : 1;
    for (int64_t lane = 0; lane < kLanes; lane += 16) {
      __m256 even_sum = _mm256_loadu_ps(lanes + lane);
      __m256 odd_sum = _mm256_loadu_ps(lanes + lane + 8);
      for (int64_t k = 0; k < together; ++k) {
        auto* at = reinterpret_cast<__m256i*>(p + (group + k) * kLanes + lane);
        ahead(at);
        const __m256i old = _mm256_loadu_si256(at);
        const __m256 even = even_of(old);
        const __m256 odd = odd_of(old);
        even_sum = _mm256_add_ps(even_sum, even);
        odd_sum = _mm256_add_ps(odd_sum, odd);
        if (writes) _mm256_storeu_si256(at, joined(_mm256_mul_ps(s, even), _mm256_mul_ps(s, odd)));
      }
      _mm256_storeu_ps(lanes + lane, even_sum);
      _mm256_storeu_ps(lanes + lane + 8, odd_sum);
    }
    group += together;
  }
  for (int64_t lane = 0; lane < kLanes; lane += 16) {
    const __m256 even = _mm256_loadu_ps(lanes + lane);
    const __m256 odd = _mm256_loadu_ps(lanes + lane + 8);
    const __m256 low = _mm256_unpacklo_ps(even, odd);   // lanes 0 to 3 and 8 to 11
    const __m256 high = _mm256_unpackhi_ps(even, odd);  // lanes 4 to 7 and 12 to 15
    _mm256_storeu_ps(lanes + lane, _mm256_permute2f128_ps(low, high, 0x20));
    _mm256_storeu_ps(lanes + lane + 8, _mm256_permute2f128_ps(low, high, 0x31));
  }
}

void Isa::decode(const half_bits* p, float* out, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i))));
  }
  for (; i < n; ++i) out[i] = Element<half_bits>::load(p[i]);
}

void Isa::encode(const float* p, half_bits* out, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), rounded(_mm256_loadu_ps(p + i)));
  }
  for (; i < n; ++i) out[i] = Element<half_bits>::store(p[i]);
}

bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}

}  // namespace
}  // namespace neutralize::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace neutralize::cpu {

const Kernels* avx2_kernels() {
  static const Kernels kernels{"avx2", rewrite, rescale_fold};
  return __builtin_cpu_supports("avx2") && has_f16c() ? &kernels : nullptr;
}

}  // namespace neutralize::cpu

#else

const neutralize::cpu::Kernels* neutralize::cpu::avx2_kernels() { return nullptr; }

#endif
