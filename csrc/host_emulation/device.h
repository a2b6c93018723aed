// The functions of cuda/ptx.cuh on the host. Each takes the place it was called from, so that a
// fault can be named. Compile with -Wno-unknown-pragmas: `#pragma unroll` means nothing here.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <utility>

#include "host_emulation/machine.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

namespace seqkernels::cuda {

using host_emulation::Machine;
using host_emulation::Mistake;
using host_emulation::Site;

// ---- indices ----

inline int thread_index() {
  return Machine::current().thread();
}
inline int block_index() {
  return Machine::current().block();
}
inline int block_size() {
  return Machine::current().threads();
}
inline int grid_size() {
  return Machine::current().grid();
}
inline int lane_index() {
  return thread_index() % 32;
}

// ---- memory ----

inline unsigned char* shared_memory() {
  return Machine::current().shared_data();
}

template <class T>
inline T load_global(const T* p, Site site = Site::current()) {
  static_assert(sizeof(T) <= 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  Machine::current().load_global("load_global", p, sizeof(T), false, site);
  return *p;
}
template <class T>
inline T load_global_coherent(const T* p, Site site = Site::current()) {
  static_assert(sizeof(T) <= 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  Machine::current().load_global("load_global_coherent", p, sizeof(T), true, site);
  return *p;
}
template <class T>
inline void store_global(T* p, T value, Site site = Site::current()) {
  static_assert(sizeof(T) <= 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  Machine::current().store_global(p, sizeof(T), site);
  *p = value;
}
template <class T>
inline void store_global_whole(T* p, T value, Site site = Site::current()) {
  static_assert(sizeof(T) == 16);
  store_global(p, value, site);
}
template <class T>
inline T load_shared(const T* p, Site site = Site::current()) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  p = Machine::current().place_of(p);
  Machine::current().access_shared(false, "load_shared", p, sizeof(T), site);
  return *p;
}
template <class T>
inline void store_shared(T* p, T value, Site site = Site::current()) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  p = Machine::current().place_of(p);
  Machine::current().access_shared(true, "store_shared", p, sizeof(T), site);
  *p = value;
}

inline void copy_async_16(void* shared, const void* global, Site site = Site::current()) {
  shared = Machine::current().place_of(static_cast<Vector16*>(shared));
  Machine::current().copy_async(shared, global, site);
}
inline void copy_async_commit() {
  Machine::current().commit_copies();
}
template <int kPending>
inline void copy_async_wait() {
  if (Machine::current().errs(Mistake::Kind::kNoWait)) return;
  Machine::current().wait_for_copies(kPending);
}

// ---- warps ----

inline void sync_threads(Site site = Site::current()) {
  if (Machine::current().errs(Mistake::Kind::kNoBarrier)) return;
  Machine::current().wait_for_block(site);
}
inline void sync_warp(Site site = Site::current()) {
  if (Machine::current().errs(Mistake::Kind::kNoWarpBarrier)) return;
  static constexpr host_emulation::Collective kCollective{
      "sync_warp", [](void* const(&)[32]) {
        Machine::current().order_warp();
        ++Machine::current().counters.warp_barriers;
      }};
  Machine::current().wait_for_warp(kCollective, nullptr, site);
}

namespace internal {

template <class T>
struct ShuffleOperands {
  T value;
  int source;
  T result;
};
template <class T>
inline T shuffle_from(T value, int source, const Site& site) {
  static constexpr host_emulation::Collective kCollective{
      "shuffle", [](void* const(&lanes)[32]) {
        for (void* lane : lanes) {
          auto& own = *static_cast<ShuffleOperands<T>*>(lane);
          own.result = static_cast<ShuffleOperands<T>*>(lanes[own.source])->value;
        }
        ++Machine::current().counters.shuffles;
      }};
  ShuffleOperands<T> operands{value, source & 31, value};
  Machine::current().wait_for_warp(kCollective, &operands, site);
  return operands.result;
}

struct VoteOperands {
  bool holds, any, all;
};
inline VoteOperands vote(bool holds, const Site& site) {
  static constexpr host_emulation::Collective kCollective{
      "vote", [](void* const(&lanes)[32]) {
        bool any = false, all = true;
        for (void* lane : lanes) {
          any |= static_cast<VoteOperands*>(lane)->holds;
          all &= static_cast<VoteOperands*>(lane)->holds;
        }
        for (void* lane : lanes) {
          static_cast<VoteOperands*>(lane)->any = any;
          static_cast<VoteOperands*>(lane)->all = all;
        }
        ++Machine::current().counters.votes;
      }};
  VoteOperands operands{holds, false, false};
  Machine::current().wait_for_warp(kCollective, &operands, site);
  return operands;
}

template <int kMatrices, bool kTransposed>
inline void ldmatrix(uint32_t* r, const void* shared_row, const Site& site) {
  static constexpr host_emulation::Collective kCollective{
      kTransposed ? "ldmatrix_trans" : "ldmatrix", [](void* const(&lanes)[32]) {
        Machine& m = Machine::current();
        for (int matrix = 0; matrix < kMatrices; ++matrix) {
          uint32_t offsets[32] = {};
          for (int lane = 8 * matrix; lane < 8 * matrix + 8; ++lane) {
            const void* row =
                static_cast<const host_emulation::LdmatrixOperands*>(lanes[lane])->row;
            m.access_matrix_row(row, m.lane_of_warp(lane).site);
            offsets[lane] =
                static_cast<uint32_t>(static_cast<const unsigned char*>(row) - m.shared_data());
          }
          m.count(host_emulation::wavefronts(offsets, 0xffu << 8 * matrix, 16));
        }
        host_emulation::ldmatrix_warp<kMatrices, kTransposed>(lanes);
        ++m.counters.ldmatrix;
      }};
  // Lanes that name no row have none to move.
  if (lane_index() < 8 * kMatrices)
    shared_row = Machine::current().place_of(static_cast<const Vector16*>(shared_row));
  host_emulation::LdmatrixOperands operands{r, shared_row};
  Machine::current().wait_for_warp(kCollective, &operands, site);
}

inline float flush(float x) {
  return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x;
}

}  // namespace internal

template <class T>
inline T shuffle(T value, int lane, Site site = Site::current()) {
  return internal::shuffle_from(value, lane, site);
}
template <class T>
inline T shuffle_xor(T value, int mask, Site site = Site::current()) {
  return internal::shuffle_from(value, lane_index() ^ mask, site);
}
inline bool any(bool holds, Site site = Site::current()) {
  return internal::vote(holds, site).any;
}
inline bool all(bool holds, Site site = Site::current()) {
  return internal::vote(holds, site).all;
}
inline int warp_index(Site site = Site::current()) {
  return internal::shuffle_from(thread_index() / 32, 0, site);
}

inline void ldmatrix_x2(uint32_t (&r)[2], const void* shared_row, Site site = Site::current()) {
  internal::ldmatrix<2, false>(r, shared_row, site);
}
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* shared_row,
                              Site site = Site::current()) {
  internal::ldmatrix<2, true>(r, shared_row, site);
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row, Site site = Site::current()) {
  internal::ldmatrix<4, false>(r, shared_row, site);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared_row,
                              Site site = Site::current()) {
  internal::ldmatrix<4, true>(r, shared_row, site);
}

inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                         Site site = Site::current()) {
  static constexpr host_emulation::Collective kCollective{
      "mma_m16n8k16", [](void* const(&lanes)[32]) {
        host_emulation::mma_warp<16>(lanes);
        ++Machine::current().counters.mma_m16n8k16;
      }};
  if (Machine::current().errs(Mistake::Kind::kSwappedFragment)) std::swap(b0, b1);
  host_emulation::MmaOperands operands{d, a, b0, b1};
  Machine::current().wait_for_warp(kCollective, &operands, site);
}
inline void mma_m16n8k8(float (&d)[4], const uint32_t (&a)[2], uint32_t b0,
                        Site site = Site::current()) {
  static constexpr host_emulation::Collective kCollective{
      "mma_m16n8k8", [](void* const(&lanes)[32]) {
        host_emulation::mma_warp<8>(lanes);
        ++Machine::current().counters.mma_m16n8k8;
      }};
  host_emulation::MmaOperands operands{d, a, b0, 0};
  Machine::current().wait_for_warp(kCollective, &operands, site);
}

// ---- arithmetic ----

inline float bits_as_float(uint32_t bits) {
  return std::bit_cast<float>(bits);
}
inline uint32_t float_as_bits(float value) {
  return std::bit_cast<uint32_t>(value);
}

inline uint32_t pack_bf16(float low, float high) {
  const auto round = [](float x) {
    const uint32_t bits = float_as_bits(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffu;  // the one NaN that cvt gives
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  };
  return round(low) | round(high) << 16;
}
inline float bf16_low(uint32_t packed) {
  return bits_as_float(packed << 16);
}
inline float bf16_high(uint32_t packed) {
  return bits_as_float(packed & 0xffff0000u);
}

inline float exp2_approx(float x) {
  ++Machine::current().counters.exp2;
  return internal::flush(std::exp2f(x));
}
inline float rsqrt_approx(float x) {
  ++Machine::current().counters.rsqrt;
  return 1.0f / std::sqrt(internal::flush(x));
}
inline float reciprocal_approx(float x) {
  ++Machine::current().counters.reciprocals;
  return internal::flush(1.0f / internal::flush(x));
}
inline float erf_fp32(float x) {
  return std::erf(x);
}
inline float tanh_fp32(float x) {
  return std::tanh(x);
}

// The host's compiler must not contract: -ffp-contract=off.
inline float multiply_rounded(float a, float b) {
  return a * b;
}
inline float add_rounded(float a, float b) {
  return a + b;
}

inline void scheduling_fence() {}

}  // namespace seqkernels::cuda
