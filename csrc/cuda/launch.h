// What kernels.cu offers to ops.cpp: no torch on one side, no CUDA syntax on the other.
#pragma once

#include <cuda_runtime_api.h>

#include "launch_plan.h"

namespace neutralize {
namespace cuda {

// Queue one launch; `kernel` is kFillKernel or a Storage. Neither waits, allocates nor reads device memory.
cudaError_t launch_rewrite(int kernel, const TableBuilder<RewriteLayout>& launch, cudaStream_t stream);
cudaError_t launch_rescale_fold(Storage storage, const TableBuilder<RescaleFoldLayout>& launch, cudaStream_t stream);

}  // namespace cuda
}  // namespace neutralize
