// x86-64 with AVX-512 F, BW, VL, DQ (and, for one-byte types, VBMI where the processor has it).
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,f16c,prefer-vector-width=512")
#endif

#include "x86.h"

namespace neutralize::cpu {
namespace {

// The table in four registers: two lookups of 128 entries by the low 7 bits, chosen between by the top bit.
__attribute__((target("avx512f,avx512bw,avx512vbmi"))) int64_t lookup_vbmi(uint8_t* p, int64_t n,
                                                                           const uint8_t* table) {
  const __m512i t0 = _mm512_loadu_si512(table);
  const __m512i t1 = _mm512_loadu_si512(table + 64);
  const __m512i t2 = _mm512_loadu_si512(table + 128);
  const __m512i t3 = _mm512_loadu_si512(table + 192);
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    const __m512i code = _mm512_loadu_si512(p + i);
    const __m512i low = _mm512_permutex2var_epi8(t0, code, t1);
    const __m512i high = _mm512_permutex2var_epi8(t2, code, t3);
    _mm512_storeu_si512(p + i, _mm512_mask_blend_epi8(_mm512_movepi8_mask(code), low, high));
  }
  return i;
}

struct Isa {
  static void stream(char* p, int64_t lines, uint64_t pattern) {
    const __m512i value = _mm512_set1_epi64(static_cast<long long>(pattern));
    for (int64_t i = 0; i < lines; ++i) _mm512_stream_si512(reinterpret_cast<__m512i*>(p + 64 * i), value);
    _mm_sfence();
  }

  // The hardware rounds as affine.h does, but keeps the payload of a NaN: all but its sign is made canonical first.
  static __m256i rounded(__m512 value) {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i nan = _mm512_or_si512(_mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0x80000000u))),
                                        _mm512_set1_epi32(0x7fc00000));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    const __m512 clean = _mm512_castsi512_ps(_mm512_mask_mov_epi32(bits, is_nan, nan));
    return _mm512_cvtps_ph(clean, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }

  static void half(half_bits* p, int64_t n, float scale, float offset, bool add);
  static void bfloat(bfloat16_bits* p, int64_t n, float scale, float offset, bool add);
  static void fold(bfloat16_bits* p, int64_t groups, float* lanes, float scale, bool writes);
  static void decode(const half_bits* p, float* out, int64_t n);
  static void encode(const float* p, half_bits* out, int64_t n);
  static void lookup(uint8_t* p, int64_t n, const uint8_t* table) {
    static const bool vbmi = __builtin_cpu_supports("avx512vbmi");
    for (int64_t i = (vbmi ? lookup_vbmi : lookup_by_shuffles)(p, n, table); i < n; ++i) p[i] = table[p[i]];
  }
};

}  // namespace
}  // namespace neutralize::cpu

#include "loops.h"

namespace neutralize::cpu {
namespace {

void Isa::half(half_bits* p, int64_t n, float scale, float offset, bool add) {
  const __m512 s = _mm512_set1_ps(scale);
  const __m512 o = _mm512_set1_ps(offset);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    auto* at = reinterpret_cast<__m256i*>(p + i);
    __m512 value = _mm512_mul_ps(s, _mm512_cvtph_ps(_mm256_loadu_si256(at)));
    if (add) value = _mm512_add_ps(value, o);
    _mm256_storeu_si256(at, rounded(value));
  }
  one_by_one(p + i, n - i, scale, offset, add);
}

void Isa::bfloat(bfloat16_bits* p, int64_t n, float scale, float offset, bool add) {
  one_by_one(p, n, scale, offset, add);
}

void Isa::fold(bfloat16_bits* p, int64_t groups, float* lanes, float scale, bool writes) {
  fold_one_by_one(p, groups, lanes, scale, writes);
}

void Isa::decode(const half_bits* p, float* out, int64_t n) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    _mm512_storeu_ps(out + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + i))));
  }
  for (; i < n; ++i) out[i] = Element<half_bits>::load(p[i]);
}

void Isa::encode(const float* p, half_bits* out, int64_t n) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), rounded(_mm512_loadu_ps(p + i)));
  }
  for (; i < n; ++i) out[i] = Element<half_bits>::store(p[i]);
}

}  // namespace
}  // namespace neutralize::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace neutralize::cpu {

const Kernels* avx512_kernels() {
  static const Kernels kernels{"avx512", rewrite, rescale_fold};
  const bool usable = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return usable ? &kernels : nullptr;
}

}  // namespace neutralize::cpu

#else

const neutralize::cpu::Kernels* neutralize::cpu::avx512_kernels() { return nullptr; }

#endif
