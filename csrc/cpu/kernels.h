// The table of functions that each instruction set provides. Plain data only: see `vector.h`.
#pragma once

#include "attention.h"

namespace tlalign::cpu {

// Instruction sets that are compiled for this processor, the best one first.
#if defined(__x86_64__)
#define TLALIGN_CPU_ISAS(X) X(avx512bf16) X(avx512) X(avx2) X(portable)
#else
#define TLALIGN_CPU_ISAS(X) X(portable)
#endif

// More sources than these take a pass of their own, whose cost does not grow with the number of heads.
constexpr int64_t MAX_FUSED_SOURCES = 8;

// What one call of a kernel is to do: some heads of some images, head after head within an image; in the forward one
// chunk of the queries.
struct Task {
  int64_t first_head, heads, first_image, images, chunk, chunks;
  // Where the thread will probably go on, so that the first rows can be fetched ahead; image -1 if nowhere.
  int64_t next_head, next_image;
};

struct Kernels {
  int64_t lanes;
  bool only_bfloat16;  // for other tokens the kernels of the next instruction set are to be taken
  // Parts that the queries are divided into by the forward, `fewest` if they are large enough, and by the pass over
  // dense labels.
  int64_t (*forward_chunks)(const Problem&, int64_t fewest);
  int64_t (*dense_share_chunks)(const Problem&);
  // Floats that one call needs as scratch.
  int64_t (*forward_scratch)(const Problem&);
  int64_t (*backward_scratch)(const Problem&);
  int64_t (*dense_share_scratch)(const Problem&);
  // Output and log-sum-exp; the share in one head into head_share (B, H, head_sums, Nq), and of an image of which
  // heads_left (B), the heads that are still to be done of each chunk, becomes 0, their mean.
  void (*forward)(const Forward&, const Task&, int64_t* heads_left, float* head_share, float* scratch);
  // Share of one chunk of queries of one image, from the log-sum-exp of all heads; for any number of sources.
  void (*dense_share)(const Forward&, const float* head_share, int64_t image, int64_t chunk, float* scratch);
  // Gradients of query, key and value; those of the bias and of the padding, summed over the images of the task, into
  // grad_bias (H, Nk, padded_queries) and grad_padding (H, 3, D) unless that is null.
  void (*backward)(const Backward&, const Task&, float* grad_bias, float* grad_padding, float* scratch);
  // Gradient of the bias in one image and head of its own, for the queries of one vector: the sum of what tasks left in
  // parts (parts of the images, H, Nk, padded_queries).
  void (*sum_grad_bias)(const Backward&, const float* parts, int64_t image_parts, int64_t image, int64_t head,
                        int64_t first_query);
  // Gradient of the padding in one head: the sum of what tasks left in parts (parts of the images, H, 3, D).
  void (*sum_grad_padding)(const Backward&, const float* parts, int64_t image_parts, int64_t head);
};

// Sources that are mixed head by head.
static inline int64_t fused_sources(const Problem& problem) {
  return problem.sources <= MAX_FUSED_SOURCES ? problem.sources : 0;
}

// What the forward leaves of each head and query: the shares that it mixes, and where there is padding the part of its
// weights that real keys have.
static inline int64_t head_sums(const Problem& problem) {
  return fused_sources(problem) + (problem.windows.padding != nullptr && problem.sources > 0);
}

// Queries rounded up to whole vectors.
static inline int64_t padded_queries(const Problem& problem, int64_t lanes) {
  return (problem.queries + lanes - 1) / lanes * lanes;
}

// Floats that bias and mask of a head take as columns, where all images share them.
static inline int64_t shared_offsets(const Problem& problem, int64_t lanes) {
  return problem.keys * padded_queries(problem, lanes);
}

// Whether tasks have several images, so that their bias is arranged once for all of them.
static inline bool shares_bias(const Problem& problem) {
  return problem.bias.data != nullptr && problem.bias.image == 0 && problem.batch > 1;
}

// Heads that such a task of the forward has at most: their bias is to stay in the cache.
static inline int64_t heads_together(const Problem& problem, int64_t lanes) {
  constexpr int64_t CACHED = 1 << 16;  // floats
  const int64_t heads = CACHED / shared_offsets(problem, lanes);
  return heads < 1 ? 1 : heads < problem.heads ? heads : problem.heads;
}

}  // namespace tlalign::cpu
