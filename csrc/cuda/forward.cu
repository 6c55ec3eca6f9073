// The forward: A.V and mean_h(A).share in one pass, on tensor cores of Ampere and newer (mma.sync).
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <type_traits>

#include "cuda/attention.h"
#include "cuda/forward.h"
#include "cuda/launch.h"
#include "cuda/windows.h"

namespace tlalign::cuda {
namespace {

// Blocks take more than one head in turn if at least so many blocks remain: a few times what a GPU holds at once.
constexpr int FEW_BLOCKS = 2048;

// Keys of a block of the first of two small kernels, whose threads have two each, and threads of one of the second.
constexpr unsigned KEYS_OF_PACKING = 64, THREADS_OF_AVERAGING = 64;

constexpr __host__ __device__ unsigned blocks_of(unsigned threads, unsigned of_block) {
  return (threads + of_block - 1) / of_block;
}

// Lays labels out for blocks that do not do it themselves, zeros from key Nk on and where there are none.
template <class T, bool WINDOWS>
__global__ void pack_labels(const __grid_constant__ Forward p) {
  const unsigned row = laid_out(p.keys), blocks = row / KEYS_OF_PACKING, image = blockIdx.x / blocks;
  const unsigned pair = blockIdx.x % blocks * (KEYS_OF_PACKING / 2) + threadIdx.x;
  // 16 pairs after 16 others; and of those every fourth one lies beside the last, in a thread's 16 bytes.
  uint32_t* to = reinterpret_cast<uint32_t*>(static_cast<Fragment*>(p.labels) + image * p.labels_of_image) +
                 (pair / 16 * 64 + pair % 4 * 4 + pair / 4 % 4);
#pragma unroll 1
  for (int group = 0; group < p.label_groups; ++group, to += 2 * row) {
    const LabelsOfPair labels = labels_of_pair<T, WINDOWS>(p, image, group, pair);
    to[0] = WINDOWS && group > 0 ? labels.has_label : labels.is_key;
#pragma unroll
    for (int i = 0; i < PARTS; ++i) to[16 * (1 + i)] = labels.parts[i];
  }
}

// The mean over the heads in which a query sees a key, in fixed order, averaged with the residual, where no block had
// all of them. Each row of head_share is the sum of the heads that a block had. `MASKED`: a query may see no key. Else
// a thread has two queries.
template <bool MASKED>
__global__ void average_heads(const __grid_constant__ Forward p) {
  constexpr unsigned STEP = THREADS_OF_AVERAGING, COUNT = MASKED ? 1 : 2;
  const unsigned queries = p.queries, blocks = blocks_of(queries, STEP * COUNT), image = blockIdx.x / blocks;
  const unsigned query = blockIdx.x % blocks * (STEP * COUNT) + threadIdx.x;
  if (query >= queries) return;
  HeadMean mean(p);
  if (MASKED) {
    const float* log_sum_exp = p.log_sum_exp + uint64_t(image) * p.heads * queries + query;
    int seeing = 0;
    for (int head = 0; head < p.heads; ++head, log_sum_exp += queries) seeing += *log_sum_exp != -INFINITY;
    mean = HeadMean(p, float(seeing));
  }
#pragma unroll 1
  for (int source = 0; source < p.sources; ++source) {
    const float* share = p.head_share + (uint64_t(image) * p.turns.divisor * p.sources + source) * queries + query;
    float sum[COUNT] = {};
#pragma unroll 4
    for (unsigned turn = 0; turn < p.turns.divisor; ++turn, share += uint64_t(queries) * p.sources) {
#pragma unroll
      for (unsigned i = 0; i < COUNT; ++i) {
        if (i == 0 || query + i * STEP < queries) sum[i] += share[i * STEP];
      }
    }
#pragma unroll
    for (unsigned i = 0; i < COUNT; ++i) {
      const uint64_t out = (uint64_t(image) * queries + query + i * STEP) * p.sources + source;
      if (i == 0 || query + i * STEP < queries) mean.write(p, out, sum[i]);
    }
  }
}

// The same for windows, where the mean is over the labels that there are: divided by their part of the attention, which
// is the last row of head_share.
__global__ void average_heads_of_windows(const __grid_constant__ Forward p) {
  const unsigned queries = p.queries, blocks = blocks_of(queries, THREADS_OF_AVERAGING), image = blockIdx.x / blocks;
  const unsigned query = blockIdx.x % blocks * THREADS_OF_AVERAGING + threadIdx.x;
  const Window window(p.windows, image);
  if (!window.has(query)) return;
  const uint64_t out = window.token_of_all(query) * p.sources;
  const unsigned turns = p.turns.divisor, rows = p.sources + 1;
  const float* shares = p.head_share + uint64_t(image) * turns * rows * queries + query;
  const auto sum_of = [&](unsigned source) {
    float sum = 0.0f;
#pragma unroll 4
    for (unsigned turn = 0; turn < turns; ++turn) sum += shares[(uint64_t(turn) * rows + source) * queries];
    return sum;
  };
  const HeadMean mean(p, sum_of(p.sources));
#pragma unroll 1
  for (int source = 0; source < p.sources; ++source) mean.write(p, out + source, sum_of(source));
}

template <class T, int D, int OCTETS, int WARPS, bool STREAMS, Kind KIND, int LABEL_BLOCKS>
__global__ void __launch_bounds__(32 * WARPS, ForwardKernel<T, D, OCTETS, WARPS, STREAMS, KIND, LABEL_BLOCKS>::BLOCKS)
    attention_forward(const __grid_constant__ Forward p) {
  extern __shared__ __align__(256) unsigned char shared[];
  ForwardKernel<T, D, OCTETS, WARPS, STREAMS, KIND, LABEL_BLOCKS>{p, uint32_t(__cvta_generic_to_shared(shared))}.run();
}

template <class T, Kind KIND>
void pack(const Forward& p, cudaStream_t stream) {
  const int64_t blocks = (p.sources == 0 ? 1 : p.batch) * laid_out(p.keys) / KEYS_OF_PACKING;
  pack_labels<T, KIND == Kind::windows><<<unsigned(blocks), KEYS_OF_PACKING / 2, 0, stream>>>(p);
  check(cudaGetLastError(), "pack_labels", p);
}

template <Kind KIND>
void average(const Forward& p, cudaStream_t stream) {
  if (p.sources == 0) return;
  const auto kernel = KIND == Kind::windows   ? average_heads_of_windows
                      : KIND == Kind::offsets ? average_heads<true>
                                              : average_heads<false>;
  const int64_t blocks = p.batch * blocks_of(p.queries, THREADS_OF_AVERAGING * (KIND == Kind::plain ? 2 : 1));
  kernel<<<unsigned(blocks), THREADS_OF_AVERAGING, 0, stream>>>(p);
  check(cudaGetLastError(), "average_heads", p);
}

template <class T, int D, int OCTETS, int WARPS, bool STREAMS, Kind KIND, int LABEL_BLOCKS>
void launch(Forward p, cudaStream_t stream) {
  p.of_sum_of_heads = (p.residual == nullptr ? 1.0f : 0.5f) / float(p.heads);
  p.shares_of_queries = p.queries * p.sources, p.shares_of_keys = p.keys * p.sources;
  p.label_groups = label_groups(p.sources, KIND == Kind::windows);
  // Where there are none, those of all images are the same.
  p.labels_of_image = p.sources == 0 ? 0 : labels_of_image(p.label_groups, p.keys) * sizeof(T) / sizeof(Fragment);
  p.heads_of_block = 1;
  p.turns = Divisor(p.heads);
  using Kernel = ForwardKernel<T, D, OCTETS, WARPS, STREAMS, KIND, LABEL_BLOCKS>;
  if (KIND == Kind::plain && LABEL_BLOCKS == 1) {
    if (OCTETS == 25 && launch_on_hopper(p, stream)) return average<KIND>(p, stream);
    if ((STREAMS || OCTETS == 32) && stream_on_hopper(p, stream)) return average<KIND>(p, stream);
  }
  if (!Kernel::TURNS) pack<T, KIND>(p, stream);
  p.blocks = Divisor(Kernel::QUERY_TURNS ? 1 : blocks_of(p.queries, Kernel::QUERIES));
  const int64_t pairs = p.blocks.divisor * p.batch * p.heads;
  p.query_head_bytes = unsigned(p.query.head), p.key_head_bytes = unsigned(p.key.head);
  p.value_head_bytes = unsigned(p.value.head);
  if (Kernel::TURNS) p.heads_of_block = int(std::clamp<int64_t>(pairs / FEW_BLOCKS, 1, p.heads));
  p.turns = Divisor(blocks_of(p.heads, p.heads_of_block));
  const int64_t blocks = p.blocks.divisor * p.batch * p.turns.divisor;
  launch<Kernel>(attention_forward<T, D, OCTETS, WARPS, STREAMS, KIND, LABEL_BLOCKS>, "attention_forward", blocks, p,
                 stream);
  if (!Kernel::has_all_heads(p)) average<KIND>(p, stream);
}

// All keys in one step where registers hold their scores: up to 256.
template <class T, int D, Kind KIND>
void launch_for_keys(const Forward& p, cudaStream_t stream) {
  if (p.sources > 2) {
    if (p.keys > 64 && p.keys <= 256) return launch<T, D, 32, 4, false, KIND, 4>(p, stream);
    // A step of the streaming kernel has 64 keys, but for the widest heads.
    if constexpr (D > 96) {
      if (p.keys <= 64) return launch<T, D, 8, 4, false, KIND, 4>(p, stream);
    }
    return launch<T, D, D <= 96 ? 8 : 4, 4, true, KIND, 4>(p, stream);
  }
  // Where blocks take heads in turn, labels of two sources take kernels of their own; with offsets, or in wider heads,
  // which are few, they stream.
  if (p.keys <= 64 && p.sources == 2) {
    constexpr bool TAKES_TURNS = KIND != Kind::offsets && D <= 64;
    return launch<T, D, 8, 4, !TAKES_TURNS, KIND, TAKES_TURNS ? 2 : 1>(p, stream);
  }
  if constexpr (D <= 64) {
    if constexpr (KIND == Kind::plain) {
      if (p.keys <= 32) return launch<T, D, 4, 4, false, KIND, 1>(p, stream);
    }
    if (p.keys <= 56) return launch<T, D, 7, 4, false, KIND, 1>(p, stream);
  }
  if (p.keys <= 64) return launch<T, D, 8, 4, false, KIND, 1>(p, stream);
  // In windows one kernel has all from here to 256 keys.
  if constexpr (D <= 64 && KIND != Kind::windows) {
    if constexpr (KIND == Kind::plain) {
      if (p.keys <= 128) return launch<T, D, 16, 4, false, KIND, 1>(p, stream);
      if (p.keys <= 192) return launch<T, D, 24, 4, false, KIND, 1>(p, stream);
    }
    // As many queries as keys are 13 times 16: two blocks of 7 warps load K and V half as often as four of 4. But with
    // heads of 32 or a bias ptxas does not get by with 128 registers, and with more only one such block is resident.
    constexpr int WARPS = D == 64 && KIND == Kind::plain ? 7 : 4;
    if (p.keys <= 200) return launch<T, D, 25, WARPS, false, KIND, 1>(p, stream);
  }
  if (p.keys <= 256) return launch<T, D, 32, 4, false, KIND, 1>(p, stream);
  launch<T, D, 8, 4, true, KIND, 1>(p, stream);
}

}  // namespace

void forward(const Forward& p, cudaStream_t stream) {
  prepare(p, stream);
  if (p.windows.places != nullptr) {
    return with_dtype(
        p, [&](auto type) { launch_for_keys<decltype(type), HEAD_DIM_OF_WINDOWS, Kind::windows>(p, stream); });
  }
  with_types(p, [&](auto type, auto head_dim) {
    using T = decltype(type);
    if (p.bias_starts.data != nullptr) {
      launch_for_keys<T, head_dim(), Kind::offsets>(p, stream);
    } else {
      launch_for_keys<T, head_dim(), Kind::plain>(p, stream);
    }
  });
}

}  // namespace tlalign::cuda
