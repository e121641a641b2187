// The Python module: what this build holds and which CPU kernels run. The ops themselves are reached through torch.ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/version.h>
#include <torch/headeronly/version.h>

#include "cpu/kernels.h"

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
}
