// The Python functions of the CPU kernels: what tensors are is told by addresses, sizes and strides in elements.
#include "bindings.h"

#include <pybind11/stl.h>

#include <cstdlib>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "cpu/attention.h"

namespace py = pybind11;

namespace tlalign::cpu {
namespace {

// The instruction set that is forced, or "". Python's setting of it is seen here, and can't take place meanwhile.
std::string forced() {
  const char* name = std::getenv("TLALIGN_CPU_ISA");
  return name == nullptr ? "" : name;
}

// W, tokens of the map, and addresses: tokens, regions, padding.
using WindowsTuple = std::tuple<int64_t, int64_t, Address, Address, Address>;

// The table is checked before anything follows it.
Windows windows(const WindowsTuple& tuple, const Sizes& sizes) {
  const auto [count, map_tokens, tokens, regions, padding] = tuple;
  expect(count >= 1 && map_tokens >= 1, "windows: expected at least one window and token");
  expect(sizes[0] % count == 0, "windows: expected B to be a multiple of W");
  expect(sizes[2] == sizes[3], "windows: expected Nq and Nk to be the tokens of a window");
  const Windows w{count, map_tokens, pointer<const int32_t>("tokens", tokens),
                  pointer<const int32_t>("regions", regions, false), pointer<const char>("padding", padding, false)};
  std::vector<bool> found(static_cast<size_t>(map_tokens));
  int64_t missing = map_tokens;
  for (int64_t i = 0; i < count * sizes[2]; ++i) {
    const int64_t token = w.tokens[i];
    expect(token >= -1 && token < map_tokens, "tokens: expected numbers from -1 to Ht * Wt - 1");
    expect(token >= 0 || w.padding != nullptr, "padding: expected an address where windows have padding");
    if (token < 0) continue;
    expect(!found[static_cast<size_t>(token)], "tokens: expected no token of the map twice");
    found[static_cast<size_t>(token)] = true;
    --missing;
  }
  expect(missing == 0, "tokens: expected every token of the map");
  return w;
}

void set_problem(Problem& p, const Sizes& sizes, const std::string& dtype, const RowsTuple& query, const RowsTuple& key,
                 const RowsTuple& value, const std::optional<OffsetsTuple>& bias,
                 const std::optional<OffsetsTuple>& mask, double scale, double dropout_p, uint64_t dropout_seed,
                 const std::optional<WindowsTuple>& windows_tuple) {
  for (int i = 0; i < 5; ++i) expect(sizes[i] >= 1, "sizes: expected B, H, Nq, Nk and D of at least 1");
  expect(sizes[4] <= 256, "sizes: expected D of at most 256");
  expect(sizes[5] >= 0, "sizes: expected S of at least 0");
  expect(dropout_p >= 0 && dropout_p < 1, "dropout_p: expected a value in [0, 1)");
  p.batch = sizes[0];
  p.heads = sizes[1];
  p.queries = sizes[2];
  p.keys = sizes[3];
  p.head_dim = sizes[4];
  p.sources = sizes[5];
  p.dtype = dtype_of("query", dtype, false);
  p.scale = static_cast<float>(scale);
  p.dropout_p = dropout_p;
  p.dropout_seed = dropout_seed;
  p.query = rows("query", query);
  p.key = rows("key", key);
  p.value = rows("value", value);
  p.bias = offsets("bias", bias);
  p.mask = offsets("mask", mask, true);
  if (windows_tuple) p.windows = windows(*windows_tuple, sizes);
}

// Rows of a tensor (B, Nq, H, D).
Rows output_rows(const Problem& p, Address output) {
  const int64_t row = p.heads * p.head_dim, tokens = p.windows.count > 0 ? p.windows.map_tokens : p.queries;
  return {pointer<char>("output", output), tokens * row, p.head_dim, row};
}

void attention_forward(const Sizes& sizes, const std::string& dtype, const RowsTuple& query, const RowsTuple& key,
                       const RowsTuple& value, const std::optional<OffsetsTuple>& bias,
                       const std::optional<OffsetsTuple>& mask, double scale, double dropout_p, uint64_t dropout_seed,
                       const std::optional<WindowsTuple>& windows, Address share, Address residual, Address output,
                       Address share_out, Address log_sum_exp, int threads) {
  Forward f;
  set_problem(f, sizes, dtype, query, key, value, bias, mask, scale, dropout_p, dropout_seed, windows);
  f.share = pointer<const float>("share", share, f.sources > 0);
  f.residual = pointer<const float>("residual", residual, false);
  f.output = output_rows(f, output);
  f.share_out = pointer<float>("share_out", share_out, f.sources > 0);
  f.log_sum_exp = pointer<float>("log_sum_exp", log_sum_exp);
  expect(threads >= 1, "threads: expected at least 1");
  const std::string isa = forced();
  py::gil_scoped_release release;
  forward(f, isa, threads);
}

void attention_backward(const Sizes& sizes, const std::string& dtype, const RowsTuple& grad_output,
                        const RowsTuple& query, const RowsTuple& key, const RowsTuple& value,
                        const std::optional<OffsetsTuple>& bias, const std::optional<OffsetsTuple>& mask, double scale,
                        double dropout_p, uint64_t dropout_seed, const std::optional<WindowsTuple>& windows,
                        Address output, Address log_sum_exp, const RowsTuple& grad_query, const RowsTuple& grad_key,
                        const RowsTuple& grad_value, Address grad_bias, std::pair<int64_t, int64_t> bias_shape,
                        Address grad_padding, int threads) {
  Backward b;
  set_problem(b, sizes, dtype, query, key, value, bias, mask, scale, dropout_p, dropout_seed, windows);
  b.grad_output = rows("grad_output", grad_output);
  b.output = output_rows(b, output);
  b.log_sum_exp = pointer<const float>("log_sum_exp", log_sum_exp);
  b.grad_query = rows("grad_query", grad_query);
  b.grad_key = rows("grad_key", grad_key);
  b.grad_value = rows("grad_value", grad_value);
  b.grad_bias = pointer<char>("grad_bias", grad_bias, false);
  b.bias_images = bias_shape.first;
  b.bias_heads = bias_shape.second;
  if (b.grad_bias != nullptr) {
    expect(b.bias.data != nullptr, "grad_bias: expected none without a bias");
    expect((b.bias_images == 1 && b.bias.image == 0) || b.bias_images == b.batch, "bias: expected 1 or B images");
    expect((b.bias_heads == 1 && b.bias.head == 0) || b.bias_heads == b.heads, "bias: expected 1 or H heads");
  }
  b.grad_padding = pointer<char>("grad_padding", grad_padding, b.windows.padding != nullptr);
  expect(b.grad_padding == nullptr || b.windows.padding != nullptr, "grad_padding: expected none without padding");
  expect(threads >= 1, "threads: expected at least 1");
  const std::string isa = forced();
  py::gil_scoped_release release;
  backward(b, isa, threads);
}

}  // namespace

void bind(py::module_& module) {
  module.def(
      "cpu_instruction_set", [] { return instruction_set(forced()); },
      "Name of the instruction set that the CPU kernels use, the best one or the one that TLALIGN_CPU_ISA forces.");
  module.def("cpu_attention_forward", &attention_forward);
  module.def("cpu_attention_backward", &attention_backward);
}

}  // namespace tlalign::cpu
