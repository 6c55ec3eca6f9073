// The Python functions of the CUDA kernels.
#include "bindings.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <iterator>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "arguments.h"
#include "cuda/attention.h"

namespace py = pybind11;

namespace tlalign::cuda {
namespace {

int size(const std::string& name, int64_t number, int64_t least) {
  expect(number >= least && number <= std::numeric_limits<int>::max() / 2,
         name + ": expected at least " + std::to_string(least) + " and less than 2**30, got " + std::to_string(number));
  return static_cast<int>(number);
}

Rows aligned_rows(const std::string& argument, const RowsTuple& tuple) {
  const Rows r = rows(argument, tuple);
  expect(reinterpret_cast<uintptr_t>(r.data) % 16 == 0 && r.image % 8 == 0 && r.head % 8 == 0 && r.row % 8 == 0,
         argument + ": expected rows that begin at multiples of 16 bytes");
  expect(r.row < std::numeric_limits<int>::max() / 2, argument + ": expected less than 2**30 elements from row to row");
  return r;
}

void attention_forward(const Sizes& sizes, const std::string& dtype, const RowsTuple& query, const RowsTuple& key,
                       const RowsTuple& value, const std::optional<OffsetsTuple>& bias,
                       const std::optional<OffsetsTuple>& mask, double scale, Address share, Address residual,
                       Address parts, Address head_share, Address output, Address share_out, Address log_sum_exp,
                       Address stream) {
  Forward f;
  f.batch = size("B", sizes[0], 1);
  f.heads = size("H", sizes[1], 1);
  f.queries = size("Nq", sizes[2], 1);
  f.keys = size("Nk", sizes[3], 1);
  f.head_dim = size("D", sizes[4], 1);
  f.sources = size("S", sizes[5], 0);
  expect(std::find(std::begin(HEAD_DIMS), std::end(HEAD_DIMS), f.head_dim) != std::end(HEAD_DIMS),
         "D: expected a head dimension that the CUDA kernels have, got " + std::to_string(f.head_dim));
  size("H * D", int64_t(f.heads) * f.head_dim, 1);
  expect(f.sources <= MAX_SOURCES, "S: expected at most " + std::to_string(MAX_SOURCES) + " sources");
  expect((f.queries + 63) / 64 * f.batch * f.heads <= std::numeric_limits<int>::max(),
         "B, H, Nq: expected less than 2**31 blocks of 64 queries");
  expect(f.batch * padded_keys(f.keys) <= std::numeric_limits<int>::max(), "B, Nk: expected less than 2**31 keys");
  f.dtype = dtype_of("query", dtype, false);
  expect(f.dtype != DType::float32, "query: expected bfloat16 or float16");
  f.scale = static_cast<float>(scale);
  f.query = aligned_rows("query", query);
  f.key = aligned_rows("key", key);
  f.value = aligned_rows("value", value);
  f.bias = offsets("bias", bias);
  f.mask = offsets("mask", mask);
  const bool has_labels = f.sources > 0;
  f.share = pointer<const float>("share", share, has_labels);
  f.residual = pointer<const float>("residual", residual, false);
  f.parts = pointer<void>("parts", parts, has_labels);
  f.head_share = pointer<float>("head_share", head_share, has_labels);
  f.output = pointer<void>("output", output);
  f.share_out = pointer<float>("share_out", share_out, has_labels);
  f.log_sum_exp = pointer<float>("log_sum_exp", log_sum_exp);
  forward(f, reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace

void bind(py::module_& module) {
  module.attr("CUDA_HEAD_DIMS") = std::vector<int>(std::begin(HEAD_DIMS), std::end(HEAD_DIMS));
  module.attr("CUDA_MAX_SOURCES") = MAX_SOURCES;
  module.def(
      "cuda_parts", [](int keys, int sources) { return std::make_pair(sources * PARTS, padded_keys(keys)); },
      "Rows and columns of the scratch `parts` of an image.");
  module.def("cuda_attention_forward", &attention_forward);
}

}  // namespace tlalign::cuda
