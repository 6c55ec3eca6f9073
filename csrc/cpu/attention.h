// Attention with label propagation on the CPU: what is passed to it. `attention.cpp` divides the work, `kernels.cpp`,
// compiled once per instruction set, does it.
#pragma once

#include <cstdint>
#include <string>

#include "rows.h"

namespace tlalign::cpu {

// Images that are windows of a map, W of each map after one another: `batch` counts windows, queries and keys are the N
// tokens of a window. Rows, and labels (B, map_tokens, S), are those of the map.
struct Windows {
  int64_t count = 0;                 // W; 0: images are no windows
  int64_t map_tokens = 0;            // Ht * Wt
  const int32_t* tokens = nullptr;   // (W, N), the token of the map that lies there, or -1 in the padding
  const int32_t* regions = nullptr;  // (W, N), tokens of different ones see each other less; or null
  const char* padding = nullptr;     // (3, H, D), query, key and value in the padding; null exactly if there is none
};

// Both directions. Sizes are at least 1 but for `sources`, which is 0 without labels; head_dim is at most 256.
struct Problem {
  int64_t batch, heads, queries, keys, head_dim, sources;
  DType dtype;  // of query, key, value, output and their gradients: float32, bfloat16 or float16
  float scale;
  double dropout_p;
  uint64_t dropout_seed;
  Rows query, key, value;
  Offsets bias, mask;
  Windows windows;
};

struct Forward : Problem {
  const float* share;     // (B, Nk, S) or null
  const float* residual;  // (B, Nq, S) or null
  Rows output;            // (B, Nq, H, D)
  float* share_out;       // (B, Nq, S) or null
  float* log_sum_exp;     // (B, H, Nq)
};

struct Backward : Problem {
  Rows grad_output, output;
  const float* log_sum_exp;  // (B, H, Nq)
  Rows grad_query, grad_key, grad_value;
  char* grad_bias;                  // (bias_images, bias_heads, Nq, Nk) in the dtype of the bias, or null
  int64_t bias_images, bias_heads;  // 1 where the bias is broadcast, else B and H
  char* grad_padding;               // (3, H, D), null exactly if `windows.padding` is
};

// The instruction set that a call takes: the best one that the processor has, or the one that is wanted by name. Throws
// std::invalid_argument where that is not built, or the processor lacks it.
const char* instruction_set(const std::string& wanted);

// Fill the results with at most `threads` threads; the bits do not depend on how many. Throw as `instruction_set` does,
// and std::bad_alloc.
void forward(const Forward& arguments, const std::string& isa, int threads);
void backward(const Backward& arguments, const std::string& isa, int threads);

}  // namespace tlalign::cpu
