// The Python functions of the CPU kernels: what tensors are is told by addresses, sizes and strides in elements.
#include "bindings.h"

#include <pybind11/stl.h>

#include <optional>
#include <string>

#include "arguments.h"
#include "cpu/attention.h"

namespace py = pybind11;

namespace tlalign::cpu {
namespace {

void set_problem(Problem& p, const Sizes& sizes, const std::string& dtype, const RowsTuple& query, const RowsTuple& key,
                 const RowsTuple& value, const std::optional<OffsetsTuple>& bias,
                 const std::optional<OffsetsTuple>& mask, double scale, double dropout_p, uint64_t dropout_seed) {
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
  p.mask = offsets("mask", mask);
}

void attention_forward(const Sizes& sizes, const std::string& dtype, const RowsTuple& query, const RowsTuple& key,
                       const RowsTuple& value, const std::optional<OffsetsTuple>& bias,
                       const std::optional<OffsetsTuple>& mask, double scale, double dropout_p, uint64_t dropout_seed,
                       Address share, Address residual, Address output, Address share_out, Address log_sum_exp,
                       const std::string& isa, int threads) {
  Forward f;
  set_problem(f, sizes, dtype, query, key, value, bias, mask, scale, dropout_p, dropout_seed);
  f.share = pointer<const float>("share", share, f.sources > 0);
  f.residual = pointer<const float>("residual", residual, false);
  f.output = pointer<char>("output", output);
  f.share_out = pointer<float>("share_out", share_out, f.sources > 0);
  f.log_sum_exp = pointer<float>("log_sum_exp", log_sum_exp);
  expect(threads >= 1, "threads: expected at least 1");
  py::gil_scoped_release release;
  forward(f, isa, threads);
}

void attention_backward(const Sizes& sizes, const std::string& dtype, const RowsTuple& grad_output,
                        const RowsTuple& query, const RowsTuple& key, const RowsTuple& value,
                        const std::optional<OffsetsTuple>& bias, const std::optional<OffsetsTuple>& mask, double scale,
                        double dropout_p, uint64_t dropout_seed, Address output, Address log_sum_exp,
                        const RowsTuple& grad_query, const RowsTuple& grad_key, const RowsTuple& grad_value,
                        Address grad_bias, std::pair<int64_t, int64_t> bias_shape, const std::string& isa,
                        int threads) {
  Backward b;
  set_problem(b, sizes, dtype, query, key, value, bias, mask, scale, dropout_p, dropout_seed);
  b.grad_output = rows("grad_output", grad_output);
  b.output = {pointer<char>("output", output), b.queries * b.heads * b.head_dim, b.head_dim, b.heads * b.head_dim};
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
  expect(threads >= 1, "threads: expected at least 1");
  py::gil_scoped_release release;
  backward(b, isa, threads);
}

}  // namespace

void bind(py::module_& module) {
  module.def("cpu_instruction_set", &instruction_set, py::arg("wanted"),
             "Name of the instruction set that the CPU kernels use, the best one or the one that is wanted.");
  module.def("cpu_attention_forward", &attention_forward);
  module.def("cpu_attention_backward", &attention_backward);
}

}  // namespace tlalign::cpu
