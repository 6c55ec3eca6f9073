// What the launchers of the kernels share.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <stdexcept>
#include <string>
#include <type_traits>

#include "cuda/attention.h"

namespace tlalign::cuda {

// Throws unless the status of a launch is success.
inline void check(cudaError_t status, const char* kernel, const Problem& p) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // or the next launch would be told of it again
  throw std::runtime_error(std::string(kernel) + " with B, H, Nq, Nk, D, S = " + std::to_string(p.batch) + ", " +
                           std::to_string(p.heads) + ", " + std::to_string(p.queries) + ", " + std::to_string(p.keys) +
                           ", " + std::to_string(p.head_dim) + ", " + std::to_string(p.sources) + ": " +
                           cudaGetErrorString(status));
}

#if defined(__CUDACC__)  // what is compiled in place of Hopper's kernels launches none
// Launches the kernel that `Kernel` is the struct of; `name` is for the error.
template <class Kernel, class Arguments>
void launch(void (*kernel)(Arguments), const char* name, int64_t blocks, const Arguments& p, cudaStream_t stream) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Kernel::SHARED_BYTES), name, p);
  kernel<<<unsigned(blocks), Kernel::THREADS, Kernel::SHARED_BYTES, stream>>>(p);
  check(cudaGetLastError(), name, p);
}
#endif

template <int D>
using HeadDim = std::integral_constant<int, D>;

// Calls call(T()) with the dtype of a problem.
template <class Call>
void with_dtype(const Problem& p, Call call) {
  if (p.dtype == DType::bfloat16) return call(__nv_bfloat16());
  call(__half());
}
// Calls call(T(), HeadDim<D>()) with the dtype and head dimension of a problem.
template <class Call>
void with_types(const Problem& p, Call call) {
  with_dtype(p, [&](auto type) {
    switch (p.head_dim) {
      case 32:
        return call(type, HeadDim<32>());
      case 64:
        return call(type, HeadDim<64>());
      case 80:
        return call(type, HeadDim<80>());
      case 96:
        return call(type, HeadDim<96>());
      default:
        return call(type, HeadDim<128>());
    }
  });
}

// Launch a kernel for Hopper, if the device is one and there is one for the problem; else say no. Of the forward the
// second one is for more keys than that takes.
bool launch_on_hopper(const Forward& p, cudaStream_t stream);
bool stream_on_hopper(const Forward& p, cudaStream_t stream);
bool launch_on_hopper(const Backward& p, cudaStream_t stream);
// In hopper.cu alone: multiprocessors of the current device if it is a Hopper, else 0.
int multiprocessors_of_hopper();

}  // namespace tlalign::cuda
