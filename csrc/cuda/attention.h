// Attention with label propagation on NVIDIA GPUs: what is passed to the kernels, by value. `forward.cu` has them.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "rows.h"

#if defined(__CUDACC__)
#define TLALIGN_BOTH __host__ __device__
#else
#define TLALIGN_BOTH
#endif

namespace tlalign::cuda {

// Divides numbers below 2^31 by a multiplication: with the least s for which 2^s >= d, and m = 2^(31 + s) / d, rounded
// up, n / d is 2 n m / 2^(32 + s).
struct Divisor {
  uint32_t divisor = 1, multiplier = 1u << 31, shift = 0;

  Divisor() = default;
  explicit Divisor(uint32_t d) : divisor(d) {
    while ((uint64_t(1) << shift) < d) ++shift;
    multiplier = uint32_t(((uint64_t(1) << 31 << shift) + d - 1) / d);
  }
#if defined(__CUDACC__)
  __device__ unsigned quotient(unsigned number) const { return __umulhi(2 * number, multiplier) >> shift; }
#endif
};

struct Forward {
  int64_t batch;
  int heads, queries, keys, head_dim, sources;  // sources: 0 to MAX_SOURCES
  DType dtype;                                  // of query, key, value, output: bfloat16 or float16
  float scale;
  Rows query, key, value;  // each row begins at a multiple of 16 bytes; for the kernel `forward` sets strides in bytes
  Offsets bias, mask;
  const float* share;     // (B, Nk, S) or null
  const float* residual;  // (B, Nq, S) or null
  void* parts;            // scratch (B, S * PARTS, padded_keys(keys)) of dtype, or null
  float* head_share;      // scratch (B, H, S, Nq), or null
  void* output;           // (B, Nq, H, D)
  float* share_out;       // (B, Nq, S) or null
  float* log_sum_exp;     // (B, H, Nq)
  // Set by `forward`: heads that a block takes in turn, what divides an image into blocks by them, and by queries.
  int heads_of_block;
  Divisor turns, blocks;
};

constexpr int MAX_SOURCES = 8;
// A share of float32 is the sum of three parts of 8 (bfloat16) or 11 (float16) bits.
constexpr int PARTS = 3;
constexpr int HEAD_DIMS[] = {32, 64, 80, 96, 128};

// Keys rounded up to what a step of the kernels takes.
inline TLALIGN_BOTH int padded_keys(int keys) { return (keys + 63) / 64 * 64; }

// Launches on `stream` of the current device. Throws std::runtime_error with the kernel and its shape where CUDA fails.
void forward(const Forward& arguments, cudaStream_t stream);

}  // namespace tlalign::cuda
