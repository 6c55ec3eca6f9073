// What the kernels of both directions find laid out for them: what products of queries and keys begin with, and where
// the tokens of windows lie.
#include "cuda/attention.h"
#include "cuda/launch.h"
#include "cuda/scores.h"
#include "cuda/windows.h"

namespace tlalign::cuda {
namespace {

// Of a block that lays out places. One that lays out starts has as many as 16 x 16 of them have fours.
constexpr unsigned THREADS = 256, FOURS = 64;

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

__global__ void pack_places(const __grid_constant__ Problem p) {
  const unsigned number = blockIdx.x * THREADS + threadIdx.x, tokens = p.windows.places_of_window;
  if (number >= p.windows.of_image.divisor * tokens) return;
  p.windows.places[number] = find_place(p.windows, number / tokens, number % tokens);
}

__device__ float offset_of(const Offsets& o, int64_t at) {
  switch (o.dtype) {
    case DType::float32:
      return reinterpret_cast<const float*>(o.data)[at];
    case DType::bfloat16:
      return __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(o.data)[at]);
    case DType::float16:
      return __half2float(reinterpret_cast<const __half*>(o.data)[at]);
    default:
      return reinterpret_cast<const uint8_t*>(o.data)[at] != 0 ? 0.0f : -INFINITY;
  }
}

// A bias, zeros if there is none, or a mask as `read_starts` has them, -inf for keys that there are not: four a thread,
// and 16 x 16 a block.
template <bool OF_MASK>
__global__ void pack_starts(const __grid_constant__ Problem p) {
  const Offsets& offsets = OF_MASK ? p.mask : p.bias;
  const Starts& starts = OF_MASK ? p.mask_starts : p.bias_starts;
  const unsigned columns = padded(p.keys) / 16, rows = starts.row == 0 ? 1 : padded(p.queries) / 16;
  const unsigned column = blockIdx.x % columns, tile = blockIdx.x / columns, row = tile % rows;
  const unsigned heads = starts.head == 0 ? 1 : p.heads, image = tile / rows / heads, head = tile / rows % heads;
  const unsigned lane = threadIdx.x % 32;
  const int key = column * 16 + threadIdx.x / 32 * 8 + lane % 4 * 2, query = row * 16 + lane / 4;
  const int64_t from = image * offsets.image + head * offsets.head + query * offsets.query + key * offsets.key;
  float words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const bool is_key = key + i % 2 < p.keys, is_query = query + i / 2 * 8 < p.queries;
    words[i] = is_key ? 0.0f : -INFINITY;
    if (offsets.data != nullptr && is_key && is_query) {
      words[i] = offset_of(offsets, from + i / 2 * 8 * offsets.query + i % 2 * offsets.key) * (LOG2_E / p.unit);
    }
  }
  const uint64_t at = uint64_t(blockIdx.x) * FOURS + threadIdx.x;
  reinterpret_cast<float4*>(starts.data)[at] = make_float4(words[0], words[1], words[2], words[3]);
}

template <bool OF_MASK>
void launch(const Problem& p, cudaStream_t stream) {
  Starts unused;
  const int64_t numbers = lay_out(unused, OF_MASK ? p.mask : p.bias, p.batch, p.heads, p.queries, p.keys);
  pack_starts<OF_MASK><<<unsigned(numbers / 256), FOURS, 0, stream>>>(p);
  check(cudaGetLastError(), "pack_starts", p);
}

}  // namespace

void prepare(const Problem& p, cudaStream_t stream) {
  if (p.windows.places != nullptr) {
    const unsigned places = p.windows.of_image.divisor * p.windows.places_of_window;
    pack_places<<<(places + THREADS - 1) / THREADS, THREADS, 0, stream>>>(p);
    check(cudaGetLastError(), "pack_places", p);
  }
  if (p.bias_starts.data != nullptr) launch<false>(p, stream);
  if (p.mask_starts.data != nullptr) launch<true>(p, stream);
}

}  // namespace tlalign::cuda
