#include "cpu/content_hash.h"

#include <cstring>

namespace seqkernels::cpu {
namespace {

// Four chains of multiplications run side by side, so that the latency of one hides behind the
// others. A chain takes 16 bytes a step, and each step depends on all that came before it in the
// chain: exchanging or repeating bytes changes the result as much as other bytes do.
constexpr int kChains = 4;
constexpr size_t kStripe = kChains * 16;  // bytes

// Odd, with about half of the bits set: the fractional parts of the square roots of 2, 3, 5, 7, 11.
constexpr uint64_t kKey[kChains + 1] = {0x6a09e667f3bcc909, 0xbb67ae8584caa73b, 0x3c6ef372fe94f82b,
                                        0xa54ff53a5f1d36f1, 0x510e527fade682d1};

// Both halves of the 128-bit product, folded: every bit of a and b reaches every bit of the result.
inline uint64_t fold_product(uint64_t a, uint64_t b) {
  using Wide = unsigned __int128;
  const Wide product = static_cast<Wide>(a) * b;
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

inline uint64_t load_word(const unsigned char* at) {
  uint64_t word;
  std::memcpy(&word, at, sizeof word);
  return word;
}

struct Chains {
  uint64_t state[kChains];

  explicit Chains(uint64_t seed) {
    for (int i = 0; i < kChains; ++i) state[i] = seed ^ kKey[i];
  }
  void take(const unsigned char* stripe) {
    for (int i = 0; i < kChains; ++i) {
      state[i] = fold_product(state[i] ^ load_word(stripe + 16 * i),
                              kKey[i + 1] ^ load_word(stripe + 16 * i + 8));
    }
  }
  uint64_t folded() const {
    uint64_t hash = kKey[0];
    for (const uint64_t s : state) hash = fold_product(hash ^ s, kKey[kChains]);
    return hash;
  }
};

uint64_t block_hash(uint64_t seed, const MemoryBlock& block) {
  const unsigned char* at = static_cast<const unsigned char*>(block.data);
  Chains chains(fold_product(seed ^ block.bytes, kKey[kChains]));
  size_t left = block.bytes;
  for (; left >= kStripe; left -= kStripe, at += kStripe) chains.take(at);
  if (left > 0) {  // the zeros behind the end are told from the block's own by its size
    unsigned char stripe[kStripe] = {};
    std::memcpy(stripe, at, left);
    chains.take(stripe);
  }
  return chains.folded();
}

}  // namespace

uint64_t content_hash(const std::vector<MemoryBlock>& blocks) {
  uint64_t hash = kKey[0] ^ blocks.size();
  for (const MemoryBlock& block : blocks) hash = block_hash(hash, block);
  return hash;
}

}  // namespace seqkernels::cpu
