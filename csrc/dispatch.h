// From a dtype known at run time to a type known at compile time: one switch, no macros.
#pragma once

#include "affine.h"

namespace neutralize {

// The dtypes of every op, in the order of tables that are indexed by it.
enum class Storage : int8_t { kFloat64, kFloat32, kFloat16, kBFloat16, kE4m3, kE5m2 };

template <typename T>
struct TypeTag {
  using type = T;
};

// Calls body(TypeTag<T>{}) with T the storage type, e.g. TypeTag<half_bits>.
template <typename Body>
NEUTRALIZE_HD void dispatch(Storage storage, const Body& body) {
  switch (storage) {
    case Storage::kFloat64: return body(TypeTag<double>{});
    case Storage::kFloat32: return body(TypeTag<float>{});
    case Storage::kFloat16: return body(TypeTag<half_bits>{});
    case Storage::kBFloat16: return body(TypeTag<bfloat16_bits>{});
    case Storage::kE4m3: return body(TypeTag<e4m3_bits>{});
    case Storage::kE5m2: return body(TypeTag<e5m2_bits>{});
  }
}

constexpr int64_t itemsize_of(Storage storage) {
  switch (storage) {
    case Storage::kFloat64: return 8;
    case Storage::kFloat32: return 4;
    case Storage::kFloat16:
    case Storage::kBFloat16: return 2;
    case Storage::kE4m3:
    case Storage::kE5m2: return 1;
  }
  return 0;
}

}  // namespace neutralize
