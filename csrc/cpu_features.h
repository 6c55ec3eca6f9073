// Which instruction sets a kernel may use on this processor, under this operating system.
#pragma once

// Those that kernels ask for, named as Linux names them in /proc/cpuinfo.
#define TLALIGN_CPU_FEATURES(X) X(avx2) X(fma) X(f16c) X(avx512f) X(avx512bw) X(avx512dq) X(avx512vl) X(avx512_bf16)

namespace tlalign {

struct CpuFeatures {
#define TLALIGN_DECLARE(name) bool name = false;
  TLALIGN_CPU_FEATURES(TLALIGN_DECLARE)
#undef TLALIGN_DECLARE
};

// Detected at the first call. Nothing is set on processors other than x86-64, nor by MSVC, which compiles no kernels.
const CpuFeatures& cpu_features();

}  // namespace tlalign
