// Which instruction sets a kernel may use on this processor, under this operating system.
#pragma once

// Every feature, named as Linux names it in /proc/cpuinfo (but neon, which is asimd there, and neon_bf16, bf16).
#define TLALIGN_CPU_FEATURES(X) \
  X(avx2) X(fma) X(f16c) X(avx512f) X(avx512bw) X(avx512dq) X(avx512vl) X(avx512_bf16) X(neon) X(neon_bf16) X(sve)

namespace tlalign {

struct CpuFeatures {
#define TLALIGN_DECLARE(name) bool name = false;
  TLALIGN_CPU_FEATURES(TLALIGN_DECLARE)
#undef TLALIGN_DECLARE
};

// Detected at the first call. On processors other than x86-64 and aarch64 nothing is set.
const CpuFeatures& cpu_features();

}  // namespace tlalign
