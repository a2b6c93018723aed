// The pybind11 module `seqkernels._native`: the parts of the library that are not ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "bindings/content_hash.h"
#include "bindings/cuda.h"
#include "bindings/snapshot.h"
#include "seqkernels/library.h"
#include "seqkernels/options.h"
#include "seqkernels/processor.h"

namespace py = pybind11;

namespace seqkernels {
namespace {

std::map<std::string, std::string> build_info() {
  return {{"compiler", SEQKERNELS_COMPILER},
          {"flags", SEQKERNELS_FLAGS},
          {"build_type", SEQKERNELS_BUILD_TYPE},
          {"version", SEQKERNELS_VERSION}};
}

// Names of an options record's fields, each with the names of its values where it has some.
template <class Options>
py::list fields_of() {
  py::list made;
  Options options;
  Options::each(options, [&](const char* name, auto& value) {
    py::list known;
    if constexpr (std::is_enum_v<std::remove_reference_t<decltype(value)>>) {
      for (const char* text : names_of<std::remove_reference_t<decltype(value)>>())
        known.append(text);
    }
    made.append(py::make_tuple(name, known));
  });
  return made;
}

py::list option_fields(const std::string& op) {
  if (op == "encoder") return fields_of<EncoderOptions>();
  if (op == "linear") return fields_of<LinearOptions>();
  return fields_of<ResilientBatchNormOptions>();
}

}  // namespace
}  // namespace seqkernels

PYBIND11_MODULE(_native, m) {
  using namespace seqkernels;
  m.doc() = "Native kernels of seqkernels.";
  m.def("isa_names", &isa_names,
        "Names of the instruction sets compiled in, best first; the emulated one comes last.");
  m.def("isa_unsupported_reasons", &isa_unsupported_reasons, py::arg("name"),
        "Why the named instruction set cannot run here; empty when it can.");
  m.def("processor", &processor_name, "The processor's name.");
  m.def("build_info", &build_info, "Compiler, flags, build type and version of this module.");
  m.def("option_fields", &option_fields, py::arg("op"),
        "Names of an op's options in their order, and of the values of those that are words.");
  m.def("ops_error", &ops_error,
        "Why the ops are not registered with torch, empty where they are.");
  m.def("withdraw_ops_on_weights", &withdraw_ops_on_weights,
        "Let Python register the ops on weights as they are.");
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
