// The pybind11 module `seqkernels._native`: what of the library is no op.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "bindings/content_hash.h"
#include "bindings/cuda.h"
#include "bindings/snapshot.h"
#include "seqkernels/library.h"
#include "seqkernels/processor.h"

namespace seqkernels {
namespace {

std::map<std::string, std::string> build_info() {
  return {{"compiler", SEQKERNELS_COMPILER},
          {"flags", SEQKERNELS_FLAGS},
          {"build_type", SEQKERNELS_BUILD_TYPE},
          {"version", SEQKERNELS_VERSION}};
}

}  // namespace
}  // namespace seqkernels

PYBIND11_MODULE(_native, m) {
  using namespace seqkernels;
  namespace py = pybind11;
  m.doc() = "Native kernels of seqkernels.";
  m.def("isa_names", &isa_names,
        "Names of the instruction sets compiled in, best first; the emulated one comes last.");
  m.def("isa_unsupported_reasons", &isa_unsupported_reasons, py::arg("name"),
        "Why the named instruction set cannot run here; empty when it can.");
  m.def("processor", &processor_name, "The processor's name.");
  m.def("build_info", &build_info, "Compiler, flags, build type and version of this module.");
  m.def("ops_error", &ops_error,
        "Why the ops are not registered with torch, empty where they are.");
  bind_content_hash(m);
  bind_snapshot(m);
#if defined(SEQKERNELS_CUDA)
  m.attr("cuda_build") = SEQKERNELS_CUDA;
  py::module_ cuda = m.def_submodule("cuda", "CUDA kernels.");
  bind_cuda(cuda);
#else
  m.attr("cuda_missing") = SEQKERNELS_CUDA_MISSING;
#endif
}
