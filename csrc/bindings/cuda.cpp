// The parts of the CUDA kernels that are not ops.
#include "bindings/cuda.h"

#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "seqkernels/cuda_encoder.h"

namespace py = pybind11;

namespace seqkernels {
namespace {

std::vector<std::string> unsupported_reasons(int d_model, int nhead, int dim_feedforward,
                                             int num_layers) {
  EncoderShape shape;
  shape.d_model = d_model;
  shape.nhead = nhead;
  shape.dim_feedforward = dim_feedforward;
  shape.num_layers = num_layers;
  return cuda::encoder_unsupported_reasons(shape);
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.def("encoder_unsupported_reasons", &unsupported_reasons, py::arg("d_model"), py::arg("nhead"),
        py::arg("dim_feedforward"), py::arg("num_layers"),
        "Why no kernel takes an encoder of these sizes; empty when one does.");
}

}  // namespace seqkernels
