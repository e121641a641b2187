// What the AVX2 and the AVX-512 kernels share. Included by each inside its region, before its `struct Isa`; needs AVX2.

namespace neutralize::cpu {
namespace {

// Asks for what the loop reaches 4 KiB later. The hardware's own prefetcher stops at the end of each page of 4 KiB; loops
// that convert what they read lose more by that than plain copies do. An address past the end is only a hint in vain.
inline void ahead(const void* p) { _mm_prefetch(static_cast<const char*>(p) + 4096, _MM_HINT_T0); }

// One bit of each index, moved to where a blend looks: bit 4, 5 or 6 to bit 7. What comes over from a neighbouring byte
// lands below.
template <int Bit>
inline __m256i chosen(__m256i zero, __m256i one, __m256i index) {
  return _mm256_blendv_epi8(zero, one, _mm256_slli_epi16(index, 7 - Bit));
}

// 128 entries by the low seven bits of each byte of `index`: a shuffle looks up 16, and eight of them are chosen between.
inline __m256i shuffled(const __m256i* sixteens, __m256i index) {
  const __m256i low = _mm256_and_si256(index, _mm256_set1_epi8(0x0f));
  __m256i found[8];
  for (int i = 0; i < 8; ++i) found[i] = _mm256_shuffle_epi8(sixteens[i], low);
  for (int i = 0; i < 4; ++i) found[i] = chosen<4>(found[2 * i], found[2 * i + 1], index);
  for (int i = 0; i < 2; ++i) found[i] = chosen<5>(found[2 * i], found[2 * i + 1], index);
  return chosen<6>(found[0], found[1], index);
}

// p[i] = table[p[i]] for whole vectors; returns how many bytes that were. A rule without an offset treats both signs
// alike: then half of the table does.
inline int64_t lookup_by_shuffles(uint8_t* p, int64_t n, const uint8_t* table) {
  __m256i sixteens[16];
  for (int i = 0; i < 16; ++i) {
    sixteens[i] = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table + 16 * i)));
  }
  bool odd = true;
  for (int code = 0; code < 128; ++code) odd = odd && (table[code] ^ table[code + 128]) == 0x80;
  const __m256i sign = _mm256_set1_epi8(static_cast<char>(0x80));
  int64_t i = 0;
  if (odd) {
    for (; i + 32 <= n; i += 32) {
      auto* at = reinterpret_cast<__m256i*>(p + i);
      ahead(at);
      const __m256i code = _mm256_loadu_si256(at);
      _mm256_storeu_si256(at, _mm256_xor_si256(shuffled(sixteens, code), _mm256_and_si256(code, sign)));
    }
  } else {
    for (; i + 32 <= n; i += 32) {
      auto* at = reinterpret_cast<__m256i*>(p + i);
      ahead(at);
      const __m256i code = _mm256_loadu_si256(at);
      _mm256_storeu_si256(at, _mm256_blendv_epi8(shuffled(sixteens, code), shuffled(sixteens + 8, code), code));
    }
  }
  return i;
}

}  // namespace
}  // namespace neutralize::cpu
