// Building blocks of the kernels for Hopper: barriers in shared memory and the tensor copy engine
// (TMA; sm_90 and later); warpgroup products (wgmma, sm_90a only).
//
// A tile of bf16 in shared memory is panels of 64 columns (head sizes 64 and 128) or 32 (96). A
// panel holds its rows one after another, 128 or 64 bytes each. The 16-byte chunks of a row are
// swizzled as the copy engine writes and wgmma reads them: the chunk index is xor-ed with the low
// bits of the row (of row / 2 for rows of 64 bytes). PTX ISA, "Asynchronous Warpgroup Level Matrix
// Shared Memory Layout". Every panel starts on a multiple of 1024 bytes.
//
// Fragments of m64nNk16, warp w of the warpgroup, lane = 4 g + t:
//     D (64 x N)   d[n][0], d[n][1]  (16 w + g, 8 n + 2t), (.., 8 n + 2t + 1)   d[n][2], d[n][3] at
//                  row + 8: the C fragment of mma.sync for the warp's 16 rows
//     A (64 x 16)  in registers: the A fragment of mma.sync for the warp's 16 rows
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/ptx.h"

// On other architectures the kernels that include this are empty, and what they use is unused.
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#pragma nv_diag_suppress 177
#endif

namespace bbb::cuda {

constexpr int kWarpgroup = 128;  // threads

template <int D>
struct PanelShape {
  static_assert(D == 64 || D == 96 || D == 128);
  static constexpr int kColumns = D % 64 == 0 ? 64 : 32;
  static constexpr int kPanels = D / kColumns;
  static constexpr int kRowBytes = kColumns * 2;
};

// A tensor map of x (B, T, heads, D) with boxes of `rows` positions of one head and one panel.
// Positions outside of [0, T) read as zeros and are not written. x is aligned to 16 bytes.
template <int D>
CUtensorMap panel_map(const __nv_bfloat16* x, int batch, int t, int heads, int rows);

// A tensor map of x (rows, columns), columns a multiple of 8, with boxes of `box_rows` rows of a
// panel of 64 columns. Positions outside of x read as zeros.
CUtensorMap matrix_map(const __nv_bfloat16* x, int64_t rows, int64_t columns, int box_rows);

// A tensor map of bytes (rows, row_bytes), row_bytes a multiple of 16, with boxes of `box_rows`
// rows of `box_bytes`. In a box, rows of 64 and 128 bytes are swizzled as above. Positions outside
// read as zeros.
CUtensorMap code_map(const uint8_t* codes, int64_t rows, int64_t row_bytes, int box_bytes,
                     int box_rows);

#ifdef __CUDACC__

// The block's dynamic shared memory from its first multiple of 1024 on.
__device__ inline unsigned char* swizzled_smem() {
  unsigned char* memory = reinterpret_cast<unsigned char*>(dynamic_smem());
  return memory + (-shared_address(memory) & 1023u);
}

// --- barriers -----------------------------------------------------------------------------------
// An arrival releases its thread's earlier accesses; a wait acquires those of all arrived threads.
// With -DBBB_STRESS=ON, arrivals and waits pause some threads for a random time.

__device__ inline void stress_pause() {
#ifdef BBB_STRESS
  // The draw depends on thread, block and time: one in 16 pauses for up to 2 us.
  const uint32_t seed = static_cast<uint32_t>(clock64()) ^ (blockIdx.x << 10) ^ threadIdx.x;
  const uint32_t random = (seed ^ seed >> 15) * 0x9e3779b1u;
  if (random >> 28 == 0) __nanosleep(random >> 17 & 2047);
#endif
}

// The same, before an instruction that requires a converged warp.
__device__ inline void stress_pause_warp() {
#ifdef BBB_STRESS
  stress_pause();
  __syncwarp();
#endif
}

__device__ inline void mbarrier_init(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

// Makes initialised barriers visible to the copy engine. A __syncthreads() must follow.
__device__ inline void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ inline void mbarrier_arrive(uint32_t barrier) {
  stress_pause();
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// One arrival for the whole warp; it releases all lanes' earlier accesses.
__device__ inline void mbarrier_arrive_warp(uint32_t barrier, int lane) {
  __syncwarp();
  if (lane == 0) mbarrier_arrive(barrier);
}

// Arrives; the phase also waits for `bytes` of copies.
__device__ inline void mbarrier_expect(uint32_t barrier, int bytes) {
  stress_pause();
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// Whether the phase of this parity is complete; the hardware waits for it for a short time.
__device__ inline bool mbarrier_try_wait(uint32_t barrier, int parity) {
  uint32_t done;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done != 0;
}

// Waits until the phase of this parity is complete.
__device__ inline void mbarrier_wait(uint32_t barrier, int parity) {
  stress_pause();
  while (!mbarrier_try_wait(barrier, parity)) {
  }
  stress_pause();
}

// Named barriers. Number 0 is that of __syncthreads().
__device__ inline void named_sync(int id, int threads) {
  stress_pause_warp();
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
  stress_pause();
}

__device__ inline void named_arrive(int id, int threads) {
  stress_pause_warp();
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// A position in a ring of kStages buffers, and the parity of its round.
template <int kStages>
struct RingCursor {
  int stage = 0;
  int parity = 0;

  __device__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// The index of the next item of a persistent kernel; a block's first item is its blockIdx. *queue
// starts at 0. Which block computes an item does not change its result.
__device__ inline int next_item(unsigned* queue) {
  stress_pause();
  return static_cast<int>(gridDim.x + atomicAdd(queue, 1u));
}

__device__ inline void store_shared(uint32_t address, int value) {
  asm volatile("st.shared.s32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

// Lane 0 reads the value; every lane of the warp gets it.
__device__ inline int load_shared_warp(uint32_t address, int lane) {
  int value = 0;
  if (lane == 0) asm volatile("ld.shared.s32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return __shfl_sync(0xffffffffu, value, 0);
}

// --- copies -------------------------------------------------------------------------------------

// One box to shared memory; its bytes count towards `barrier`.
__device__ inline void copy_box(uint32_t dst, const CUtensorMap& map, uint32_t barrier, int column,
                                int head, int position, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(dst),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(barrier), "r"(column), "r"(head), "r"(position),
      "r"(batch)
      : "memory");
}

// The same of a matrix.
__device__ inline void copy_box(uint32_t dst, const CUtensorMap& map, uint32_t barrier, int column,
                                int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4}], [%2];" ::"r"(dst),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(barrier), "r"(column), "r"(row)
      : "memory");
}

// Fetches the map itself, ahead of its first copy.
__device__ inline void prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<uint64_t>(&map)) : "memory");
}

// A whole tile: its panels, each of kRows rows.
template <int D, int kRows>
__device__ inline void copy_tile(uint32_t dst, const CUtensorMap& map, uint32_t barrier, int head,
                                 int position, int batch) {
  using Panel = PanelShape<D>;
#pragma unroll
  for (int p = 0; p < Panel::kPanels; ++p)
    copy_box(dst + p * kRows * Panel::kRowBytes, map, barrier, p * Panel::kColumns, head, position,
             batch);
}

// `bytes`, a multiple of 16, of consecutive memory; both addresses aligned to 16.
__device__ inline void copy_bytes(uint32_t dst, const void* src, int bytes, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(dst),
      "l"(__cvta_generic_to_global(src)), "r"(bytes), "r"(barrier)
      : "memory");
}

// The same of what is read once: the L2 cache drops it before all else.
__device__ inline void copy_bytes_once(uint32_t dst, const void* src, int bytes, uint32_t barrier) {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1], %2, [%3], %4;" ::"r"(dst),
      "l"(__cvta_generic_to_global(src)), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
}

// To the L2 cache; `bytes` a multiple of 16, src aligned to 16.
__device__ inline void prefetch_bytes_to_l2(const void* src, int bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(__cvta_generic_to_global(src)),
               "r"(bytes)
               : "memory");
}

__device__ inline void store_box(const CUtensorMap& map, uint32_t src, int column, int head,
                                 int position, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(
          reinterpret_cast<uint64_t>(&map)),
      "r"(src), "r"(column), "r"(head), "r"(position), "r"(batch)
      : "memory");
}

__device__ inline void store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until this thread's stores have read their shared memory.
__device__ inline void store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

// Orders this thread's ordinary writes to shared memory before later accesses by the copy engine
// and wgmma. A barrier between the threads must follow.
__device__ inline void async_proxy_fence() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// --- clusters -----------------------------------------------------------------------------------
// A cluster's barrier: every thread of every block arrives, and waits before it arrives again. It
// need not wait before it ends. An arrival orders no memory accesses, as a fence of the whole GPU
// would take half a microsecond: mbarrier_init_fence() makes initialised barriers visible, and the
// barriers of copies between blocks their bytes.

__device__ inline int cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}
__device__ inline int cluster_blocks() {
  uint32_t blocks;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
  return static_cast<int>(blocks);
}
__device__ inline void cluster_arrive() {
  stress_pause_warp();
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ inline void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
  stress_pause();
}

// Writes to the shared memory of another block of the cluster, which has arrived once. `address` is
// that of the same object in this block. The four bytes count towards `barrier` of that block.
// Executed only in clusters of two blocks or more, as the next one.
__device__ inline void store_to_block(uint32_t address, int rank, float value, uint32_t barrier) {
  asm volatile(
      "{\n"
      ".reg .b32 remote, remote_barrier;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mapa.shared::cluster.u32 remote_barrier, %3, %1;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [remote], %2, [remote_barrier];\n"
      "}" ::"r"(address),
      "r"(rank), "f"(value), "r"(barrier)
      : "memory");
}

// Two values and their eight bytes.
__device__ inline void store_to_block(uint32_t address, int rank, float2 value, uint32_t barrier) {
  asm volatile(
      "{\n"
      ".reg .b32 remote, counter;\n"
      "mapa.shared::cluster.u32 remote, %0, %2;\n"
      "mapa.shared::cluster.u32 counter, %1, %2;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [remote], {%3, %4}, "
      "[counter];\n"
      "}" ::"r"(address),
      "r"(barrier), "r"(rank), "f"(value.x), "f"(value.y)
      : "memory");
}

// 16 bytes.
__device__ inline void store_to_block(uint32_t address, int rank, uint4 value, uint32_t barrier) {
  asm volatile(
      "{\n"
      ".reg .b32 remote, counter;\n"
      "mapa.shared::cluster.u32 remote, %0, %2;\n"
      "mapa.shared::cluster.u32 counter, %1, %2;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.u32 [remote], {%3, %4, %5, %6}, "
      "[counter];\n"
      "}" ::"r"(address),
      "r"(barrier), "r"(rank), "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w)
      : "memory");
}

// Copies `bytes`, a multiple of 16, of this block's shared memory to another block of the cluster,
// which has arrived once. They count towards that block's `barrier`. `dst` and `barrier` are
// addresses of the same objects in this block. Neither block may end before. Ordinary writes of
// `src` take an async_proxy_fence().
__device__ inline void copy_to_block(uint32_t dst, uint32_t barrier, int rank, uint32_t src,
                                     int bytes) {
  asm volatile(
      "{\n"
      ".reg .b32 remote, remote_barrier;\n"
      "mapa.shared::cluster.u32 remote, %0, %2;\n"
      "mapa.shared::cluster.u32 remote_barrier, %1, %2;\n"
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes "
      "[remote], [%3], %4, [remote_barrier];\n"
      "}" ::"r"(dst),
      "r"(barrier), "r"(rank), "r"(src), "r"(bytes)
      : "memory");
}

// --- registers ----------------------------------------------------------------------------------

template <int kRegisters>
__device__ inline void registers_up() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ inline void registers_down() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// --- warpgroup products -------------------------------------------------------------------------

__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most kPending committed groups are in flight.
template <int kPending>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving uses of an accumulator across this point: it does not know that
// wgmma writes the registers later.
template <int N>
__device__ inline void accumulator_fence(float (&d)[N][4]) {
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(d[n][i])::"memory");
}

// The same for fragments of A: they are ready before the fence that follows.
template <int N>
__device__ inline void fragment_fence(uint32_t (&a)[N][4]) {
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(a[n][i])::"memory");
}

// How a tile is an operand. Columns: A or B^T, with k along its columns. Rows: A^T or B, with k
// along its rows.
enum class Along { Columns, Rows };

// Descriptors of a tile of kRows rows at `base` (shared address, multiple of 1024).
template <int D, int kRows>
struct Operand {
  using Panel = PanelShape<D>;
  static constexpr int kPanelBytes = kRows * Panel::kRowBytes;
  static constexpr int kBytes = kPanelBytes * Panel::kPanels;
  static constexpr uint64_t kSwizzle = Panel::kRowBytes == 128 ? 1 : 2;

  // From row `row` (a multiple of 8) on.
  template <Along kAlong>
  __device__ static uint64_t descriptor(uint32_t base, int row = 0) {
    const uint64_t leading = kAlong == Along::Rows ? kPanelBytes / 16 : 1;
    constexpr uint64_t kStride = 8 * Panel::kRowBytes / 16;  // between groups of 8 rows
    return static_cast<uint64_t>((base + row * Panel::kRowBytes) / 16) | leading << 16 |
           kStride << 32 | kSwizzle << 62;
  }
  // The offset of k16 slice number `slice`, to be added to a descriptor.
  template <Along kAlong>
  __device__ static constexpr uint64_t slice_offset(int slice) {
    if (kAlong == Along::Rows) return static_cast<uint64_t>(slice * 16 * Panel::kRowBytes / 16);
    const int column = slice * 16;
    return static_cast<uint64_t>(
        (column / Panel::kColumns * kPanelBytes + column % Panel::kColumns * 2) / 16);
  }
  // The descriptor of that slice: an address never carries into the upper half.
  template <Along kAlong>
  __device__ static uint64_t slice(uint64_t descriptor, int number) {
    const uint32_t low =
        static_cast<uint32_t>(descriptor) + static_cast<uint32_t>(slice_offset<kAlong>(number));
    uint64_t joined;
    asm("mov.b64 %0, {%1, %2};"
        : "=l"(joined)
        : "r"(low), "r"(static_cast<uint32_t>(descriptor >> 32)));
    return joined;
  }
  // Bytes from the tile's start to a 16-byte chunk.
  __device__ static uint32_t chunk_offset(int row, int chunk) {
    constexpr int kChunks = Panel::kColumns / 8;
    const int key = Panel::kRowBytes == 128 ? row & 7 : (row >> 1) & 3;
    return static_cast<uint32_t>(chunk / kChunks * kPanelBytes + row * Panel::kRowBytes +
                                 ((chunk % kChunks) ^ key) * 16);
  }
};

#define BBB_ACC4(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define BBB_ACC8(i) BBB_ACC4(i), BBB_ACC4(i + 1)
#define BBB_ACC16(i) BBB_ACC8(i), BBB_ACC8(i + 2)
#define BBB_ACC32 BBB_ACC16(0), BBB_ACC16(4)
#define BBB_ACC48 BBB_ACC32, BBB_ACC16(8)
#define BBB_ACC64 BBB_ACC48, BBB_ACC16(12)
#define BBB_REG4 "{%0, %1, %2, %3"
#define BBB_REG8 BBB_REG4 ", %4, %5, %6, %7"
#define BBB_REG16 BBB_REG8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define BBB_REG32 \
  BBB_REG16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define BBB_REG48 \
  BBB_REG32 ",%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define BBB_REG64 \
  BBB_REG48 ",%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// d (+)= a b for one k16 slice; overwrites d if `add` is 0. A: a descriptor, as kAlongA says, or
// registers; B: a descriptor, as kAlong says. i0 .. i6: the operand numbers after the
// accumulator's.
#define BBB_WGMMA(columns, registers, outputs, i0, i1, i2, i3, i4, i5, i6)                      \
  template <Along kAlong, Along kAlongA = Along::Columns>                                       \
  __device__ inline void wgmma(float(&d)[columns / 8][4], uint64_t a, uint64_t b, int add) {    \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #i2                                       \
                 ", 0;\n"                                                                       \
                 "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32.bf16.bf16 " registers    \
                 "}, %" #i0 ", %" #i1 ", p, 1, 1, %" #i3 ", %" #i4 ";\n}"                       \
                 : outputs                                                                      \
                 : "l"(a), "l"(b), "r"(add), "n"(kAlongA == Along::Rows ? 1 : 0),               \
                   "n"(kAlong == Along::Rows ? 1 : 0));                                         \
  }                                                                                             \
  template <Along kAlong>                                                                       \
  __device__ inline void wgmma(float(&d)[columns / 8][4], const uint32_t(&a)[4], uint64_t b,    \
                               int add) {                                                       \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #i5                                       \
                 ", 0;\n"                                                                       \
                 "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32.bf16.bf16 " registers    \
                 "}, {%" #i0 ", %" #i1 ", %" #i2 ", %" #i3 "}, %" #i4 ", p, 1, 1, %" #i6 ";\n}" \
                 : outputs                                                                      \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add),                \
                   "n"(kAlong == Along::Rows ? 1 : 0));                                         \
  }
BBB_WGMMA(8, BBB_REG4, BBB_ACC4(0), 4, 5, 6, 7, 8, 9, 10)
BBB_WGMMA(16, BBB_REG8, BBB_ACC8(0), 8, 9, 10, 11, 12, 13, 14)
BBB_WGMMA(32, BBB_REG16, BBB_ACC16(0), 16, 17, 18, 19, 20, 21, 22)
BBB_WGMMA(64, BBB_REG32, BBB_ACC32, 32, 33, 34, 35, 36, 37, 38)
BBB_WGMMA(96, BBB_REG48, BBB_ACC48, 48, 49, 50, 51, 52, 53, 54)
BBB_WGMMA(128, BBB_REG64, BBB_ACC64, 64, 65, 66, 67, 68, 69, 70)
#undef BBB_WGMMA
#undef BBB_REG4
#undef BBB_REG8
#undef BBB_REG16
#undef BBB_REG32
#undef BBB_REG48
#undef BBB_REG64
#undef BBB_ACC4
#undef BBB_ACC8
#undef BBB_ACC16
#undef BBB_ACC32
#undef BBB_ACC48
#undef BBB_ACC64

#endif  // __CUDACC__

}  // namespace bbb::cuda
