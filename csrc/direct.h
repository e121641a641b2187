// The short way in: rewrite_ on a Python list of CPU tensors, past the dispatcher.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

namespace neutralize {

// Remembers torch's DLPack exchange table, `torch.Tensor.__dlpack_c_exchange_api__`; false where it is of another version.
bool use_exchange_api(const pybind11::capsule& capsule);

// As the op rewrite_ on the CPU. Returns false, with nothing written, for lists that only the dispatcher can judge:
// another device, another dtype, a layout that no kernel takes, a tensor that is no memory.
bool rewrite_direct(const pybind11::list& tensors, const std::vector<double>& scale,
                    const std::vector<double>& diagonal, const std::vector<double>& fill,
                    const std::vector<int64_t>& start, const std::vector<int64_t>& step);

}  // namespace neutralize
