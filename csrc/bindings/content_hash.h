#pragma once

#include <pybind11/pybind11.h>

namespace seqkernels {

void bind_content_hash(pybind11::module_& m);

}  // namespace seqkernels
