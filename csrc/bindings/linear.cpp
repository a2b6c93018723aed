// The op `linear` in the Python module.
#include "seqkernels/linear.h"

#include "bindings/bindings.h"

namespace py = pybind11;

namespace seqkernels {
namespace {

// mean, var, weight, bias; eps, min_var, max_abs. Empty lists: there is no norm.
ChannelNorm norm_of(const char* name, const std::vector<uintptr_t>& p,
                    const std::vector<float>& options) {
  if (p.empty()) return {};
  if (p.size() != 4 || options.size() != 3) {
    throw std::invalid_argument(
        std::string("linear: ") + name + ": expected 4 pointers and 3 options, got " +
        std::to_string(p.size()) + " and " + std::to_string(options.size()));
  }
  return {pointer<float>(p[0]),
          pointer<float>(p[1]),
          pointer<float>(p[2]),
          pointer<float>(p[3]),
          options[0],
          options[1],
          options[2]};
}

// A layer's weights, packed for one instruction set.
class LinearWeights {
 public:
  LinearWeights(std::string isa, int64_t in_features, int64_t out_features, uintptr_t weight,
                uintptr_t bias, const std::vector<uintptr_t>& input_norm,
                const std::vector<float>& input_norm_options,
                const std::vector<uintptr_t>& output_norm,
                const std::vector<float>& output_norm_options, const std::string& activation,
                float negative_slope, bool fp32_operands)
      : isa_(std::move(isa)) {
    LinearParameters p;
    p.in_features = in_features;
    p.out_features = out_features;
    p.weight = pointer<float>(weight);
    p.bias = pointer<float>(bias);
    p.input_norm = norm_of("input_norm", input_norm, input_norm_options);
    p.output_norm = norm_of("output_norm", output_norm, output_norm_options);
    p.activation = activation_of("linear", activation);
    p.negative_slope = negative_slope;
    p.fp32_operands = fp32_operands;
    const py::gil_scoped_release release;
    linear_ = make_linear(isa_, p);
  }

  const std::string& isa() const { return isa_; }
  size_t packed_bytes() const { return linear_->packed_bytes(); }
  size_t workspace_bytes() const { return linear_->workspace_bytes(); }

  void forward(uintptr_t x, bool is_bf16, int64_t rows, int64_t x_stride, uintptr_t out,
               int64_t out_stride, int num_threads) const {
    LinearCall call;
    call.x = pointer<void>(x);
    call.out = reinterpret_cast<void*>(out);
    call.is_bf16 = is_bf16;
    call.rows = rows;
    call.x_stride = x_stride;
    call.out_stride = out_stride;
    call.num_threads = num_threads;
    const py::gil_scoped_release release;
    linear_->forward(call);
  }

 private:
  std::string isa_;
  std::unique_ptr<Linear> linear_;
};

}  // namespace

void bind_linear(py::module_& m) {
  py::class_<LinearWeights>(m, "LinearWeights",
                            "A linear layer and its norms, packed for one instruction set.")
      .def(py::init<std::string, int64_t, int64_t, uintptr_t, uintptr_t,
                    const std::vector<uintptr_t>&, const std::vector<float>&,
                    const std::vector<uintptr_t>&, const std::vector<float>&, const std::string&,
                    float, bool>(),
           py::arg("isa"), py::arg("in_features"), py::arg("out_features"), py::arg("weight"),
           py::arg("bias"), py::arg("input_norm"), py::arg("input_norm_options"),
           py::arg("output_norm"), py::arg("output_norm_options"), py::arg("activation"),
           py::arg("negative_slope"), py::arg("fp32_operands"))
      .def_property_readonly("isa", &LinearWeights::isa)
      .def_property_readonly("nbytes", &LinearWeights::packed_bytes)
      .def("workspace_bytes", &LinearWeights::workspace_bytes)
      .def("forward", &LinearWeights::forward, py::arg("x"), py::arg("is_bf16"), py::arg("rows"),
           py::arg("x_stride"), py::arg("out"), py::arg("out_stride"), py::arg("num_threads"));
}

}  // namespace seqkernels
