#pragma once

#include <pybind11/pybind11.h>

namespace seqkernels {

void bind_snapshot(pybind11::module_& m);

}  // namespace seqkernels
