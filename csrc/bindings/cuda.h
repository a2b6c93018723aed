#pragma once

#include <pybind11/pybind11.h>

namespace seqkernels {

void bind_cuda(pybind11::module_& m);

}  // namespace seqkernels
