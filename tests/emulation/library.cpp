// The emulated grid for Python: tests/test_emulation.py holds it against src/neutralize/reference.py.
#include <memory>

#include "grid.h"

namespace {

struct Item {  // as ctypes lays it out
  char* data;
  int64_t rows, cols, row_stride, storage;

  neutralize::Matrix matrix() const {
    return {data, rows, cols, row_stride, static_cast<neutralize::Storage>(storage)};
  }
};

void expect(const Item& item) {
  const auto span = neutralize::Matrix(item.matrix());
  if (span.numel() > 0) emulation::watch.add(span.data, static_cast<int64_t>(span.end() - span.begin()));
}

}  // namespace

// Each returns the number of launches, or -1 if the watch saw an access that must not be.
extern "C" int64_t emulate_rewrite(const Item* items, const double (*coefficients)[3], const int64_t (*ones)[2],
                                   int64_t count) {
  std::vector<emulation::Rewrite> rewrites;
  emulation::watch = {};
  for (int64_t i = 0; i < count; ++i) {
    const double* c = coefficients[i];
    rewrites.push_back({items[i].matrix(), c[0], c[1], c[2], {ones[i][0], ones[i][1]}});
    expect(items[i]);
  }
  emulation::watch.begin_call();
  const auto traffic = emulation::rewrite(rewrites.data(), rewrites.size(), false);
  return emulation::watch.failures == 0 ? traffic.launches : -1;
}

extern "C" int64_t emulate_rescale_fold(const Item* weights, const Item* biases, const double (*coefficients)[2],
                                        int64_t count) {
  std::vector<emulation::RescaleFold> folds;
  emulation::watch = {};
  for (int64_t i = 0; i < count; ++i) {
    folds.push_back({weights[i].matrix(), biases[i].matrix(), coefficients[i][0], coefficients[i][1]});
    expect(weights[i]);
    expect(biases[i]);
  }
  emulation::watch.begin_call();
  const auto traffic = emulation::rescale_fold(folds.data(), folds.size(), false);
  return emulation::watch.failures == 0 ? traffic.launches : -1;
}
