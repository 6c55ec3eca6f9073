// What the kernels are made of: rows in shared memory, copies, fragments of matrices and their products (PTX ISA, "Warp
// Level Matrix Instructions").
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace tlalign::cuda {

// Registers of one 16 x 16 matrix of 16-bit numbers, as a warp holds it.
using Fragment = uint4;

template <class T>
__device__ T from_float(float x);
template <>
__device__ inline __nv_bfloat16 from_float(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ inline __half from_float(float x) {
  return __float2half_rn(x);
}
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }

// Two numbers in a word, the first one lowest.
__device__ inline uint32_t pack_pair(__nv_bfloat16, float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}
__device__ inline uint32_t pack_pair(__half, float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}
template <class T>
__device__ uint32_t pack(float low, float high) {
  return pack_pair(T(), low, high);
}
__device__ inline float2 unpack_pair(__nv_bfloat16, uint32_t word) {
  return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
}
__device__ inline float2 unpack_pair(__half, uint32_t word) {
  return __half22float2(reinterpret_cast<const __half2&>(word));
}
template <class T>
__device__ float2 unpack(uint32_t word) {
  return unpack_pair(T(), word);
}

__device__ inline float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline float log2_of(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline float inverse_of(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Hides from the compiler how a number comes about: what follows from it is computed where it is needed, rather than
// kept in registers, or kept, rather than computed again.
__device__ inline unsigned hidden(unsigned number) {
  asm volatile("" : "+r"(number));
  return number;
}

__device__ inline void store_shared(uint32_t to, uint32_t word) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(word) : "memory");
}
__device__ inline void store_shared(uint32_t to, uint4 words) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(words.x), "r"(words.y), "r"(words.z),
               "r"(words.w)
               : "memory");
}
__device__ inline uint4 load_shared(uint32_t from) {
  uint4 words;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "r"(from)
               : "memory");
  return words;
}

// Not by an assignment, which the compiler splits into words.
__device__ inline void store_global(void* to, uint4 words) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(words.x), "r"(words.y), "r"(words.z),
               "r"(words.w)
               : "memory");
}

// 16 bytes from global to shared memory, or zeros.
__device__ inline void copy_async(uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
// The same, if it is wanted. No branch, which would keep the compiler from folding the address.
__device__ inline void copy_async_if(bool wanted, uint32_t to, const void* from, bool valid) {
  asm volatile("{ .reg .pred wanted; setp.ne.b32 wanted, %3, 0; @wanted cp.async.cg.shared.global [%0], [%1], 16, %2; }"
               :
               : "r"(to), "l"(from), "r"(valid ? 16 : 0), "r"(int(wanted))
               : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until all but the last PENDING groups of this thread's copies have landed.
template <int PENDING>
__device__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four 8 x 8 matrices; thread 8 i + j gives the address of row j of matrix i.
__device__ inline Fragment load_matrices(uint32_t from) {
  Fragment f;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(f.x), "=r"(f.y), "=r"(f.z), "=r"(f.w)
               : "r"(from)
               : "memory");
  return f;
}
__device__ inline Fragment load_matrices_transposed(uint32_t from) {
  Fragment f;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(f.x), "=r"(f.y), "=r"(f.z), "=r"(f.w)
               : "r"(from)
               : "memory");
  return f;
}

// The first two of them.
__device__ inline uint2 load_two_matrices(uint32_t from) {
  uint2 f;
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(f.x), "=r"(f.y)
               : "r"(from)
               : "memory");
  return f;
}
__device__ inline uint2 load_two_matrices_transposed(uint32_t from) {
  uint2 f;
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(f.x), "=r"(f.y)
               : "r"(from)
               : "memory");
  return f;
}

// sum (16 x 8) += left (16 x 16) right (16 x 8), whose upper and lower halves are `upper` and `lower`. A thread has the
// columns 2 (lane % 4) and the next of rows lane / 4 (sum[0], sum[1]) and lane / 4 + 8 (sum[2], sum[3]).
template <class T>
__device__ void multiply_add(float (&sum)[4], const Fragment& left, uint32_t upper, uint32_t lower);
#define TLALIGN_MULTIPLY_ADD(type, name)                                                                             \
  template <>                                                                                                        \
  __device__ inline void multiply_add<type>(float (&sum)[4], const Fragment& left, uint32_t upper, uint32_t lower) { \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." name "." name                                                       \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                       \
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])                                                     \
        : "r"(left.x), "r"(left.y), "r"(left.z), "r"(left.w), "r"(upper), "r"(lower));                               \
  }
TLALIGN_MULTIPLY_ADD(__nv_bfloat16, "bf16")
TLALIGN_MULTIPLY_ADD(__half, "f16")
#undef TLALIGN_MULTIPLY_ADD

// The same with the left 8 columns of `left` and 8 rows.
template <class T>
__device__ void multiply_add(float (&sum)[4], const Fragment& left, uint32_t right);
#define TLALIGN_MULTIPLY_ADD(type, name)                                                             \
  template <>                                                                                        \
  __device__ inline void multiply_add<type>(float (&sum)[4], const Fragment& left, uint32_t right) { \
    asm("mma.sync.aligned.m16n8k8.row.col.f32." name "." name                                        \
        ".f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"                                   \
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])                                     \
        : "r"(left.x), "r"(left.y), "r"(right));                                                     \
  }
TLALIGN_MULTIPLY_ADD(__nv_bfloat16, "bf16")
TLALIGN_MULTIPLY_ADD(__half, "f16")
#undef TLALIGN_MULTIPLY_ADD

// sum = left right. That it starts at zero is known here, so that no register has to be.
template <class T>
__device__ void multiply(float (&sum)[4], const Fragment& left, uint32_t upper, uint32_t lower) {
  sum[0] = sum[1] = sum[2] = sum[3] = 0.0f;
  multiply_add<T>(sum, left, upper, lower);
}

// Rows of D numbers in shared memory, in chunks of 16 bytes. Where D is a power of two, chunks of a row change places,
// else a row is padded to an odd number of them, so that the same chunk of 8 rows lies in 32 different banks.
template <class T, int D>
struct SharedRows {
  static constexpr int CHUNKS = D / 8;
  static constexpr bool SWIZZLES = (D & (D - 1)) == 0;
  static constexpr int PITCH = 16 * (SWIZZLES ? CHUNKS : CHUNKS | 1);  // bytes
  // Rows that fill the 128 bytes of all banks once.
  static constexpr int ROWS_OF_LINE = CHUNKS < 8 ? 8 / CHUNKS : 1;

  // Rows begin at a multiple of so many bytes.
  static constexpr int ALIGNMENT = SWIZZLES && PITCH > 128 ? PITCH : 128;

  static constexpr __host__ __device__ int bytes(int rows) { return rows * PITCH; }

  // By what the chunks of a row are exchanged. They change places with a period of 8 rows: 8 k rows further on the same
  // chunk lies 8 k pitches further on.
  static constexpr __device__ int exchange(int row) {
    return SWIZZLES ? row / ROWS_OF_LINE & (CHUNKS < 8 ? CHUNKS - 1 : 7) : 0;
  }
  static __device__ uint32_t at(int row, int chunk) { return row * PITCH + (chunk ^ exchange(row)) * 16; }

  // From an address in a chunk to the same place of the chunk whose number is greater by `chunks`, if the two numbers
  // have no bits in common ...
  static __device__ uint32_t beside(uint32_t address, int chunks) {
    return SWIZZLES ? address ^ 16 * chunks : address + 16 * chunks;
  }
  // ... or to that of the same chunk `rows` further on, if these are a multiple of 4 or have no bits in common with the
  // number of the row.
  static __device__ uint32_t below(uint32_t address, int rows) {
    return (address ^ 16 * exchange(rows)) + rows * PITCH;
  }

  // Where rows are padded, threads take their chunks in such an order that those of 8 threads, two chunks side by side
  // of every other row, lie in different banks.
  struct Place {
    int row, chunk;

    __device__ explicit Place(int number)
        : row(number / (8 * CHUNKS) * 8 + number / 2 % 4 * 2 + number / 8 % 2),
          chunk(number / 16 % (CHUNKS / 2) * 2 + number % 2) {}
  };

  // ROWS rows in memory from `first` on, as a block copies them: from row `end` on zeros or, if it REPEATS, the last
  // one. The first CERTAIN rows come before `end`.
  template <int ROWS, int THREADS, bool REPEATS, int CERTAIN = 0>
  struct Source {
    // Where a row takes a whole number of times 4 threads, a thread has the same chunk of each of its rows.
    static constexpr int STEP = THREADS / CHUNKS;
    static constexpr bool IS_REGULAR = THREADS % CHUNKS == 0 && STEP % 4 == 0;

    const char* from;     // the first row, if it IS_REGULAR this thread's own chunk of its own first row
    int row_bytes, left;  // bytes from row to row, rows from there to the last one that there is
    uint32_t own;         // in shared memory, after where rows begin there: this thread's own chunk

    __device__ Source(const char* data, int pitch, int first, int end) : row_bytes(pitch) {
      // A number of 32 bits, which the compiler would rather multiply as one of 64.
      asm("" : "+r"(row_bytes));
      const int own_row = IS_REGULAR ? threadIdx.x / CHUNKS : 0, own_chunk = IS_REGULAR ? threadIdx.x % CHUNKS : 0;
      from = data + uint64_t(unsigned(first + own_row)) * unsigned(row_bytes) + 16 * own_chunk;
      // One base for all rows: the compiler would rather begin anew at `data` each time.
      asm("" : "+l"(from));
      left = end - 1 - first - own_row;
      own = at(own_row, own_chunk);
    }

    // Of the head that is so many further on.
    __device__ Source of_head(unsigned number, unsigned bytes) const {
      Source source = *this;
      source.from += uint64_t(number) * bytes;
      return source;
    }

    // Every thread of the block takes part.
    __device__ void copy(uint32_t to, unsigned thread = threadIdx.x) const {
      if constexpr (IS_REGULAR) {
        const int own_row = thread / CHUNKS;
#pragma unroll
        for (int i = 0; i < ROWS; i += STEP) {
          const bool is_certain = i + STEP <= CERTAIN;
          const int64_t bytes = int64_t(is_certain || !REPEATS ? i : min(i, left)) * row_bytes;
          copy_async_if(i + STEP <= ROWS || own_row < ROWS - i, to + below(own, i), from + bytes,
                        is_certain || REPEATS || i <= left);
        }
      } else {
#pragma unroll
        for (int i = 0; i < ROWS * CHUNKS; i += THREADS) {
          const Place place(i + thread);
          if (i + THREADS > ROWS * CHUNKS && place.row >= ROWS) break;
          copy_async(to + at(place.row, place.chunk),
                     from + int64_t(min(place.row, left)) * row_bytes + 16 * place.chunk, REPEATS || place.row <= left);
        }
      }
    }
  };

  // ROWS rows in memory, as a warp writes them from shared memory.
  template <int ROWS>
  struct Target {
    static constexpr int STEP = 32 / CHUNKS;

    char* to;             // the first row, if it SWIZZLES this thread's own chunk of its own first row
    uint32_t from;        // likewise
    int row_bytes, left;  // bytes from row to row, rows from there to the last one that there is

    // `count`: how many rows there are.
    __device__ Target(char* data, int row_bytes, int count, uint32_t rows, unsigned lane) : row_bytes(row_bytes) {
      const int own_row = SWIZZLES ? lane / CHUNKS : 0, own_chunk = SWIZZLES ? lane % CHUNKS : 0;
      to = data + uint64_t(unsigned(own_row)) * unsigned(row_bytes) + 16 * own_chunk;
      asm("" : "+l"(to));  // As above.
      from = rows + (SWIZZLES ? at(own_row, own_chunk) : 0);
      left = count - 1 - own_row;
    }

    __device__ void write(unsigned lane) const {
      if constexpr (SWIZZLES) {
#pragma unroll
        for (int i = 0; i < ROWS; i += STEP) {
          const uint4 words = load_shared(below(from, i));
          if (i <= left) store_global(to + int64_t(i) * row_bytes, words);
        }
      } else {
#pragma unroll
        for (int i = 0; i < ROWS * CHUNKS; i += 32) {
          const Place place(i + lane);
          const uint4 words = load_shared(from + at(place.row, place.chunk));
          if (place.row <= left) store_global(to + int64_t(place.row) * row_bytes + 16 * place.chunk, words);
        }
      }
    }
  };
};

}  // namespace tlalign::cuda
