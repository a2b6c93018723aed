// The pybind11 module `seqkernels._native`: raw pointers in, no torch.
#include "bindings/bindings.h"
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
  bind_content_hash(m);
  bind_encoder(m);
  bind_linear(m);
  bind_resilient_batch_norm(m);
#if defined(SEQKERNELS_CUDA)
  m.attr("cuda_build") = SEQKERNELS_CUDA;
  py::module_ cuda = m.def_submodule("cuda", "CUDA kernels.");
  bind_cuda(cuda);
#else
  m.attr("cuda_missing") = SEQKERNELS_CUDA_MISSING;
#endif
}
