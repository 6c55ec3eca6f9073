// The Python functions of the CUDA kernels.
#include "bindings.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cmath>
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
  expect(number >= least && number <= std::numeric_limits<int>::max() / 2, name, ": expected at least ", least,
         " and less than 2**30, got ", number);
  return static_cast<int>(number);
}

// With strides in bytes of numbers of 16 bits.
Rows aligned_rows(const char* argument, const RowsTuple& tuple) {
  Rows r = rows(argument, tuple);
  expect(reinterpret_cast<uintptr_t>(r.data) % 16 == 0 && r.image % 8 == 0 && r.head % 8 == 0 && r.row % 8 == 0,
         argument, ": expected rows that begin at multiples of 16 bytes");
  expect(std::max({r.image, r.head, r.row}) < std::numeric_limits<int>::max() / 2, argument,
         ": expected less than 2**30 elements from an image, head or row to the next");
  r.image *= 2, r.head *= 2, r.row *= 2;
  return r;
}

// Whether a score is more than a product of query and key times a positive number.
bool has_offsets(const std::optional<OffsetsTuple>& bias, const std::optional<OffsetsTuple>& mask, double scale) {
  return bias.has_value() || mask.has_value() || !(scale > 0.0);
}

// Of what is read or written 16 bytes at a time.
template <class T>
T* aligned(const char* argument, Address address, bool needed = true) {
  expect(address % 16 == 0, argument, ": expected an address that is a multiple of 16");
  return pointer<T>(argument, address, needed);
}

Starts starts(const char* argument, const Problem& p, const Offsets& offsets, Address address, bool needed) {
  Starts s;
  lay_out(s, offsets, p.batch, p.heads, p.queries, p.keys);
  s.data = aligned<float>(argument, address, needed);
  return s;
}

// Ht, Wt, tokens of a window along each axis, and the shift along each; addresses: pad_qkv, places.
using WindowsTuple = std::tuple<std::array<int64_t, 6>, Address, Address>;

Windows::Axis axis(const std::string& name, int64_t tokens, int64_t window, int64_t shift) {
  Windows::Axis a;
  a.tokens = size(name + " of the map", tokens, 1);
  a.window = size(name + " of a window", window, 1);
  a.windows = (a.tokens - 1) / a.window + 1;
  a.shift = size("shift of " + name, shift, 0);
  expect(a.shift < a.window, "shift of ", name, ": expected less than the window");
  a.rolled = a.shift % a.tokens;
  return a;
}

// Of `p`, whose images are windows.
void read_windows(Problem& p, const WindowsTuple& tuple) {
  const auto& [map, padding, places] = tuple;
  Windows& w = p.windows;
  w.down = axis("rows", map[0], map[2], map[4]);
  w.across = axis("columns", map[1], map[3], map[5]);
  const int64_t height = int64_t(w.down.windows) * w.down.window, width = int64_t(w.across.windows) * w.across.window;
  size("tokens of a padded map", height * width, 1);
  w.padded_width = static_cast<int>(width);
  w.padding_tokens = static_cast<int>(height * width - int64_t(w.down.tokens) * w.across.tokens);
  w.of_row = Divisor(w.across.windows);
  w.of_image = Divisor(w.down.windows * w.across.windows);
  w.width = Divisor(w.across.window);
  expect(p.queries == p.keys && p.keys == int64_t(w.down.window) * w.across.window,
         "Nq, Nk: expected the tokens of a window");
  expect(p.batch % w.of_image.divisor == 0, "B: expected a multiple of the windows of a map");
  w.padding = aligned<const char>("pad_qkv", padding, w.padding_tokens > 0);
  expect(p.head_dim == HEAD_DIM_OF_WINDOWS, "D: expected ", HEAD_DIM_OF_WINDOWS, " in windows, got ", p.head_dim);
  w.places_of_window = laid_out(p.keys);
  size("places of tokens", int64_t(w.of_image.divisor) * w.places_of_window, 1);
  w.places = pointer<int>("places", places);
  expect(p.bias_starts.data != nullptr, "bias_starts: expected what the products of windows begin with");
  expect(p.bias.image == 0, "bias: expected one for all windows");
  expect(p.mask.data == nullptr, "mask: expected none in windows");
  expect(int64_t(p.heads) * padded(p.keys) * padded(p.keys) <= std::numeric_limits<int>::max(),
         "H, N: expected less than 2**31 numbers of a bias");
  w.region_start = REGION_BIAS * LOG2_E / p.unit;
}

void read_problem(Problem& p, const Sizes& sizes, const std::string& dtype, const RowsTuple& query,
                  const RowsTuple& key, const RowsTuple& value, const std::optional<OffsetsTuple>& bias,
                  const std::optional<OffsetsTuple>& mask, double scale, Address bias_starts, Address mask_starts,
                  const std::optional<WindowsTuple>& windows) {
  p.batch = size("B", sizes[0], 1);
  p.heads = size("H", sizes[1], 1);
  p.queries = size("Nq", sizes[2], 1);
  p.keys = size("Nk", sizes[3], 1);
  p.head_dim = size("D", sizes[4], 1);
  p.sources = size("S", sizes[5], 0);
  expect(std::find(std::begin(HEAD_DIMS), std::end(HEAD_DIMS), p.head_dim) != std::end(HEAD_DIMS),
         "D: expected a head dimension that the CUDA kernels have, got ", p.head_dim);
  size("H * D", int64_t(p.heads) * p.head_dim, 1);
  expect(p.sources <= MAX_SOURCES, "S: expected at most ", MAX_SOURCES, " sources");
  size("S * Nq", int64_t(p.sources) * p.queries, 0);
  size("S * Nk", int64_t(p.sources) * p.keys, 0);
  const int64_t most = std::numeric_limits<int>::max();
  expect(padded(std::max(p.queries, p.keys)) / 64 * p.batch * p.heads <= most,
         "B, H, Nq, Nk: expected less than 2**31 blocks of 64 queries or keys");
  expect(p.batch * laid_out(p.keys) <= most, "B, Nk: expected less than 2**31 keys");
  p.dtype = dtype_of("query", dtype, false);
  expect(p.dtype != DType::float32, "query: expected bfloat16 or float16");
  p.scale = static_cast<float>(scale);
  p.query = aligned_rows("query", query);
  p.key = aligned_rows("key", key);
  p.value = aligned_rows("value", value);
  p.bias = offsets("bias", bias);
  p.mask = offsets("mask", mask, true);
  p.bias_starts = starts("bias_starts", p, p.bias, bias_starts, has_offsets(bias, mask, scale));
  p.mask_starts = starts("mask_starts", p, p.mask, mask_starts, mask.has_value());
  // Large enough to divide by.
  p.unit = std::max(std::abs(p.scale), std::ldexp(1.0f, -100)) * LOG2_E;
  p.flipped = p.scale < 0.0f ? 0x80008000u : 0;
  if (windows) read_windows(p, *windows);
}

void attention_forward(const Sizes& sizes, const std::string& dtype, const RowsTuple& query, const RowsTuple& key,
                       const RowsTuple& value, const std::optional<OffsetsTuple>& bias,
                       const std::optional<OffsetsTuple>& mask, double scale, Address bias_starts, Address mask_starts,
                       const std::optional<WindowsTuple>& windows, Address share, Address residual, Address labels,
                       Address head_share, Address output, Address share_out, Address log_sum_exp, Address stream) {
  Forward f;
  read_problem(f, sizes, dtype, query, key, value, bias, mask, scale, bias_starts, mask_starts, windows);
  const bool has_labels = f.sources > 0;
  f.share = pointer<const float>("share", share, has_labels);
  f.residual = pointer<const float>("residual", residual, false);
  f.labels = aligned<void>("labels", labels);
  f.head_share = pointer<float>("head_share", head_share, has_labels);
  f.output = aligned<void>("output", output);
  f.share_out = pointer<float>("share_out", share_out, has_labels);
  f.log_sum_exp = pointer<float>("log_sum_exp", log_sum_exp);
  forward(f, reinterpret_cast<cudaStream_t>(stream));
}

void attention_backward(const Sizes& sizes, const std::string& dtype, const RowsTuple& query, const RowsTuple& key,
                        const RowsTuple& value, const std::optional<OffsetsTuple>& bias,
                        const std::optional<OffsetsTuple>& mask, double scale, Address bias_starts, Address mask_starts,
                        const std::optional<WindowsTuple>& windows, const RowsTuple& grad_output, Address output,
                        Address log_sum_exp, Address row_terms, const RowsTuple& grad_query, const RowsTuple& grad_key,
                        const RowsTuple& grad_value, Address grad_padding, Address bias_sums, int64_t bias_heads,
                        int64_t images_of_sum, Address stream) {
  Backward b;
  read_problem(b, sizes, dtype, query, key, value, bias, mask, scale, bias_starts, mask_starts, windows);
  b.grad_output = aligned_rows("grad_output", grad_output);
  b.output = aligned<const void>("output", output);
  b.log_sum_exp = pointer<const float>("log_sum_exp", log_sum_exp);
  b.row_terms = aligned<void>("row_terms", row_terms);
  b.grad_query = aligned_rows("grad_query", grad_query);
  b.grad_key = aligned_rows("grad_key", grad_key);
  b.grad_value = aligned_rows("grad_value", grad_value);
  b.grad_padding = aligned<char>("grad_padding", grad_padding, b.windows.padding_tokens > 0);
  b.bias_sums = pointer<float>("bias_sums", bias_sums, false);
  b.bias_heads = static_cast<int>(bias_heads);
  b.images_of_sum = size("images_of_sum", images_of_sum, 1);
  if (b.bias_sums != nullptr) {
    expect(b.bias.data != nullptr, "bias_sums: expected none where there is no bias");
    expect(bias_heads == b.heads || (bias_heads == 1 && !windows), "bias_heads: expected ", windows ? "H" : "1 or H",
           ", got ", bias_heads);
    expect(int64_t(b.images_of_sum) * b.heads <= std::numeric_limits<int>::max(),
           "images_of_sum, H: expected less than 2**31 passes");
    const int64_t sums = (b.batch + b.images_of_sum - 1) / b.images_of_sum * bias_heads;
    expect(int64_t(padded(b.queries) / 64) * (padded(b.keys) / 64) <= std::numeric_limits<int>::max() / sums,
           "B, H, Nq, Nk: expected less than 2**31 blocks of 64 x 64 gradients of the bias");
  }
  backward(b, reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace

void bind(py::module_& module) {
  module.attr("CUDA_HEAD_DIMS") = std::vector<int>(std::begin(HEAD_DIMS), std::end(HEAD_DIMS));
  module.attr("CUDA_HEAD_DIM_OF_WINDOWS") = HEAD_DIM_OF_WINDOWS;
  module.attr("CUDA_MAX_SOURCES") = MAX_SOURCES;
  module.def("cuda_launch_error", &launch_error, "Why the current device can't run the kernels, or nothing.");
  module.def(
      "cuda_labels",
      [](int64_t batch, int keys, int sources, bool in_windows) {
        return std::make_pair(sources == 0 ? 1 : batch, labels_of_image(label_groups(sources, in_windows), keys));
      },
      "Images of the scratch `labels`, and numbers of each.");
  module.def(
      "cuda_row_terms",
      [](int queries, const std::string& dtype) {
        return std::make_pair(padded(queries),
                              (dtype == "float16" ? sizeof(NormalisedRowTerm) : sizeof(RowTerm)) / sizeof(float));
      },
      "Rows and columns of the scratch `row_terms` of a head.");
  module.def(
      "cuda_starts",
      [](const Sizes& sizes, const std::optional<OffsetsTuple>& bias, const std::optional<OffsetsTuple>& mask,
         double scale, bool in_windows) {
        const auto numbers = [&](const Offsets& offsets) {
          Starts unused;
          return lay_out(unused, offsets, sizes[0], int(sizes[1]), int(sizes[2]), int(sizes[3]));
        };
        return std::make_pair(in_windows || has_offsets(bias, mask, scale) ? numbers(offsets("bias", bias)) : 0,
                              mask.has_value() ? numbers(offsets("mask", mask, true)) : 0);
      },
      "Numbers of the scratch `bias_starts` and `mask_starts`, 0 where there is none.");
  module.def("cuda_places", &laid_out, "Numbers of the scratch `places` of a window with so many tokens.");
  module.def("cuda_attention_forward", &attention_forward);
  module.def("cuda_attention_backward", &attention_backward);
}

}  // namespace tlalign::cuda
