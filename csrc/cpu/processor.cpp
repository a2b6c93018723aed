#include "seqkernels/processor.h"

#include <cstring>
#include <fstream>
#include <iterator>
#include <stdexcept>

#include "cpu/isa_table.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace seqkernels {
namespace {

using Reasons = std::vector<std::string>;

#if defined(__x86_64__)

struct Registers {
  unsigned a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(unsigned leaf, unsigned subleaf) {
  Registers r;
  if (!__get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d)) return {};
  return r;
}

bool bit(unsigned value, int index) {
  return (value >> index) & 1;
}

uint64_t enabled_state() {
  if (!bit(cpuid(1, 0).c, 27)) return 0;
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
}

constexpr uint64_t kStateAvx = 0x6;        // XMM, YMM
constexpr uint64_t kStateAvx512 = 0xe6;    // and opmask, upper ZMM
constexpr uint64_t kStateTiles = 0x60000;  // tile configuration and data

void need(Reasons& reasons, bool met, const char* what) {
  if (!met) reasons.emplace_back(what);
}

[[maybe_unused]] void need_avx2(Reasons& r) {
  need(r, bit(cpuid(7, 0).b, 5), "the processor has no AVX2");
  need(r, bit(cpuid(1, 0).c, 12), "the processor has no FMA");
  need(r, (enabled_state() & kStateAvx) == kStateAvx,
       "the operating system does not save the AVX registers");
}

void need_avx512(Reasons& r) {
  const unsigned b = cpuid(7, 0).b;
  need(r, bit(b, 16), "the processor has no AVX512F");
  need(r, bit(b, 17), "the processor has no AVX512DQ");
  need(r, bit(b, 30), "the processor has no AVX512BW");
  need(r, bit(b, 31), "the processor has no AVX512VL");
  need(r, bit(cpuid(1, 0).c, 12), "the processor has no FMA");
  need(r, (enabled_state() & kStateAvx512) == kStateAvx512,
       "the operating system does not save the AVX-512 registers");
}

void need_avx512_bf16(Reasons& r) {
  need_avx512(r);
  need(r, bit(cpuid(7, 1).a, 5), "the processor has no AVX512_BF16");
}

// Tile registers: the processor must have them with a usable palette, the operating system must
// save them, and it must allow this process to use them. The permission is asked for and then read
// back.
bool tiles_permitted() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr int kGetPermission = 0x1022, kRequestPermission = 0x1023, kTileData = 18;
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) return false;
  uint64_t granted = 0;
  return syscall(SYS_arch_prctl, kGetPermission, &granted) == 0 && (granted >> kTileData & 1);
#else
  return false;
#endif
}

[[maybe_unused]] void need_amx_bf16(Reasons& r) {
  need_avx512_bf16(r);
  const unsigned d = cpuid(7, 0).d;
  const bool has_tiles = bit(d, 24);
  need(r, has_tiles, "the processor has no AMX-TILE");
  need(r, bit(d, 22), "the processor has no AMX-BF16");
  if (!has_tiles) return;
  const Registers palette = cpuid(0x1d, 1);
  need(r, cpuid(0x1d, 0).a >= 1 && (palette.b >> 16) >= 8 && (palette.c & 0xffff) >= 16,
       "the processor reports no palette of eight 16-row tiles");
  const bool saved = (enabled_state() & kStateTiles) == kStateTiles;
  need(r, saved, "the operating system does not save the tile registers");
  if (saved)
    need(r, tiles_permitted(), "the operating system refuses this process the tile registers");
}

#endif  // __x86_64__

void need_nothing(Reasons&) {}

struct Isa {
  const char* name;
  void (*check)(Reasons&);
  const cpu::EncoderKernelEntry& (*encoder)();
  const cpu::LinearKernelEntry& (*linear)();
  const cpu::ResilientBatchNormKernelEntry& (*resilient_batch_norm)();
};

constexpr Isa kIsas[] = {
#if defined(SEQKERNELS_ISA_AMX_BF16)
    {"amx_bf16", need_amx_bf16, cpu::encoder_amx_bf16, cpu::linear_amx_bf16,
     cpu::resilient_batch_norm_avx512_bf16},
#endif
#if defined(SEQKERNELS_ISA_AVX512_BF16)
    {"avx512_bf16", need_avx512_bf16, cpu::encoder_avx512_bf16, cpu::linear_avx512_bf16,
     cpu::resilient_batch_norm_avx512_bf16},
#endif
#if defined(SEQKERNELS_ISA_AVX512)
    {"avx512", need_avx512, cpu::encoder_avx512, cpu::linear_avx512,
     cpu::resilient_batch_norm_avx512},
#endif
#if defined(SEQKERNELS_ISA_AVX2)
    {"avx2", need_avx2, cpu::encoder_avx2, cpu::linear_avx2, cpu::resilient_batch_norm_avx2},
#endif
    {"portable", need_nothing, cpu::encoder_portable, cpu::linear_portable,
     cpu::resilient_batch_norm_portable},
#if defined(SEQKERNELS_ISA_AMX_EMULATED)
    {"amx_emulated", need_nothing, cpu::encoder_amx_emulated, cpu::linear_amx_emulated,
     cpu::resilient_batch_norm_portable},
#endif
};

const Isa& find(const std::string& name) {
  std::string known;
  for (const Isa& isa : kIsas) {
    if (name == isa.name) return isa;
    known += (known.empty() ? "" : ", ") + std::string(isa.name);
  }
  throw std::invalid_argument("isa: expected one of " + known + ", got '" + name + "'");
}

}  // namespace

const std::vector<std::string>& isa_names() {
  static const std::vector<std::string> names = [] {
    std::vector<std::string> all;
    for (const Isa& isa : kIsas) all.emplace_back(isa.name);
    return all;
  }();
  return names;
}

std::vector<std::string> isa_unsupported_reasons(const std::string& name) {
  Reasons reasons;
  find(name).check(reasons);
  return reasons;
}

std::string processor_name() {
#if defined(__x86_64__)
  char brand[49] = {};
  for (unsigned i = 0; i < 3; ++i) {
    const Registers r = cpuid(0x80000002u + i, 0);
    std::memcpy(brand + 16 * i, &r, 16);
  }
  std::string name(brand);
  while (!name.empty() && name.back() == ' ') name.pop_back();
  const size_t start = name.find_first_not_of(' ');
  if (start != std::string::npos) return name.substr(start);
#endif
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);) {
    if (line.rfind("model name", 0) == 0) return line.substr(line.find(':') + 2);
  }
  return "unknown";
}

int runnable_isa(const std::string& name) {
  const std::vector<std::string> reasons = isa_unsupported_reasons(name);
  if (!reasons.empty()) {
    std::string message = "isa: '" + name + "' cannot run here:";
    for (const std::string& reason : reasons) message += " " + reason + ";";
    message.pop_back();
    throw std::invalid_argument(message);
  }
  return static_cast<int>(&find(name) - kIsas);
}

namespace cpu {
namespace {

const Isa& at(int isa) {
  const int count = static_cast<int>(std::size(kIsas));
  if (isa < 0 || isa >= count) {
    throw std::invalid_argument("isa: expected 0 .. " + std::to_string(count - 1) + ", got " +
                                std::to_string(isa));
  }
  return kIsas[isa];
}

}  // namespace

const EncoderKernelEntry& encoder_kernel(int isa) {
  return at(isa).encoder();
}

const LinearKernelEntry& linear_kernel(int isa, Precision precision) {
  const Isa& found = at(isa);
  if (precision == Precision::kBf16 || found.linear().pair == 1) return found.linear();
  // Where a set multiplies bf16 alone, the best one below it that multiplies fp32.
  for (const Isa* below = &found + 1; below != std::end(kIsas); ++below) {
    Reasons reasons;
    below->check(reasons);
    if (reasons.empty() && below->linear().pair == 1) return below->linear();
  }
  return linear_portable();
}

const ResilientBatchNormKernelEntry& resilient_batch_norm_kernel(int isa) {
  return at(isa).resilient_batch_norm();
}

}  // namespace cpu
}  // namespace seqkernels
