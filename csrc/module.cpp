// The Python module: what this build holds and which CPU kernels run. The ops themselves are reached
// through torch.ops; long lists of CPU tensors by a shorter way (direct.h).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/version.h>
#include <torch/headeronly/version.h>

#include "cpu/kernels.h"
#include "direct.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native part of neutralize: importing it registers torch.ops.neutralize for CPU and Meta.";
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["compiler"] = __VERSION__;
        info["built_with_torch"] = TORCH_VERSION;
        info["abi_target"] = std::to_string((TORCH_FEATURE_VERSION >> 56) & 0xff) + "." +
                             std::to_string((TORCH_FEATURE_VERSION >> 48) & 0xff);
        info["cpu_isas_compiled"] = neutralize::cpu::compiled_isas();
        info["cpu_isas_usable"] = neutralize::cpu::usable_isas();
        info["last_level_cache_bytes"] = neutralize::cpu::last_level_cache_bytes();
        return info;
      },
      "Return what was compiled in.");
  m.def(
      "cpu_isa", [] { return std::string(neutralize::cpu::active_kernels().name); },
      "Return the instruction set of the CPU kernels in use.");
  m.def("use_cpu_isa", &neutralize::cpu::use_isa, py::arg("name"),
        "Use the kernels of another instruction set, or \"auto\" for the best; ValueError where there are none.");
  m.def("use_exchange_api", &neutralize::use_exchange_api, py::arg("capsule"),
        "Take torch.Tensor.__dlpack_c_exchange_api__ for rewrite_direct; return whether its version is known here.");
  m.def("rewrite_direct", &neutralize::rewrite_direct, py::arg("tensors"), py::arg("scale"), py::arg("diagonal"),
        py::arg("fill"), py::arg("start"), py::arg("step"),
        "rewrite_ on a list of plain CPU tensors, past the dispatcher; return False where only the dispatcher can "
        "judge.");
}
