// What the emulator finds wrong with a kernel.
#pragma once

#include <cstdint>
#include <cstring>
#include <source_location>
#include <stdexcept>
#include <string>

namespace seqkernels::host_emulation {

enum class Fault {
  kLaunch,      // a launch no device would accept
  kRace,        // two threads reach the same shared bytes, one writing, no barrier between
  kDivergence,  // threads at different barriers or warp operations
  kMisaligned,
  kOutOfRange,  // outside of shared memory
  kUnwritten,   // a read of shared memory that the block never wrote
  kInFlight,    // an access of the destination of a copy nobody waited for
  kUnwaited,    // a thread leaves copies behind
  kStale,       // a read-only load of data that the kernel itself wrote
};

class EmulationError : public std::runtime_error {
 public:
  EmulationError(Fault fault, const std::string& what) : std::runtime_error(what), fault_(fault) {}
  Fault fault() const { return fault_; }

 private:
  Fault fault_;
};

// The place in a kernel that an operation was called from.
using Site = std::source_location;

inline bool same_site(const Site& a, const Site& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         (a.file_name() == b.file_name() || std::strcmp(a.file_name(), b.file_name()) == 0);
}

inline std::string text(const Site& site) {
  const char* slash = std::strrchr(site.file_name(), '/');
  return std::string(slash ? slash + 1 : site.file_name()) + ":" + std::to_string(site.line());
}

}  // namespace seqkernels::host_emulation
