// Tensors as native code sees them: an address, what lies there, and strides.
#pragma once

#include <cstdint>

namespace tlalign {

enum class DType { float32, bfloat16, float16, boolean };

// Rows of D in memory; strides in elements, that of D is one.
struct Rows {
  char* data = nullptr;
  int64_t image = 0, head = 0, row = 0;
};

// What is added to the scores, or (boolean) says which keys are seen. A stride is 0 where it is broadcast.
struct Offsets {
  const char* data = nullptr;  // null: there is none
  DType dtype = DType::float32;
  int64_t image = 0, head = 0, query = 0, key = 0;
};

}  // namespace tlalign
