// The Python module tlalign_kernels._C.
#include <pybind11/pybind11.h>

#include <string>

#if defined(TLALIGN_CPU_KERNELS)
#include "cpu/bindings.h"
#endif
#include "cpu_features.h"
#if defined(TLALIGN_CUDA_ARCHS)
#include "cuda/bindings.h"
#endif

namespace py = pybind11;

namespace {

py::dict cpu_features() {
  const tlalign::CpuFeatures& features = tlalign::cpu_features();
  py::dict result;
#define TLALIGN_COPY(name) result[#name] = features.name;
  TLALIGN_CPU_FEATURES(TLALIGN_COPY)
#undef TLALIGN_COPY
  return result;
}

py::dict build_info() {
#if defined(_MSVC_LANG)  // MSVC's __cplusplus stays at 1998 by default
  constexpr long standard = _MSVC_LANG;
#else
  constexpr long standard = __cplusplus;
#endif
  py::dict result;
  result["version"] = TLALIGN_VERSION;
  result["build_type"] = TLALIGN_BUILD_TYPE;
  result["compiler"] = TLALIGN_COMPILER;
  result["compiler_version"] = TLALIGN_COMPILER_VERSION;
  result["cxx_standard"] = standard / 100 % 100;
#if defined(TLALIGN_LIBGOMP)
  result["threads"] = "libgomp";
#else
  result["threads"] = "of their own";
#endif
  py::list architectures;
#if defined(TLALIGN_CUDA_ARCHS)
  for (const int architecture : {TLALIGN_CUDA_ARCHS}) architectures.append(std::to_string(architecture));
#endif
  result["cuda_architectures"] = architectures;
  return result;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native code of tlalign_kernels. Built without torch, so that one build serves every version of it.";

  module.def("cpu_features", &cpu_features,
             "Instruction sets usable here, as `{name: bool}`: the processor has them and the operating system "
             "preserves their registers.");

  module.def("build_info", &build_info,
             "How this extension was built: `version` of the package it was built for, `build_type`, `compiler`, "
             "`compiler_version`, `cxx_standard` (17 for C++17), `threads` of the CPU kernels (those of libgomp, which "
             "are torch's too, or of their own) and `cuda_architectures`, empty without CUDA kernels.");

#if defined(TLALIGN_CPU_KERNELS)
  tlalign::cpu::bind(module);
#endif
#if defined(TLALIGN_CUDA_ARCHS)
  tlalign::cuda::bind(module);
#endif
}
