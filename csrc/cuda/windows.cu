// What is the same for all images in windows: where tokens lie, and what products of queries and keys begin with.
#include <algorithm>

#include "cuda/attention.h"
#include "cuda/launch.h"
#include "cuda/scores.h"
#include "cuda/windows.h"

namespace tlalign::cuda {
namespace {

constexpr unsigned THREADS = 256;

// The place of a token in the padded and rolled map: see `Window`, and `token_numbers` of windows.py.
__device__ int find_place(const Windows& map, unsigned window, unsigned token) {
  const unsigned down = map.width.quotient(token), across = token - down * map.across.window;
  const unsigned window_row = map.of_row.quotient(window), window_column = window - window_row * map.of_row.divisor;
  if (int(down) >= map.down.window) return Window::NOWHERE;
  const int row = window_row * map.down.window + down, column = window_column * map.across.window + across;
  const int rows = map.down.tokens, columns = map.across.tokens, beside = map.padded_width - columns;
  if (row >= rows) return ~(rows * beside + (row - rows) * map.padded_width + column);
  if (column >= columns) return ~(row * beside + column - columns);
  const int own_row = row + map.down.rolled, own_column = column + map.across.rolled;
  return (own_row < rows ? own_row : own_row - rows) * columns +
         (own_column < columns ? own_column : own_column - columns);
}

// The bias as `read_starts` has it, -inf for keys that there are not.
__device__ float find_start(const Problem& p, unsigned number) {
  const unsigned tiles = padded(p.keys) / 16;
  const unsigned word = number % 4, lane = number / 4 % 32, half = number / 128 % 2, tile = number / 256;
  const unsigned head = tile / (tiles * tiles), row = tile / tiles % tiles;
  const int query = row * 16 + lane / 4 + word / 2 * 8, key = tile % tiles * 16 + half * 8 + lane % 4 * 2 + word % 2;
  if (key >= p.keys) return -INFINITY;
  if (p.bias.data == nullptr || query >= p.queries) return 0.0f;
  return offset_of(p.bias, 0, head, query, key) * (LOG2_E / p.windows.unit);
}

__global__ void pack_windows(const __grid_constant__ Problem p) {
  const unsigned number = blockIdx.x * THREADS + threadIdx.x, tokens = padded(p.keys);
  const unsigned heads = p.windows.start_head == 0 ? 1 : p.heads;
  if (number < p.windows.of_image.divisor * tokens) {
    p.windows.places[number] = find_place(p.windows, number / tokens, number % tokens);
  }
  if (number < heads * tokens * tokens) p.windows.starts[number] = find_start(p, number);
}

}  // namespace

void prepare_windows(const Problem& p, cudaStream_t stream) {
  const int64_t heads = p.windows.start_head == 0 ? 1 : p.heads, tokens = padded(p.keys);
  const int64_t numbers = tokens * std::max<int64_t>(heads * tokens, p.windows.of_image.divisor);
  pack_windows<<<unsigned((numbers + THREADS - 1) / THREADS), THREADS, 0, stream>>>(p);
  check(cudaGetLastError(), "pack_windows", p);
}

}  // namespace tlalign::cuda
