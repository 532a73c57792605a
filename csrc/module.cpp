// _C: what was built and what runs. It links neither torch nor CUDA, so it loads even where the ops library cannot.
#include <pybind11/pybind11.h>

#include <sstream>
#include <string>

#include "common/isa.h"

namespace py = pybind11;

namespace {

py::list words(const std::string& text) {
  py::list list;
  std::istringstream stream(text);
  for (std::string word; stream >> word;) list.append(word);
  return list;
}

py::dict build_info() {
  py::dict info;
  info["version"] = PK_VERSION;
  info["compiler"] = PK_COMPILER;
  info["torch_target"] = PK_TORCH_TARGET;
  info["torch_built_with"] = PK_TORCH_BUILT_WITH;
  info["isas"] = words(PK_ISAS);
#ifdef PK_WITH_CUDA
  py::dict cuda;
  cuda["version"] = PK_CUDA_VERSION;
  cuda["archs"] = words(PK_CUDA_ARCHS);
  info["cuda"] = cuda;
#else
  info["cuda"] = py::none();
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts of the compiled part.";
  m.def("build_info", &build_info, "What this binary was built from and for.");
  m.def(
      "cpu_isa", [] { return std::string(pk::isa_name(pk::isa())); },
      "The CPU level in use; ValueError if PEFT_KERNELS_CPU_ISA names one that cannot be used here.");
}
