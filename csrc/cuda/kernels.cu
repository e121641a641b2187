// Every kernel instance: the fill, and per storage type the rescale and the fold, each for the two sizes of table.
#include "launch.h"
#include "multi_tensor.cuh"

namespace neutralize {
namespace cuda {
namespace {

template <typename Kernel, typename Layout>
cudaError_t launch_as(const TableBuilder<Layout>& launch, cudaStream_t stream) {
  typename Kernel::Parameters table;
  launch.pack(table);
  run<Kernel><<<launch.blocks(), kThreads, 0, stream>>>(table);
  return cudaGetLastError();
}

// Kernel<TableBytes>
template <template <int> class Kernel, typename Layout>
cudaError_t launch_sized(const TableBuilder<Layout>& launch, cudaStream_t stream) {
  if (launch.fits_small()) return launch_as<Kernel<kSmallTableBytes>>(launch, stream);
  return launch_as<Kernel<kLargeTableBytes>>(launch, stream);
}

template <typename T>
struct Of {
  template <int TableBytes>
  using Rescaling = Rescale<T, TableBytes>;
  template <int TableBytes>
  using RescaleFolding = RescaleFold<T, TableBytes>;
};

}  // namespace

cudaError_t launch_rewrite(int kernel, const TableBuilder<RewriteLayout>& launch, cudaStream_t stream) {
  if (kernel == kFillKernel) return launch_sized<Fill>(launch, stream);
  return with_storage(static_cast<Storage>(kernel), [&](auto tag) {
    return launch_sized<Of<typename decltype(tag)::type>::template Rescaling>(launch, stream);
  });
}

cudaError_t launch_rescale_fold(Storage storage, const TableBuilder<RescaleFoldLayout>& launch, cudaStream_t stream) {
  return with_storage(storage, [&](auto tag) {
    return launch_sized<Of<typename decltype(tag)::type>::template RescaleFolding>(launch, stream);
  });
}

}  // namespace cuda
}  // namespace neutralize
