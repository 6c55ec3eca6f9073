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

__device__ float offset_of(float number) { return number; }
__device__ float offset_of(__nv_bfloat16 number) { return __bfloat162float(number); }
__device__ float offset_of(__half number) { return __half2float(number); }
__device__ float offset_of(uint8_t is_seen) { return is_seen != 0 ? 0.0f : -INFINITY; }

// Finite numbers are brought to the greatest of float16, as those of masks: were all keys of a query at -1e9, rounding
// would tell them apart. A number that is none stays so.
__device__ float within_reach(float number) {
  const float size = fabsf(number);
  return size > 65504.0f && size < INFINITY ? copysignf(65504.0f, number) : number;
}

// Of two queries, 8 apart, and two keys, those that are there.
template <class T>
__device__ void read_offsets(float (&words)[4], const Offsets& o, int64_t from, int queries, int keys) {
  const T* data = reinterpret_cast<const T*>(o.data) + from;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i / 2 * 8 < queries && i % 2 < keys)
      words[i] = within_reach(offset_of(data[i / 2 * 8 * o.query + i % 2 * o.key]));
  }
}

// A bias, zeros if there is none, or a mask as `read_starts` has them, -inf for keys that there are not: four a thread,
// and 16 x 16 a block.
template <bool OF_MASK>
__global__ void pack_starts(const __grid_constant__ Problem p) {
  const Offsets& offsets = OF_MASK ? p.mask : p.bias;
  const Starts& starts = OF_MASK ? p.mask_starts : p.bias_starts;
  const unsigned above = starts.columns.quotient(blockIdx.x), column = blockIdx.x - above * starts.columns.divisor;
  const unsigned pair = starts.rows.quotient(above), row = above - pair * starts.rows.divisor;
  const unsigned image = starts.heads.quotient(pair), head = pair - image * starts.heads.divisor;
  const int query = row * 16 + threadIdx.x % 32 / 4, key = column * 16 + threadIdx.x / 32 * 8 + threadIdx.x % 4 * 2;
  const int queries = p.queries - query, keys = p.keys - key;
  float words[4] = {0.0f, keys > 1 ? 0.0f : -INFINITY, 0.0f, keys > 1 ? 0.0f : -INFINITY};
  if (keys <= 0) words[0] = words[2] = -INFINITY;
  const int64_t from = image * offsets.image + head * offsets.head + query * offsets.query + key * offsets.key;
  if (offsets.data != nullptr) {
    switch (offsets.dtype) {
      case DType::float32:
        read_offsets<float>(words, offsets, from, queries, keys);
        break;
      case DType::bfloat16:
        read_offsets<__nv_bfloat16>(words, offsets, from, queries, keys);
        break;
      case DType::float16:
        read_offsets<__half>(words, offsets, from, queries, keys);
        break;
      default:
        read_offsets<uint8_t>(words, offsets, from, queries, keys);
    }
  }
  const float factor = LOG2_E * inverse_of(p.unit);
  reinterpret_cast<float4*>(starts.data)[uint64_t(blockIdx.x) * FOURS + threadIdx.x] =
      make_float4(words[0] * factor, words[1] * factor, words[2] * factor, words[3] * factor);
}

template <bool OF_MASK>
void launch(const Problem& p, cudaStream_t stream) {
  Starts unused;
  const int64_t numbers = lay_out(unused, OF_MASK ? p.mask : p.bias, p.batch, p.heads, p.queries, p.keys);
  pack_starts<OF_MASK><<<unsigned(numbers / 256), FOURS, 0, stream>>>(p);
  check(cudaGetLastError(), "pack_starts", p);
}

}  // namespace

std::string launch_error() {
  cudaFuncAttributes unused;
  const cudaError_t status = cudaFuncGetAttributes(&unused, pack_places);
  if (status == cudaSuccess) return "";
  cudaGetLastError();  // or the next launch would be told of it
  return cudaGetErrorString(status);
}

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
