// What the products of queries and keys of windows begin with.
#include <limits>

#include "cuda/attention.h"
#include "cuda/launch.h"
#include "cuda/scores.h"

namespace tlalign::cuda {
namespace {

constexpr unsigned THREADS = 256;

// A bias as `read_starts` has it: -inf for keys that there are not.
__global__ void pack_window_bias(const __grid_constant__ Problem p) {
  const unsigned tiles = padded(p.keys) / 16, number = blockIdx.x * THREADS + threadIdx.x;
  const unsigned word = number % 4, lane = number / 4 % 32, half = number / 128 % 2, tile = number / 256;
  const unsigned head = tile / (tiles * tiles), row = tile / tiles % tiles;
  const int query = row * 16 + lane / 4 + word / 2 * 8, key = tile % tiles * 16 + half * 8 + lane % 4 * 2 + word % 2;
  float start = key < p.keys ? 0.0f : -INFINITY;
  if (p.bias.data != nullptr && query < p.queries && key < p.keys) {
    start = offset_of(p.bias, 0, head, query, key) * (LOG2_E / p.windows.unit);
  }
  p.windows.starts[number] = start;
}

}  // namespace

void pack_starts(const Problem& p, cudaStream_t stream) {
  const int64_t heads = p.windows.start_head == 0 ? 1 : p.heads;
  pack_window_bias<<<unsigned(heads * starts(p.keys) / THREADS), THREADS, 0, stream>>>(p);
  check(cudaGetLastError(), "pack_window_bias", p);
}

}  // namespace tlalign::cuda
