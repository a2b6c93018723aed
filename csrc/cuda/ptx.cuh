// What the CUDA kernels use of the machine: memory, warps, tensor cores, approximate arithmetic.
//
// A kernel source touches memory that threads share, other lanes and special instructions through
// these functions alone, so that the same source also runs on the host: there they come from
// host_emulation/device.h. Needs sm_80.
#pragma once

#include <cstdint>

namespace seqkernels::cuda {

// The operands of 8- and 16-byte accesses.
struct alignas(8) Vector8 {
  uint32_t v[2];
};
struct alignas(16) Vector16 {
  uint32_t v[4];
};

}  // namespace seqkernels::cuda

#if defined(SEQKERNELS_HOST_EMULATION)

#include "host_emulation/device.h"

#else

namespace seqkernels::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

// ---- indices; blocks and grids are one-dimensional ----

__device__ __forceinline__ int thread_index() {
  return static_cast<int>(threadIdx.x);
}
__device__ __forceinline__ int block_index() {
  return static_cast<int>(blockIdx.x);
}
__device__ __forceinline__ int block_size() {
  return static_cast<int>(blockDim.x);
}
__device__ __forceinline__ int grid_size() {
  return static_cast<int>(gridDim.x);
}
__device__ __forceinline__ int lane_index() {
  return static_cast<int>(threadIdx.x & 31);
}
// Broadcast: ptxas does not know that tid / 32 is the same in all lanes, and would keep it, and
// what follows from it, in every lane's registers.
__device__ __forceinline__ int warp_index() {
  return __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x >> 5), 0);
}

// ---- memory; T has 4, 8 or 16 bytes, in global memory also 1 or 2, and is aligned to its size
// ----

namespace internal {

template <int kBytes>
struct Word;
template <>
struct Word<1> {
  using Type = unsigned char;
};
template <>
struct Word<2> {
  using Type = unsigned short;
};
template <>
struct Word<4> {
  using Type = unsigned int;
};
template <>
struct Word<8> {
  using Type = uint2;
};
template <>
struct Word<16> {
  using Type = uint4;
};
template <class T>
using WordOf = typename Word<sizeof(T)>::Type;

// By value: the bytes behind a reference would be read one by one.
template <class To, class From>
__device__ __forceinline__ To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

}  // namespace internal

// The block's dynamic shared memory, aligned to 128 bytes.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char seqkernels_shared_memory[];
  return seqkernels_shared_memory;
}

// For data that nobody writes while the kernel runs.
template <class T>
__device__ __forceinline__ T load_global(const T* p) {
  using W = internal::WordOf<T>;
  return internal::bits_as<T>(__ldg(reinterpret_cast<const W*>(p)));
}
// For data that the kernel itself writes.
template <class T>
__device__ __forceinline__ T load_global_coherent(const T* p) {
  using W = internal::WordOf<T>;
  return internal::bits_as<T>(*reinterpret_cast<const W*>(p));
}
template <class T>
__device__ __forceinline__ void store_global(T* p, T value) {
  using W = internal::WordOf<T>;
  *reinterpret_cast<W*>(p) = internal::bits_as<W>(value);
}

// 16 bytes in one access. The compiler splits some of the stores above into those of the words,
// which spares it registers that lie together.
template <class T>
__device__ __forceinline__ void store_global_whole(T* p, T value) {
  static_assert(sizeof(T) == 16);
  const uint4 w = internal::bits_as<uint4>(value);
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)),
               "r"(w.x), "r"(w.y), "r"(w.z), "r"(w.w)
               : "memory");
}

template <class T>
__device__ __forceinline__ T load_shared(const T* p) {
  static_assert(sizeof(T) >= 4);
  using W = internal::WordOf<T>;
  return internal::bits_as<T>(*reinterpret_cast<const W*>(p));
}
template <class T>
__device__ __forceinline__ void store_shared(T* p, T value) {
  static_assert(sizeof(T) >= 4);
  using W = internal::WordOf<T>;
  *reinterpret_cast<W*>(p) = internal::bits_as<W>(value);
}

// Copies 16 bytes; the calling thread sees them once it has waited for the group, the others after
// a barrier behind that.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(internal::shared_address(shared)),
               "l"(__cvta_generic_to_global(global))
               : "memory");
}
// Closes the group of the copies issued since the last one.
__device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until all but the newest `kPending` groups are there.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- warps: every lane takes part ----

__device__ __forceinline__ void sync_threads() {
  __syncthreads();
}
__device__ __forceinline__ void sync_warp() {
  __syncwarp();
}

template <class T>
__device__ __forceinline__ T shuffle(T value, int lane) {
  return __shfl_sync(kAllLanes, value, lane);
}
template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(kAllLanes, value, mask);
}
__device__ __forceinline__ bool any(bool holds) {
  return __any_sync(kAllLanes, holds);
}
__device__ __forceinline__ bool all(bool holds) {
  return __all_sync(kAllLanes, holds);
}

// ldmatrix: lane 8 i + j gives the address of row j of matrix i, 8 bf16 (x2 ignores lanes 16 to
// 31). r[i] gets elements (lane / 4, 2 (lane % 4)) and the next of matrix i; of its transpose with
// `_trans`.
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(internal::shared_address(shared_row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(internal::shared_address(shared_row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(internal::shared_address(shared_row))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(internal::shared_address(shared_row))
               : "memory");
}

// d += a b in fp32, a [16, 16] and b [16, 8] bf16. With g = lane / 4 and t = lane % 4, each
// register a pair of neighbours:
//   a: (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8)
//   b: (2t, g), (2t + 8, g), the pair along k
//   d: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// The same with the first half of k.
__device__ __forceinline__ void mma_m16n8k8(float (&d)[4], const uint32_t (&a)[2], uint32_t b0) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(b0));
}

// ---- arithmetic ----

// Round to nearest, ties to even; NaN stays NaN.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
__device__ __forceinline__ float bf16_low(uint32_t packed) {
  return __uint_as_float(packed << 16);
}
__device__ __forceinline__ float bf16_high(uint32_t packed) {
  return __uint_as_float(packed & 0xffff0000u);
}

// Within 2 ulp; denormal operands and results count as 0.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float rsqrt_approx(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float erf_fp32(float x) {
  return erff(x);
}
__device__ __forceinline__ float tanh_fp32(float x) {
  return tanhf(x);
}
// Rounded each by itself, never contracted to a fused operation.
__device__ __forceinline__ float multiply_rounded(float a, float b) {
  return __fmul_rn(a, b);
}
__device__ __forceinline__ float add_rounded(float a, float b) {
  return __fadd_rn(a, b);
}
__device__ __forceinline__ float bits_as_float(uint32_t bits) {
  return __uint_as_float(bits);
}
__device__ __forceinline__ uint32_t float_as_bits(float value) {
  return __float_as_uint(value);
}

// ptxas moves no load across it, and so does not hoist loads until it spills: a warp barrier does
// not stop it, the trigger of a profiler event does, for one instruction.
__device__ __forceinline__ void scheduling_fence() {
  asm volatile("pmevent 0;" ::: "memory");
}

}  // namespace seqkernels::cuda

#endif
