// kernels.cu's launches, walked on the CPU: same planning, same choice of kernel, no stream.
#pragma once

#include <memory>

#include "emulation.h"

namespace emulation {

// The members that the planners ask for; checks.h has the same behind torch.
struct Rewrite {
  neutralize::Matrix matrix;
  double scale, diagonal, fill;
  neutralize::Diagonal ones;
};
struct RescaleFold {
  neutralize::Matrix weight, bias;
  double scale, shift;
};

template <typename Kernel, typename Layout>
void walk_as(const neutralize::cuda::TableBuilder<Layout>& launch, bool descending) {
  // On the heap, of exactly its size: ASan sees a read past the table.
  const auto table = std::make_unique<typename Kernel::Parameters>();
  launch.pack(*table);
  walk_grid<Kernel>(*table, launch.blocks(), descending);
}

template <template <int> class Kernel, typename Layout>
void walk_sized(const neutralize::cuda::TableBuilder<Layout>& launch, bool descending) {
  if (launch.fits_small()) return walk_as<Kernel<neutralize::cuda::kSmallTableBytes>>(launch, descending);
  walk_as<Kernel<neutralize::cuda::kLargeTableBytes>>(launch, descending);
}

template <typename T>
struct Of {
  template <int TableBytes>
  using Rescaling = neutralize::cuda::Rescale<T, TableBytes>;
  template <int TableBytes>
  using RescaleFolding = neutralize::cuda::RescaleFold<T, TableBytes>;
};

inline neutralize::cuda::Traffic rewrite(const Rewrite* rewrites, size_t count, bool descending) {
  namespace cuda = neutralize::cuda;
  return cuda::plan_rewrite(rewrites, count, [&](int kernel, const cuda::TableBuilder<cuda::RewriteLayout>& launch) {
    if (kernel == cuda::kFillKernel) return walk_sized<cuda::Fill>(launch, descending);
    cuda::with_storage(static_cast<neutralize::Storage>(kernel), [&](auto tag) {
      walk_sized<Of<typename decltype(tag)::type>::template Rescaling>(launch, descending);
    });
  });
}

inline neutralize::cuda::Traffic rescale_fold(const RescaleFold* folds, size_t count, bool descending) {
  namespace cuda = neutralize::cuda;
  return cuda::plan_rescale_fold(
      folds, count, [&](neutralize::Storage storage, const cuda::TableBuilder<cuda::RescaleFoldLayout>& launch) {
        cuda::with_storage(storage, [&](auto tag) {
          walk_sized<Of<typename decltype(tag)::type>::template RescaleFolding>(launch, descending);
        });
      });
}

}  // namespace emulation
