// Runs AMX machine code on a processor without AMX: each tile instruction raises SIGILL, and the
// handler decodes and performs it. So the object that ships is what is tested, not a model of it.
// Instructions are counted.
//
// After the Intel architecture instruction set extensions programming reference: VEX.128.0F38.W0,
// opcodes 49 (configure, release, zero), 4B (load, store) and 5C (dot product of bf16 pairs).
// Anything unexpected ends the program with a message.
#pragma once

#include <signal.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace amx_trap {

struct Counts {
  long configure = 0, release = 0, zero = 0, load = 0, store = 0, dot = 0;
};

struct State {
  bool configured = false;
  int rows[8] = {}, bytes_per_row[8] = {};
  uint32_t words[8][16][16] = {};
  Counts counts;
};

inline State& state() {
  static thread_local State instance;
  return instance;
}

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "amx_trap: %s\n", what);
  _exit(3);
}

inline float bf16(uint32_t half) {
  const uint32_t bits = half << 16;
  float value;
  memcpy(&value, &bits, 4);
  // Denormal operands count as zero.
  return (bits & 0x7f800000) == 0 ? 0.0f : value;
}

// Reads the operand bytes behind a VEX prefix.
struct Decoder {
  const uint8_t* p;
  const ucontext_t* context;
  int rex_x, rex_b;

  int64_t reg(int index) const {
    static constexpr int kOrder[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                                       REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                                       REG_R12, REG_R13, REG_R14, REG_R15};
    return context->uc_mcontext.gregs[kOrder[index]];
  }

  // The address that ModRM (already read) names; p moves behind it. `stride` is the index
  // register's value times its scale where the instruction steps by it, and then does not enter the
  // address.
  int64_t address(uint8_t modrm, int64_t* stride) {
    const int mod = modrm >> 6, rm = modrm & 7;
    int64_t at = 0;
    if (rm == 4) {
      const uint8_t sib = *p++;
      const int index = ((sib >> 3) & 7) | rex_x << 3, base = sib & 7;
      const int64_t scaled = index == 4 ? 0 : reg(index) << (sib >> 6);
      if (stride) {
        *stride = scaled;
      } else {
        at += scaled;
      }
      if (base == 5 && mod == 0) {
        at += displacement32();
      } else {
        at += reg(base | rex_b << 3);
      }
    } else if (rm == 5 && mod == 0) {
      const int64_t displacement = displacement32();
      at = reinterpret_cast<int64_t>(p) + displacement;
    } else {
      at = reg(rm | rex_b << 3);
    }
    if (mod == 1) at += static_cast<int8_t>(*p++);
    if (mod == 2) at += displacement32();
    return at;
  }

  int64_t displacement32() {
    int32_t value;
    memcpy(&value, p, 4);
    p += 4;
    return value;
  }
};

inline void configure(const uint8_t* config) {
  State& s = state();
  if (config[0] != 1) fail("ldtilecfg: palette is not 1");
  for (int i = 1; i < 16; ++i) {
    if (config[i]) fail("ldtilecfg: start row or reserved bytes are not 0");
  }
  for (int i = 0; i < 16; ++i) {
    uint16_t bytes;
    memcpy(&bytes, config + 16 + 2 * i, 2);
    const uint8_t rows = config[48 + i];
    if (i >= 8 ? (bytes || rows) : (bytes > 64 || rows > 16))
      fail("ldtilecfg: tile shape out of range");
    if (i < 8) {
      s.bytes_per_row[i] = bytes;
      s.rows[i] = rows;
    }
  }
  memset(s.words, 0, sizeof s.words);
  s.configured = true;
}

inline void dot(int c, int a, int b) {
  State& s = state();
  if (c == a || c == b || a == b) fail("tdpbf16ps: operands are not three tiles");
  if (s.bytes_per_row[a] != 4 * s.rows[b] || s.rows[c] != s.rows[a] ||
      s.bytes_per_row[c] != s.bytes_per_row[b]) {
    fail("tdpbf16ps: shapes do not fit");
  }
  for (int m = 0; m < s.rows[c]; ++m) {
    for (int k = 0; k < s.rows[b]; ++k) {
      const uint32_t x = s.words[a][m][k];
      for (int n = 0; n < s.bytes_per_row[c] / 4; ++n) {
        const uint32_t y = s.words[b][k][n];
        float sum;
        memcpy(&sum, &s.words[c][m][n], 4);
        sum += bf16(x & 0xffff) * bf16(y & 0xffff);
        sum += bf16(x >> 16) * bf16(y >> 16);
        memcpy(&s.words[c][m][n], &sum, 4);
      }
    }
  }
}

inline void handle(int, siginfo_t*, void* raw) {
  ucontext_t* context = static_cast<ucontext_t*>(raw);
  const uint8_t* at = reinterpret_cast<const uint8_t*>(context->uc_mcontext.gregs[REG_RIP]);
  // C4 | R X B mmmmm | W vvvv L pp | opcode | ModRM
  if (at[0] != 0xc4 || (at[1] & 0x1f) != 2 || (at[2] & 0x84) != 0)
    fail("an illegal instruction that is not AMX's");
  const int pp = at[2] & 3, vvvv = ~(at[2] >> 3) & 15;
  const uint8_t opcode = at[3], modrm = at[4];
  const bool memory = modrm >> 6 != 3;
  const int reg = (modrm >> 3) & 7;
  Decoder decoder{at + 5, context, !(at[1] & 0x40), !(at[1] & 0x20)};
  State& s = state();
  const bool is_configure = opcode == 0x49 && pp == 0 && memory;
  if (!is_configure && !s.configured) fail("a tile instruction without a configuration");

  if (is_configure) {
    configure(reinterpret_cast<const uint8_t*>(decoder.address(modrm, nullptr)));
    ++s.counts.configure;
  } else if (opcode == 0x49 && pp == 0 && modrm == 0xc0) {
    s.configured = false;
    ++s.counts.release;
  } else if (opcode == 0x49 && pp == 3 && !memory) {
    memset(s.words[reg], 0, sizeof s.words[reg]);
    ++s.counts.zero;
  } else if (opcode == 0x4b && memory && (pp == 1 || pp == 2 || pp == 3)) {
    int64_t stride = 0;
    const int64_t base = decoder.address(modrm, &stride);
    for (int row = 0; row < s.rows[reg]; ++row) {
      void* p = reinterpret_cast<void*>(base + row * stride);
      const size_t bytes = static_cast<size_t>(s.bytes_per_row[reg]);
      if (pp == 2) {
        memcpy(p, s.words[reg][row], bytes);
      } else {
        memset(s.words[reg][row], 0, 64);
        memcpy(s.words[reg][row], p, bytes);
      }
    }
    ++(pp == 2 ? s.counts.store : s.counts.load);
  } else if (opcode == 0x5c && pp == 2 && !memory) {
    dot(reg, modrm & 7, vvvv);
    ++s.counts.dot;
  } else {
    fail("an AMX instruction that is not modelled");
  }
  context->uc_mcontext.gregs[REG_RIP] = reinterpret_cast<greg_t>(decoder.p);
}

inline void install() {
  struct sigaction action = {};
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGILL, &action, nullptr);
}

}  // namespace amx_trap
