// Where the tokens of a window lie in its map, and how a block copies their rows from and to there.
#pragma once

#include <climits>
#include <cstdint>

#include "cuda/attention.h"
#include "cuda/tiles.h"

namespace tlalign::cuda {

// The tokens of one window, counted row after row.
struct Window {
  static constexpr int NOWHERE = INT_MIN;

  const Windows& map;
  unsigned image;
  const int* places;
  int lower, right;  // from which row and column of the window on tokens lie in another region

  __device__ Window(const Windows& map, unsigned number) : map(map) {
    image = map.of_image.quotient(number);
    const unsigned of_image = number - image * map.of_image.divisor;
    const unsigned row = map.of_row.quotient(of_image), column = of_image - row * map.of_row.divisor;
    places = map.places + of_image * map.places_of_window;
    lower = map.down.window - (int(row) + 1 == map.down.windows ? map.down.shift : 0);
    right = map.across.window - (int(column) + 1 == map.across.windows ? map.across.shift : 0);
  }

  // The number of a token in the map, of one of the padding ~ its number in there, or NOWHERE beyond the window.
  __device__ int place(int token) const { return __ldg(places + token); }
  __device__ bool has(int token) const { return place(token) >= 0; }
  // Number among the tokens of all maps of the first one of this map, and of one of this window.
  __device__ uint64_t first_token() const {
    return uint64_t(image) * unsigned(map.down.tokens) * unsigned(map.across.tokens);
  }
  __device__ uint64_t token_of_all(int token) const { return first_token() + place(token); }

  // The same in all threads of a block.
  __device__ bool has_regions() const { return lower < map.down.window || right < map.across.window; }
  struct Region {
    bool is_lower, is_right;
  };
  __device__ Region region(int token) const {
    const int row = map.width.quotient(token), column = token - row * map.across.window;
    return {row >= lower, column >= right};
  }
};

// Which of 32 tokens of a window lie in other regions than that of two rows, those of a thread in a fragment.
struct Regions {
  uint32_t differing[2];  // a bit for each token from this thread's first one on

  Regions() = default;

  // Rows lane / 4 and lane / 4 + 8 from `row` on. Takes a warp.
  __device__ Regions(const Window& window, int row, int first, int lane) {
    const Window::Region own = window.region(first + lane);
    const uint32_t lower = __ballot_sync(0xffffffffu, own.is_lower), right = __ballot_sync(0xffffffffu, own.is_right);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Window::Region of_row = window.region(row + lane / 4 + 8 * i);
      differing[i] = ((lower ^ (of_row.is_lower ? ~0u : 0)) | (right ^ (of_row.is_right ? ~0u : 0))) >> lane % 4 * 2;
    }
  }

  // Of number `i` of the four that a thread has of 8 columns, which begin `column` behind the first token.
  __device__ bool differs(int i, int column) const { return differing[i / 2] >> (column + i % 2) & 1; }
};

// Which of the chunks of ROWS rows THREADS threads take, the i-th of `thread` in its turn.
template <class Tile, int THREADS>
struct Chunks {
  static constexpr int STEP = THREADS / Tile::CHUNKS;
  static_assert(!Tile::SWIZZLES || (THREADS % Tile::CHUNKS == 0 && STEP % 2 == 0),
                "a thread has one chunk of its rows");

  int row, chunk;

  __device__ Chunks(int i, int thread) {
    if constexpr (Tile::SWIZZLES) {
      row = i * STEP + thread / Tile::CHUNKS, chunk = thread % Tile::CHUNKS;
    } else {
      const typename Tile::Place place(i * THREADS + thread);
      row = place.row, chunk = place.chunk;
    }
  }
  static constexpr int count(int rows) { return (rows * Tile::CHUNKS + THREADS - 1) / THREADS; }
};

// ROWS tokens of a window from `first` on, as a block copies them: zeros beyond the window and, unless it PADS, in the
// padding.
template <class Tile, int ROWS, int THREADS, bool PADS>
struct WindowSource {
  using Own = Chunks<Tile, THREADS>;
  static constexpr int COUNT = Own::count(ROWS);

  const char *from, *padding;  // the first row of the map, and the one that lies in the padding
  int row_bytes;
  uint32_t own;  // as in SharedRows::Source, if it SWIZZLES
  int places[COUNT];

  __device__ WindowSource(const Window& window, int first, const char* data, int row_bytes, const char* padding)
      : from(data), padding(padding), row_bytes(row_bytes) {
    own = Tile::SWIZZLES ? Tile::at(Own(0, threadIdx.x).row, Own(0, threadIdx.x).chunk) : 0;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) places[i] = window.place(first + Own(i, threadIdx.x).row);
  }

  __device__ WindowSource of_head(unsigned number, unsigned bytes) const {
    WindowSource source = *this;
    source.from += uint64_t(number) * bytes;
    if (PADS) source.padding += number * (16 * Tile::CHUNKS);
    return source;
  }

  __device__ void copy(uint32_t to) const {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      const Own chunk(i, threadIdx.x);
      if (!Tile::SWIZZLES && (i + 1) * THREADS > ROWS * Tile::CHUNKS && chunk.row >= ROWS) break;
      const uint32_t at = Tile::SWIZZLES ? Tile::below(own, i * Own::STEP) : Tile::at(chunk.row, chunk.chunk);
      const char* row = from + int64_t(places[i]) * row_bytes;
      if (PADS && places[i] < 0) row = padding;
      copy_async_if(!Tile::SWIZZLES || (i + 1) * Own::STEP <= ROWS || chunk.row < ROWS, to + at, row + 16 * chunk.chunk,
                    PADS ? places[i] != Window::NOWHERE : places[i] >= 0);
    }
  }
};

// ROWS tokens of a window from `first` on, as a warp writes them from shared memory; those of the padding to where
// there are rows for each of them, or nowhere.
template <class Tile, int ROWS>
struct WindowTarget {
  using Own = Chunks<Tile, 32>;
  static constexpr int COUNT = Own::count(ROWS);

  char *to, *padding;  // the first row of each; padding: or null
  uint32_t from;       // likewise, as in SharedRows::Target
  int row_bytes, padding_row_bytes;
  int places[COUNT];

  __device__ WindowTarget(const Window& window, int first, char* to, int row_bytes, uint32_t rows, unsigned lane,
                          char* padding = nullptr, int padding_row_bytes = 0)
      : to(to), padding(padding), row_bytes(row_bytes), padding_row_bytes(padding_row_bytes) {
    from = rows + (Tile::SWIZZLES ? Tile::at(Own(0, lane).row, Own(0, lane).chunk) : 0);
#pragma unroll
    for (int i = 0; i < COUNT; ++i) places[i] = window.place(first + Own(i, lane).row);
  }

  __device__ void write(unsigned lane) const {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      const Own chunk(i, lane);
      const uint4 words =
          load_shared(Tile::SWIZZLES ? Tile::below(from, i * Own::STEP) : from + Tile::at(chunk.row, chunk.chunk));
      // Where a block goes on to the next head the compiler would keep products of 64 bits in registers.
      const int place = hidden(places[i]);
      char* row = to + int64_t(place) * row_bytes + 16 * chunk.chunk;
      if (place >= 0) {
        store_global(row, words);
      } else if (padding != nullptr && place != Window::NOWHERE) {
        store_global(padding + int64_t(~place) * padding_row_bytes + 16 * chunk.chunk, words);
      }
    }
  }
};

}  // namespace tlalign::cuda
