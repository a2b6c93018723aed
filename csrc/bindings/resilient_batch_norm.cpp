// The op `resilient_batch_norm` in the Python module.
#include "seqkernels/resilient_batch_norm.h"

#include "bindings/bindings.h"

namespace py = pybind11;

namespace seqkernels {
namespace {

template <class... Args>
auto forward_of(ResilientBatchNormCall (*call_of)(Args...)) {
  return [call_of](const ResilientBatchNorm& kernel, Args... args, int num_threads) {
    ResilientBatchNormCall call = call_of(args...);
    call.num_threads = num_threads;
    const py::gil_scoped_release release;
    kernel.forward(call);
  };
}

}  // namespace

void bind_resilient_batch_norm(py::module_& m) {
  py::class_<ResilientBatchNorm>(m, "ResilientBatchNorm",
                                 "The batch norm kernel of one instruction set.")
      .def(py::init<const std::string&>(), py::arg("isa"))
      .def("forward", forward_of(&batch_norm_call),
           "The arguments of batch_norm_call, then num_threads.");
}

}  // namespace seqkernels
