// Passing a list of tensors through the dispatcher's stable ABI costs several allocations per tensor: more than writing a
// small one. DLPack's exchange table, a C ABI with a version of its own, describes a tensor without any of them.
#include "direct.h"

// torch guards its copy of this plain C header like the rest of ATen; its layout is DLPack's, not torch's.
#pragma push_macro("TORCH_TARGET_VERSION")
#undef TORCH_TARGET_VERSION
#include <ATen/dlpack.h>
#pragma pop_macro("TORCH_TARGET_VERSION")

#include <optional>

#include "cpu/kernels.h"

namespace py = pybind11;

namespace neutralize {
namespace {

DLPackDLTensorFromPyObjectNoSync describe = nullptr;

std::optional<Storage> storage_of(const DLDataType& type) {
  if (type.lanes != 1) return std::nullopt;
  switch (type.code) {
    case kDLFloat:
      if (type.bits == 64) return Storage::kFloat64;
      if (type.bits == 32) return Storage::kFloat32;
      if (type.bits == 16) return Storage::kFloat16;
      return std::nullopt;
    case kDLBfloat: return type.bits == 16 ? std::optional(Storage::kBFloat16) : std::nullopt;
    case kDLFloat8_e4m3fn: return Storage::kE4m3;
    case kDLFloat8_e5m2: return Storage::kE5m2;
    default: return std::nullopt;
  }
}

std::optional<Matrix> matrix_of(PyObject* tensor) {
  DLTensor described;
  if (describe(tensor, &described) != 0) {
    PyErr_Clear();
    return std::nullopt;
  }
  const auto storage = storage_of(described.dtype);
  if (described.device.device_type != kDLCPU || !storage) return std::nullopt;
  auto [matrix, native] = layout_of(described.ndim, described.shape, described.strides, *storage);
  if (matrix.numel() == 0) return matrix;
  if (described.data == nullptr) return std::nullopt;  // a wrapper of torch.func, say
  matrix.data = static_cast<char*>(described.data) + described.byte_offset;
  if (!native || !aligned(matrix)) return std::nullopt;
  return matrix;
}

}  // namespace

bool use_exchange_api(const py::capsule& capsule) {
  const auto* api = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (api == nullptr) throw py::error_already_set();
  if (api->header.version.major != DLPACK_MAJOR_VERSION) return false;
  describe = api->dltensor_from_py_object_no_sync;
  return describe != nullptr;
}

bool rewrite_direct(const py::list& tensors, const std::vector<double>& scale, const std::vector<double>& diagonal,
                    const std::vector<double>& fill, const std::vector<int64_t>& start,
                    const std::vector<int64_t>& step) {
  if (describe == nullptr) return false;
  std::vector<Matrix> matrices;
  matrices.reserve(tensors.size());
  for (const py::handle tensor : tensors) {
    const auto matrix = matrix_of(tensor.ptr());
    if (!matrix) return false;
    matrices.push_back(*matrix);
  }
  const py::gil_scoped_release release;
  cpu::rewrite(matrices, scale, diagonal, fill, start, step);
  return true;
}

}  // namespace neutralize
