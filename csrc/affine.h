// The element rule of every op, written once for CPU, CUDA and the emulated grid.
//
// Nothing here knows torch: storage types are plain bits, so the same text compiles under g++, nvcc and the sanitizers,
// and the same bits come out of each of them. Rounding is to nearest, ties to even; arithmetic is float for every type
// of 32 bits or fewer and double for double; no expression may be contracted to an fma (build with -ffp-contract=off
// and --fmad=false).
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__) || defined(NEUTRALIZE_EMULATE_CUDA)
#define NEUTRALIZE_HD __host__ __device__ __forceinline__
#else
#define NEUTRALIZE_HD inline __attribute__((always_inline))
#endif

namespace neutralize {

// ---- storage types -------------------------------------------------------------------------------------------------
// Bits only; the arithmetic type is Element<T>::compute.
struct half_bits { uint16_t bits; };
struct bfloat16_bits { uint16_t bits; };
struct e4m3_bits { uint8_t bits; };
struct e5m2_bits { uint8_t bits; };

NEUTRALIZE_HD uint32_t bits_of(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

NEUTRALIZE_HD float float_of(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

// A binary format of 16 bits or fewer, as parameters of one pair of conversions.
// `Finite`: no infinity, and the all-ones pattern alone is NaN (the "fn" formats); overflow, of infinity too, then gives
// the largest number, as in recent torch and in the hardware's conversions (older torch: NaN).
template <int ExponentBits, int MantissaBits, bool Finite>
struct SmallFloat {
  static constexpr int kBias = (1 << (ExponentBits - 1)) - 1;
  static constexpr int kShift = 23 - MantissaBits;
  static constexpr uint32_t kSignBit = 1u << (ExponentBits + MantissaBits);
  static constexpr uint32_t kMagnitude = kSignBit - 1;
  static constexpr uint32_t kInfinity = ((1u << ExponentBits) - 1) << MantissaBits;  // where the format has one
  static constexpr uint32_t kNan = Finite ? kMagnitude : (kInfinity | (1u << (MantissaBits - 1)));
  static constexpr uint32_t kOverflow = Finite ? kNan - 1 : kInfinity;

  static NEUTRALIZE_HD float decode(uint32_t code) {
    const uint32_t sign = (code & kSignBit) << (31 - ExponentBits - MantissaBits);
    const uint32_t magnitude = code & kMagnitude;
    if (Finite ? magnitude == kNan : magnitude > kInfinity) return float_of(sign | 0x7fc00000u);
    if (!Finite && magnitude == kInfinity) return float_of(sign | 0x7f800000u);
    if (magnitude >= (1u << MantissaBits)) {
      return float_of(sign | ((magnitude << kShift) + (static_cast<uint32_t>(127 - kBias) << 23)));
    }
    // Subnormal: magnitude · 2^(1 - bias - MantissaBits); both factors and the product are exact in float.
    const float step = float_of(static_cast<uint32_t>(127 + 1 - kBias - MantissaBits) << 23);
    return float_of(sign | bits_of(static_cast<float>(magnitude) * step));
  }

  static NEUTRALIZE_HD uint32_t encode(float value) {
    const uint32_t bits = bits_of(value);
    const uint32_t sign = (bits >> (31 - ExponentBits - MantissaBits)) & kSignBit;
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return sign | kNan;
    // 2^(1 - bias), the smallest normal number of the format, as float bits.
    const uint32_t smallest_normal = static_cast<uint32_t>(127 + 1 - kBias) << 23;
    uint32_t code;
    if (magnitude < smallest_normal) {
      // Let the float adder round: one ulp of `magic` is the format's smallest subnormal, so the sum's low bits are the code.
      const float magic = float_of(static_cast<uint32_t>(127 + 1 - kBias - MantissaBits + 23) << 23);
      code = bits_of(float_of(magnitude) + magic) - bits_of(magic);
    } else {
      const uint32_t odd = (magnitude >> kShift) & 1u;
      code = (magnitude - (static_cast<uint32_t>(127 - kBias) << 23) + ((1u << (kShift - 1)) - 1) + odd) >> kShift;
      if (code >= kOverflow) code = kOverflow;
    }
    return sign | code;
  }
};

using HalfFormat = SmallFloat<5, 10, false>;
using E5m2Format = SmallFloat<5, 2, false>;
using E4m3Format = SmallFloat<4, 3, true>;

// ---- load, compute, store ------------------------------------------------------------------------------------------
template <typename T>
struct Element;

template <>
struct Element<double> {
  using compute = double;
  static NEUTRALIZE_HD double load(double stored) { return stored; }
  static NEUTRALIZE_HD double store(double value) { return value; }
};

template <>
struct Element<float> {
  using compute = float;
  static NEUTRALIZE_HD float load(float stored) { return stored; }
  static NEUTRALIZE_HD float store(float value) { return value; }
};

template <>
struct Element<bfloat16_bits> {
  using compute = float;
  static NEUTRALIZE_HD float load(bfloat16_bits stored) { return float_of(static_cast<uint32_t>(stored.bits) << 16); }
  static NEUTRALIZE_HD bfloat16_bits store(float value) {
    const uint32_t bits = bits_of(value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return {static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded)};
  }
};

template <typename Bits, typename Format>
struct SmallElement {
  using compute = float;
  static NEUTRALIZE_HD float load(Bits stored) { return Format::decode(stored.bits); }
  static NEUTRALIZE_HD Bits store(float value) { return {static_cast<decltype(Bits::bits)>(Format::encode(value))}; }
};
template <>
struct Element<half_bits> : SmallElement<half_bits, HalfFormat> {};
template <>
struct Element<e4m3_bits> : SmallElement<e4m3_bits, E4m3Format> {};
template <>
struct Element<e5m2_bits> : SmallElement<e5m2_bits, E5m2Format> {};

// ---- W <- scale * W + diagonal * D + fill --------------------------------------------------------------------------
// Coefficients are rounded to the compute type once, before the first element. With scale == 0 the old value is not
// read (NaN and Inf vanish). An offset of zero is not added, so that a pure rescale keeps the sign of a zero.
template <typename Compute>
struct AffineRule {
  Compute scale;
  Compute fill;           // offset off the diagonal
  Compute diagonal_fill;  // offset on the diagonal: diagonal + fill, added in the compute type

  NEUTRALIZE_HD AffineRule(double scale_, double diagonal, double fill_)
      : scale(static_cast<Compute>(scale_)),
        fill(static_cast<Compute>(fill_)),
        diagonal_fill(static_cast<Compute>(diagonal) + static_cast<Compute>(fill_)) {}
  NEUTRALIZE_HD AffineRule() {}

  NEUTRALIZE_HD bool reads() const { return scale != Compute(0); }
  NEUTRALIZE_HD bool writes_diagonal() const { return diagonal_fill != fill; }

  NEUTRALIZE_HD Compute apply(Compute old, Compute offset) const {
    const Compute scaled = scale * old;
    return offset != Compute(0) ? scaled + offset : scaled;
  }
};

// ---- the generalized identity --------------------------------------------------------------------------------------
// A tensor seen as a matrix (rows = dim 0, columns = the rest flattened): row r has its one at column start + r * step,
// and none where that falls outside [0, cols).
struct Diagonal {
  int64_t start;
  int64_t step;
  NEUTRALIZE_HD int64_t column(int64_t row) const { return start + row * step; }
};

// ---- b <- b + shift * (W_old . 1); W <- scale * W ------------------------------------------------------------------
// The row sum has one fixed order, so that every backend gives the same bits: column c goes into lane c mod kLanes,
// each lane starts at +0 and adds its columns in ascending order, and the lanes are then added as a binary tree (lane i
// takes lane i + n/2 for n = kLanes, kLanes/2, ... 2).
template <typename T>
struct Fold {
  using Compute = typename Element<T>::compute;
  static constexpr int kLanes = 32 * (16 / static_cast<int>(sizeof(T)));  // what a warp of 16-byte accesses covers

  // Product and sum are rounded one by one. As with every offset, a shift of zero is not added: the bias keeps its bits
  // even where the weights hold an infinity.
  static NEUTRALIZE_HD Compute bias(Compute old, Compute shift, Compute row_sum) {
    return shift != Compute(0) ? old + shift * row_sum : old;
  }
};

}  // namespace neutralize
