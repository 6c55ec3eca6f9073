// Attention with label propagation on NVIDIA GPUs: what is passed to the kernels, by value.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>

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
  TLALIGN_BOTH bool is_one() const { return shift == 0; }
#if defined(__CUDACC__)
  __device__ unsigned quotient(unsigned number) const { return __umulhi(2 * number, multiplier) >> shift; }
#endif
};

// How a map of tokens is divided into windows (windows.py), each of which counts as an image.
struct Windows {
  struct Axis {
    // Tokens of the map and of a window, windows, and by how much the map is rolled: as it was said, and less than it
    // has tokens.
    int tokens, window, windows, shift, rolled;
  };

  Axis down, across;
  // Tokens of a row of the padded map, and those of its padding.
  int padded_width, padding_tokens = 0;
  // What divides windows into images, and into rows of them, and tokens of a window into rows.
  Divisor of_image, of_row, width;
  // Where the tokens of each window of a map lie, (W, places_of_window), as `Window` has it.
  int* places = nullptr;
  int places_of_window;
  // (3, H, D), what lies in the padding, or null.
  const char* padding = nullptr;
  // What is added to products of different regions.
  float region_start;
};

// What products of queries and keys begin with, or what is added to them, in units of what they are multiplied by:
// (1 or B, 1 or H, 1 or padded(Nq) / 16, padded(Nk) / 16, 256) float32, 16 x 16 of them as `read_starts` has them. From
// an image, a head and 16 queries to the next, 0 where they are the same. The divisors are how many heads, rows of 16
// queries and columns of 16 keys there are of them.
struct Starts {
  float* data = nullptr;
  int64_t image = 0, head = 0, row = 0;
  Divisor heads, rows, columns;
};

struct Problem {
  int64_t batch;
  int heads, queries, keys, head_dim, sources;  // sources: 0 to MAX_SOURCES; 0 in the backward
  DType dtype;                                  // of query, key, value, output and their gradients: bfloat16 or float16
  float scale;
  // Each row begins at a multiple of 16 bytes, and strides are in bytes, as in all Rows here.
  Rows query, key, value;
  Offsets bias, mask;
  // Scratch where there is a bias or a mask or the scale is not positive, and for windows: the bias, or zeros; and the
  // mask, if there is one.
  Starts bias_starts, mask_starts;
  // The absolute scale times log2(e), and which bits of 16-bit numbers to flip for its sign, in queries or in keys.
  float unit;
  uint32_t flipped;
  // If its `places` are given, then rows are those of maps, `batch` and `queries` and `keys` count windows and their
  // tokens; row i of a window is not i rows behind the first, but where `places` say.
  Windows windows;
};

struct Forward : Problem {
  const float* share;     // (B, Nk, S) or null
  const float* residual;  // (B, Nq, S) or null
  // Scratch (B, label_groups, laid_out(keys) / 32, 16, 8) of dtype, of one image if there are no labels; used for many
  // keys. It has what a thread holds of the right factor of a product with 32 keys: 8 numbers of one of 4 columns.
  void* labels;
  // Scratch (B, H, S, Nq), or null; used up to the number of blocks that share the heads, if several do. Of windows
  // S + 1.
  float* head_share;
  void* output;        // (B, Nq, H, D)
  float* share_out;    // (B, Nq, S) or null
  float* log_sum_exp;  // (B, H, Nq)
  // Set by `forward`: by what a sum over all heads becomes their mean, averaged with the residual if there is one;
  // heads that a block takes in turn, and the bytes of Q, K and V from one to the next (as Rows have them, but in 32
  // bits, for one instruction to multiply and add them); shares of the queries and of the keys of an image, and
  // fragments of its labels; what divides an image into blocks by heads in turn, and by queries.
  float of_sum_of_heads;
  int heads_of_block, label_groups;
  uint32_t query_head_bytes, key_head_bytes, value_head_bytes;
  uint32_t shares_of_queries, shares_of_keys;
  uint64_t labels_of_image;
  Divisor turns, blocks;
};

// What the kernels of the backward tell each other of a query: its log-sum-exp in units of ln 2 and the row sum of
// dO * O; and, where numbers are finer than what the rounding of a large log-sum-exp does to probabilities, what makes
// up for that.
struct RowTerm {
  float log_sum_exp, row_sum;
};
struct NormalisedRowTerm : RowTerm {
  float inverse, unused;
};

struct Backward : Problem {
  Rows grad_output;          // (B, H, Nq, D), like what follows in Rows
  const void* output;        // (B, Nq, H, D)
  const float* log_sum_exp;  // (B, H, Nq)
  void* row_terms;           // scratch (B, H, padded(queries)) of RowTerm or, for float16, NormalisedRowTerm
  Rows grad_query, grad_key, grad_value;
  // Gradients of the bias, each summed over `images_of_sum` images, and over the heads if there is one bias for all:
  // (B / images_of_sum, rounded up, bias_heads, Nq, Nk), or null.
  float* bias_sums;
  int bias_heads, images_of_sum;
  // Gradients of keys and values in the padding of windows, (B, padding of a map, 2, H, D), or null.
  char* grad_padding;
  // Set by `backward`: what divides blocks into heads, and heads into images.
  Divisor query_blocks, key_blocks, heads_of_image;
};

constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;
// What is added to the scores of tokens of different regions, as in reference.py.
constexpr float REGION_BIAS = -100.0f;
constexpr int MAX_SOURCES = 8;
// A share of float32 is the sum of three parts of 8 (bfloat16) or 11 (float16) bits.
constexpr int PARTS = 3;
constexpr int HEAD_DIMS[] = {32, 64, 80, 96, 128};
// That of all models of timm that have windows, but for swinv2_cr_huge_224, whose heads of 44 have no kernels at all.
constexpr int HEAD_DIM_OF_WINDOWS = 32;

// Queries or keys rounded up to what a block takes; a step of more keys stops at the tile where they end.
inline TLALIGN_BOTH int padded(int tokens) { return (tokens + 63) / 64 * 64; }

// Of so many there are labels, and places in a window, as a step of up to 256 keys may ask for them.
inline TLALIGN_BOTH int laid_out(int tokens) { return tokens <= 64 ? 64 : (tokens + 255) / 256 * 256; }

// Labels are multiplied in groups of four columns, each of them the parts of a source behind ones, of keys that there
// are. In windows the second group begins with ones where there are labels.
inline int label_groups(int sources, bool in_windows) {
  const int least = in_windows && sources > 0 ? 2 : 1;
  return sources > least ? sources : least;
}
inline int64_t labels_of_image(int groups, int keys) { return int64_t(groups) * 4 * laid_out(keys); }

// Sets the strides of starts for a bias or a mask of so many heads, queries and keys. Returns how many numbers the
// scratch has.
inline int64_t lay_out(Starts& starts, const Offsets& offsets, int64_t batch, int heads, int queries, int keys) {
  starts.columns = Divisor(padded(keys) / 16);
  starts.rows = Divisor(offsets.query == 0 ? 1 : padded(queries) / 16);
  starts.heads = Divisor(offsets.head == 0 ? 1 : heads);
  const int64_t of_row = starts.columns.divisor * int64_t(256), of_head = of_row * starts.rows.divisor;
  const int64_t of_image = of_head * starts.heads.divisor;
  starts.row = offsets.query == 0 ? 0 : of_row;
  starts.head = offsets.head == 0 ? 0 : of_head;
  starts.image = offsets.image == 0 ? 0 : of_image;
  return of_image * (offsets.image == 0 ? 1 : batch);
}

// Why the current device can't run the kernels, or nothing: its driver may be older than what compiled them.
std::string launch_error();
// Launch on `stream` of the current device. Throw std::runtime_error with the kernel and its shape where CUDA fails.
void forward(const Forward& arguments, cudaStream_t stream);
void backward(const Backward& arguments, cudaStream_t stream);
// What both of them launch first where there is such scratch: fills starts and places.
void prepare(const Problem& problem, cudaStream_t stream);

}  // namespace tlalign::cuda
