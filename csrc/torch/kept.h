// What the ops on weights as they are need besides: packed weights, kept between calls, and the
// choice that Python makes elsewhere.
#pragma once

#include <cstdlib>
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cpu/content_hash.h"
#include "seqkernels/processor.h"
#include "torch/checks.h"

namespace seqkernels::torch_abi {

// Throws unless the CPU's kernels are meant.
inline void check_backend(const std::string& op, const std::string& backend) {
  if (backend != "auto" && backend != "cpu")
    refuse(op, "backend: expected auto or cpu without Python, got '" + backend + "'");
}

// The best instruction set that runs here, no better than SEQKERNELS_ISA.
inline int default_isa() {
  static const int found = [] {
    const char* const cap = std::getenv("SEQKERNELS_ISA");
    if (cap && *cap) isa_unsupported_reasons(cap);  // throws for an unknown name
    bool allowed = !cap || !*cap;
    for (const std::string& name : isa_names()) {
      allowed = allowed || name == cap;
      const bool emulated = name.find("_emulated") != name.npos && (!cap || name != cap);
      if (allowed && !emulated && isa_unsupported_reasons(name).empty()) return runnable_isa(name);
    }
    throw std::invalid_argument("isa: expected one that can run here");
  }();
  return found;
}

// Packed weights by what they were made of. Whether weights are the same is a matter of their
// contents, which are hashed on each call: nothing else that a library could look at follows every
// edit. The oldest go first.
template <class Model>
class KeptWeights {
 public:
  struct Entry {
    uint64_t hash;
    Model wanted, model;
    Tensor packed;
  };

  // `model` but for packed_bytes decides with the contents; make(model) packs.
  template <class Make>
  std::shared_ptr<const Entry> find(const HostWeights& weights, const Model& model, Make make) {
    std::vector<cpu::MemoryBlock> blocks;
    for (size_t i = 0; i < weights.count(); ++i) {
      const size_t bytes =
          weights[i] ? static_cast<size_t>(weights[i]->numel()) * sizeof(float) : 0;
      blocks.push_back({weights.data(i), bytes});
    }
    const uint64_t hash = cpu::content_hash(blocks);
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto at = entries_.begin(); at != entries_.end(); ++at) {
      const Entry& e = **at;
      if (e.hash == hash && e.wanted == model) {
        entries_.splice(entries_.begin(), entries_, at);
        return entries_.front();
      }
    }
    Model made = model;
    Tensor packed = make(made);
    entries_.push_front(std::make_shared<const Entry>(Entry{hash, model, made, std::move(packed)}));
    if (entries_.size() > kMost) entries_.pop_back();
    return entries_.front();
  }

 private:
  static constexpr size_t kMost = 256;
  std::mutex mutex_;
  std::list<std::shared_ptr<const Entry>> entries_;
};

}  // namespace seqkernels::torch_abi
