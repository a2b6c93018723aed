// Hashing of memory in the Python module.
#include "cpu/content_hash.h"

#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "bindings/content_hash.h"

namespace py = pybind11;

namespace seqkernels {
namespace {

uint64_t hash_of(const std::vector<uintptr_t>& pointers, const std::vector<size_t>& sizes) {
  if (pointers.size() != sizes.size()) {
    throw std::invalid_argument("content_hash: sizes_in_bytes: expected one for each of " +
                                std::to_string(pointers.size()) + " pointers, got " +
                                std::to_string(sizes.size()));
  }
  std::vector<cpu::MemoryBlock> blocks;
  blocks.reserve(pointers.size());
  for (size_t i = 0; i < pointers.size(); ++i) {
    if (pointers[i] == 0 && sizes[i] > 0) {
      throw std::invalid_argument("content_hash: pointers: expected an address of " +
                                  std::to_string(sizes[i]) + " bytes, got 0");
    }
    blocks.push_back({reinterpret_cast<const void*>(pointers[i]), sizes[i]});
  }
  const py::gil_scoped_release release;
  return cpu::content_hash(blocks);
}

}  // namespace

void bind_content_hash(py::module_& m) {
  m.def("content_hash", &hash_of, py::arg("pointers"), py::arg("sizes_in_bytes"),
        "A 64-bit hash of the contents, sizes and order of blocks of host memory.");
}

}  // namespace seqkernels
