// Arguments of the Python functions: what tensors are is told by addresses, sizes and strides in elements.
#pragma once

#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>

#include "rows.h"

namespace tlalign {

using Address = uintptr_t;
using RowsTuple = std::tuple<Address, int64_t, int64_t, int64_t>;                           // image, head, row
using OffsetsTuple = std::tuple<Address, std::string, int64_t, int64_t, int64_t, int64_t>;  // image, head, query, key
using Sizes = std::array<int64_t, 6>;                                                       // B, H, Nq, Nk, D, S

// Throws an error unless something holds. Its message is put together only then: some hold of each token of a map.
template <class... Parts>
void expect(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

inline DType dtype_of(const char* argument, const std::string& name, bool boolean) {
  if (name == "float32") return DType::float32;
  if (name == "bfloat16") return DType::bfloat16;
  if (name == "float16") return DType::float16;
  if (name == "bool" && boolean) return DType::boolean;
  throw std::invalid_argument(std::string(argument) + ": dtype " + name + " is not supported");
}

template <class T>
T* pointer(const char* argument, Address address, bool needed = true) {
  expect(address != 0 || !needed, argument, ": expected an address, got 0");
  return reinterpret_cast<T*>(address);
}

inline Rows rows(const char* argument, const RowsTuple& tuple) {
  const auto [address, image, head, row] = tuple;
  expect(image >= 0 && head >= 0 && row >= 0, argument, ": expected strides that are not negative");
  return {pointer<char>(argument, address), image, head, row};
}

inline Offsets offsets(const char* argument, const std::optional<OffsetsTuple>& tuple, bool boolean = false) {
  if (!tuple) return {};
  const auto& [address, dtype, image, head, query, key] = *tuple;
  expect(image >= 0 && head >= 0 && query >= 0 && key >= 0, argument, ": expected strides that are not negative");
  return {pointer<const char>(argument, address), dtype_of(argument, dtype, boolean), image, head, query, key};
}

}  // namespace tlalign
