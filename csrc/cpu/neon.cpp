// aarch64: NEON and the half-precision conversions belong to the base instruction set.
#include "kernels.h"

#if defined(__aarch64__)
#include <arm_neon.h>

namespace neutralize::cpu {
namespace {

struct Isa {
  static void stream(char* p, int64_t lines, uint64_t pattern) {
    const uint64x2_t value = vdupq_n_u64(pattern);
    for (int64_t i = 0; i < lines; ++i) {
      // There is no intrinsic for the non-temporal pair store.
      asm volatile("stnp %q1, %q1, [%0]\n\tstnp %q1, %q1, [%0, #32]" ::"r"(p + 64 * i), "w"(value) : "memory");
    }
  }

  // The hardware rounds as affine.h does, but keeps the payload of a NaN: all but its sign is made canonical first.
  static float16x4_t rounded(float32x4_t value) {
    const uint32x4_t bits = vreinterpretq_u32_f32(value);
    const uint32x4_t nan = vorrq_u32(vandq_u32(bits, vdupq_n_u32(0x80000000u)), vdupq_n_u32(0x7fc00000u));
    const uint32x4_t is_number = vceqq_f32(value, value);
    return vcvt_f16_f32(vreinterpretq_f32_u32(vbslq_u32(is_number, bits, nan)));
  }

  static void half(half_bits* p, int64_t n, float scale, float offset, bool add);
  static void bfloat(bfloat16_bits* p, int64_t n, float scale, float offset, bool add);
  static void fold(bfloat16_bits* p, int64_t groups, float* lanes, float scale, bool writes);
  static void decode(const half_bits* p, float* out, int64_t n);
  static void encode(const float* p, half_bits* out, int64_t n);

  // The table in sixteen registers, 64 entries a lookup; an index out of its quarter gives 0.
  static void lookup(uint8_t* p, int64_t n, const uint8_t* table) {
    const uint8x16x4_t t0 = vld1q_u8_x4(table);
    const uint8x16x4_t t1 = vld1q_u8_x4(table + 64);
    const uint8x16x4_t t2 = vld1q_u8_x4(table + 128);
    const uint8x16x4_t t3 = vld1q_u8_x4(table + 192);
    const uint8x16_t quarter = vdupq_n_u8(64);
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
      uint8x16_t code = vld1q_u8(p + i);
      uint8x16_t found = vqtbl4q_u8(t0, code);
      code = vsubq_u8(code, quarter);
      found = vorrq_u8(found, vqtbl4q_u8(t1, code));
      code = vsubq_u8(code, quarter);
      found = vorrq_u8(found, vqtbl4q_u8(t2, code));
      code = vsubq_u8(code, quarter);
      found = vorrq_u8(found, vqtbl4q_u8(t3, code));
      vst1q_u8(p + i, found);
    }
    for (; i < n; ++i) p[i] = table[p[i]];
  }
};

}  // namespace
}  // namespace neutralize::cpu

#include "loops.h"

namespace neutralize::cpu {
namespace {

float32x4_t four(const half_bits* p) {
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p))));
}

void four(half_bits* p, float16x4_t value) { vst1_u16(reinterpret_cast<uint16_t*>(p), vreinterpret_u16_f16(value)); }

void Isa::half(half_bits* p, int64_t n, float scale, float offset, bool add) {
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    float32x4_t value = vmulq_n_f32(four(p + i), scale);
    if (add) value = vaddq_f32(value, vdupq_n_f32(offset));
    four(p + i, rounded(value));
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
  for (; i + 4 <= n; i += 4) vst1q_f32(out + i, four(p + i));
  for (; i < n; ++i) out[i] = Element<half_bits>::load(p[i]);
}

void Isa::encode(const float* p, half_bits* out, int64_t n) {
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) four(out + i, rounded(vld1q_f32(p + i)));
  for (; i < n; ++i) out[i] = Element<half_bits>::store(p[i]);
}

}  // namespace

const Kernels* neon_kernels() {
  static const Kernels kernels{"neon", rewrite, rescale_fold};
  return &kernels;
}

}  // namespace neutralize::cpu

#else

const neutralize::cpu::Kernels* neutralize::cpu::neon_kernels() { return nullptr; }

#endif
