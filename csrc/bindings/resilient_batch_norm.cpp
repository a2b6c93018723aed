// The op `resilient_batch_norm` in the Python module.
#include "seqkernels/resilient_batch_norm.h"

#include <cmath>

#include "bindings/bindings.h"

namespace py = pybind11;

namespace seqkernels {
namespace {

// A bound must not grow, nor vanish, when it becomes fp32.
float bound_of(double value) {
  const float nearest = static_cast<float>(value);
  return nearest > value ? std::nextafter(nearest, 0.0f) : nearest;
}
float floor_of(double value) {
  const float nearest = static_cast<float>(value);
  return value > 0 && nearest == 0 ? std::numeric_limits<float>::denorm_min() : nearest;
}

void forward(const ResilientBatchNorm& kernel, uintptr_t x, bool is_bf16, bool channels_last,
             int64_t outer, int64_t inner, int64_t channels, int64_t x_stride_outer,
             int64_t x_stride_row, uintptr_t mean, uintptr_t var, uintptr_t weight, uintptr_t bias,
             double eps, double min_var, double max_abs, const std::string& activation,
             float negative_slope, uintptr_t out, int64_t out_stride_outer, int64_t out_stride_row,
             int num_threads) {
  ResilientBatchNormCall call;
  call.x = pointer<void>(x);
  call.is_bf16 = is_bf16;
  call.channels_last = channels_last;
  call.outer = outer;
  call.inner = inner;
  call.channels = channels;
  call.x_stride_outer = x_stride_outer;
  call.x_stride_row = x_stride_row;
  call.norm = {pointer<float>(mean), pointer<float>(var),     pointer<float>(weight),
               pointer<float>(bias), static_cast<float>(eps), floor_of(min_var),
               bound_of(max_abs)};
  call.activation = activation_of("resilient_batch_norm", activation);
  call.negative_slope = negative_slope;
  call.out = reinterpret_cast<void*>(out);
  call.out_stride_outer = out_stride_outer;
  call.out_stride_row = out_stride_row;
  call.num_threads = num_threads;
  const py::gil_scoped_release release;
  kernel.forward(call);
}

}  // namespace

void bind_resilient_batch_norm(py::module_& m) {
  py::class_<ResilientBatchNorm>(m, "ResilientBatchNorm",
                                 "The batch norm kernel of one instruction set.")
      .def(py::init<const std::string&>(), py::arg("isa"))
      .def("forward", &forward, py::arg("x"), py::arg("is_bf16"), py::arg("channels_last"),
           py::arg("outer"), py::arg("inner"), py::arg("channels"), py::arg("x_stride_outer"),
           py::arg("x_stride_row"), py::arg("mean"), py::arg("var"), py::arg("weight"),
           py::arg("bias"), py::arg("eps"), py::arg("min_var"), py::arg("max_abs"),
           py::arg("activation"), py::arg("negative_slope"), py::arg("out"),
           py::arg("out_stride_outer"), py::arg("out_stride_row"), py::arg("num_threads"));
}

}  // namespace seqkernels
