// CUDA kernels of the ops, seen from torch: check, guard the device, plan (launch_plan.h), queue on the current stream
// (kernels.cu). Nothing here waits for the GPU or allocates on it.
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "../checks.h"
#include "launch.h"

namespace {

using torch::stable::Tensor;

// The list's one device.
int32_t device_of(const char* op, const char* parameter, const std::vector<Tensor>& tensors, int32_t device) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    const int32_t own = tensors[i].get_device_index();
    if (device < 0) device = own;
    STD_TORCH_CHECK(own == device, op, ": expected one device for all tensors, got cuda:", device, " and cuda:", own,
                    " at ", parameter, "[", i, "]; call once per device, or use neutralize.ops, which does");
  }
  return device;
}

cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

void check_launch(const char* op, cudaError_t status) {
  STD_TORCH_CHECK(status == cudaSuccess, op, ": expected the kernel to be queued, got CUDA error ",
                  cudaGetErrorName(status), " (", cudaGetErrorString(status),
                  "); `python -m neutralize doctor` compares the GPU with what this build holds");
}

void rewrite_cuda(const std::vector<Tensor>& tensors, const std::vector<double>& scale,
                  const std::vector<double>& diagonal, const std::vector<double>& fill,
                  const std::vector<int64_t>& start, const std::vector<int64_t>& step) {
  constexpr const char* op = "rewrite_";
  const auto matrices = neutralize::matrices_of(op, "tensors", tensors, aoti_torch_device_type_cuda());
  const auto checked = neutralize::checked_rewrites(matrices, scale, diagonal, fill, start, step);
  const int32_t device = device_of(op, "tensors", tensors, -1);
  if (device < 0) return;
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  neutralize::cuda::plan_rewrite(checked.data(), checked.size(), [&](int kernel, const auto& launch) {
    check_launch(op, neutralize::cuda::launch_rewrite(kernel, launch, stream));
  });
}

void rescale_fold_cuda(const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
                       const std::vector<double>& scale, const std::vector<double>& shift) {
  constexpr const char* op = "rescale_fold_";
  const auto checked = neutralize::checked_folds(weights, biases, scale, shift, aoti_torch_device_type_cuda());
  const int32_t device = device_of(op, "biases", biases, device_of(op, "weights", weights, -1));
  if (device < 0) return;
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  neutralize::cuda::plan_rescale_fold(checked.data(), checked.size(), [&](auto storage, const auto& launch) {
    check_launch(op, neutralize::cuda::launch_rescale_fold(storage, launch, stream));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(neutralize, CUDA, m) {
  m.impl("rewrite_", TORCH_BOX(&rewrite_cuda));
  m.impl("rescale_fold_", TORCH_BOX(&rescale_fold_cuda));
}
