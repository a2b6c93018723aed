// Which bytes of global memory a launch has loaded and stored. Their bounds are left to
// AddressSanitizer.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>

#include "host_emulation/fault.h"

namespace seqkernels::host_emulation {

class GlobalMemory {
 public:
  // `coherent` loads may follow the kernel's own stores.
  void load(const char* operation, const void* p, int size, bool coherent, const Site& site) {
    Page& page = page_of(operation, p, size, site);
    const uint64_t mask = mask_of(p, size);
    const size_t word = word_of(p);
    if (!coherent && (page.stored[word] & mask)) {
      throw EmulationError(
          Fault::kStale,
          std::string(operation) + " of data that the kernel has written at " + text(site));
    }
    page.loaded[word] |= mask;
  }

  // The number of these bytes stored before.
  int store(const char* operation, const void* p, int size, const Site& site) {
    Page& page = page_of(operation, p, size, site);
    const uint64_t mask = mask_of(p, size);
    uint64_t& stored = page.stored[word_of(p)];
    const int again = __builtin_popcountll(stored & mask);
    stored |= mask;
    return again;
  }

  int64_t loaded_sectors() const { return sectors(&Page::loaded); }
  int64_t stored_sectors() const { return sectors(&Page::stored); }

 private:
  static constexpr uintptr_t kPageBytes = 4096;
  struct Page {
    uint64_t loaded[kPageBytes / 64] = {}, stored[kPageBytes / 64] = {};  // a bit a byte
  };

  static size_t word_of(const void* p) { return reinterpret_cast<uintptr_t>(p) % kPageBytes / 64; }
  static uint64_t mask_of(const void* p, int size) {
    return ((uint64_t{1} << size) - 1) << reinterpret_cast<uintptr_t>(p) % 64;
  }

  Page& page_of(const char* operation, const void* p, int size, const Site& site) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(p);
    if (at % static_cast<uintptr_t>(size) != 0) {
      throw EmulationError(Fault::kMisaligned, std::string("misaligned: ") + operation + " of " +
                                                   std::to_string(size) + " bytes at " +
                                                   text(site));
    }
    const uintptr_t number = at / kPageBytes;
    Recent& recent = recent_[number % kRecent];
    if (recent.number != number || !recent.page) {
      std::unique_ptr<Page>& page = pages_[number];
      if (!page) page = std::make_unique<Page>();
      recent = {number, page.get()};
    }
    return *recent.page;
  }

  int64_t sectors(uint64_t (Page::*bits)[kPageBytes / 64]) const {
    int64_t count = 0;
    for (const auto& [number, page] : pages_) {
      for (const uint64_t word : (*page).*bits) {
        count += ((word & 0xffffffffu) != 0) + (word >> 32 != 0);
      }
    }
    return count;
  }

  static constexpr size_t kRecent = 256;
  struct Recent {
    uintptr_t number = 0;
    Page* page = nullptr;
  };
  Recent recent_[kRecent];
  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages_;
};

}  // namespace seqkernels::host_emulation
