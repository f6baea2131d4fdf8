// Rows of a table by id, and the gradient of the table.
//
//   embed            out[m] = table[ids[m]]
//   embed_backward   dtable[id] += sum of dx[m] over the m with ids[m] = id, in the order of m
//
// out, dx bf16 (M, D); ids I32 (M), each in [0, V); table bf16 (V, D); dtable F32 (V, D).
//
// embed: one warp a row, eight neighbouring elements a lane and step; 4 D + 4 bytes a row.
//
// embed_backward sorts 64-bit entries (id, m) by id. The sort is stable, so the entries of an id
// are neighbours, in the order of m. One warp an entry and slab of 32 x eight columns; the warp of
// an id's first entry adds them all, the others end at once. 2 D bytes an entry, 8 D an id.
#include <bit>
#include <cub/device/device_radix_sort.cuh>

#include "cuda/cuda_backend.h"
#include "cuda/early_start.h"
#include "cuda/vector.h"

namespace bbb::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRowsPerBlock = kThreads / 32;
constexpr int kWide = 8;
constexpr int kAhead = 8;                // rows of a sum that are loaded before they are added
constexpr unsigned kWarp = 0xffffffffu;  // all lanes
constexpr int kIdBit = 32;               // of an entry: the id's lowest

template <int kWidth>
__global__ void embed_kernel(bf16* __restrict__ out, const int32_t* __restrict__ ids,
                             const bf16* __restrict__ table, int64_t rows, int64_t d) {
  using Chunk = Vector<bf16, kWidth>;
  start_next_kernel();
  wait_for_previous_kernel();
  const int64_t m = int64_t{blockIdx.x} * kRowsPerBlock + threadIdx.x / 32;
  if (m >= rows) return;
  const bf16* const from = table + load_past_l1(ids + m) * d;
  bf16* const to = out + m * d;
  for (int64_t i = threadIdx.x % 32 * kWidth; i < d; i += 32 * kWidth)
    *reinterpret_cast<Chunk*>(to + i) = load_past_l1(reinterpret_cast<const Chunk*>(from + i));
}

__global__ void make_entries_kernel(uint64_t* __restrict__ entries, const int32_t* __restrict__ ids,
                                    int64_t rows) {
  const int64_t m = first_element<1>();
  if (m < rows) entries[m] = uint64_t{static_cast<uint32_t>(ids[m])} << kIdBit | m;
}

template <int kWidth>
__global__ void __launch_bounds__(kThreads, 2)
    embed_backward_kernel(float* __restrict__ dtable, const bf16* __restrict__ dx,
                          const uint64_t* __restrict__ sorted, int64_t rows, int64_t d) {
  using Chunk = Vector<bf16, kWidth>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t first = int64_t{blockIdx.x} * kRowsPerBlock + threadIdx.x / 32;
  if (first >= rows) return;
  const uint64_t id = sorted[first] >> kIdBit;
  if (first > 0 && sorted[first - 1] >> kIdBit == id) return;
  const int64_t column = (int64_t{blockIdx.y} * 32 + lane) * kWidth;
  const bool inside = column < d;
  float* const to = dtable + id * d + column;
  float sum[kWidth] = {};
  if (inside) load(sum, to, kWidth);
  int count = 32;  // entries of the id among the next 32
  for (int64_t begin = first; count == 32; begin += 32) {
    const uint64_t entry = begin + lane < rows ? sorted[begin + lane] : ~uint64_t{0};
    const unsigned others = __ballot_sync(kWarp, entry >> kIdBit != id);
    count = others == 0 ? 32 : __ffs(static_cast<int>(others)) - 1;
    for (int i = 0; i < count; i += kAhead) {
      Chunk rows_ahead[kAhead] = {};
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        const int64_t m = __shfl_sync(kWarp, static_cast<uint32_t>(entry), i + j);
        if (inside && i + j < count)
          rows_ahead[j] = *reinterpret_cast<const Chunk*>(dx + m * d + column);
      }
#pragma unroll
      for (int j = 0; j < kAhead; ++j)
#pragma unroll
        for (int k = 0; k < kWidth; ++k) sum[k] += to_float(rows_ahead[j].v[k]);
    }
  }
  if (inside) store(to, sum, kWidth);
}

// The bits of an entry by which it is sorted end before this one.
int end_bit(int64_t vocabulary) {
  return kIdBit +
         std::max(1, static_cast<int>(std::bit_width(static_cast<uint64_t>(vocabulary - 1))));
}

// Scratch: entries, sorted entries, and what the sort needs.
size_t sort_bytes(int64_t rows, int64_t vocabulary) {
  size_t bytes = 0;
  BBB_CUDA(cub::DeviceRadixSort::SortKeys(nullptr, bytes, static_cast<const uint64_t*>(nullptr),
                                          static_cast<uint64_t*>(nullptr), rows, kIdBit,
                                          end_bit(vocabulary)));
  return bytes;
}

}  // namespace

int64_t embed_backward_scratch_bytes(int64_t rows, int64_t vocabulary) {
  return 2 * rows * int64_t{sizeof(uint64_t)} + static_cast<int64_t>(sort_bytes(rows, vocabulary));
}

void CudaBackend::do_embed(const Tensor& out, const Tensor& ids, const Tensor& table) {
  const int64_t rows = ids.numel(), d = table.dim(1);
  const bool wide = d % kWide == 0 && aligned(out, table);
  launch(stream_, {blocks_for(rows, kRowsPerBlock, 1), dim3(kThreads), 0, starts_early(rows)},
         wide ? embed_kernel<kWide> : embed_kernel<1>, bf16_of(out), ids.data<int32_t>(),
         bf16_of(table), rows, d);
}

void CudaBackend::do_embed_backward(const Tensor& dtable, const Tensor& dx, const Tensor& ids,
                                    Write mode, const Tensor& scratch) {
  const int64_t rows = ids.numel(), d = dtable.dim(1), vocabulary = dtable.dim(0);
  if (mode == Write::Overwrite) do_zero(dtable);
  if (rows == 0) return;
  uint64_t* const entries = static_cast<uint64_t*>(scratch.raw());
  uint64_t* const sorted = entries + rows;
  launch(stream_, {blocks_for(rows, kThreads, 1), dim3(kThreads)}, make_entries_kernel, entries,
         ids.data<int32_t>(), rows);
  size_t bytes = sort_bytes(rows, vocabulary);
  BBB_CUDA(cub::DeviceRadixSort::SortKeys(sorted + rows, bytes, entries, sorted, rows, kIdBit,
                                          end_bit(vocabulary), stream_));
  const bool wide = d % kWide == 0 && aligned(dtable, dx);
  dim3 grid = blocks_for(rows, kRowsPerBlock, 1);
  grid.y = blocks_for(d, 32, wide ? kWide : 1).x;
  launch(stream_, {grid, dim3(kThreads)},
         wide ? embed_backward_kernel<kWide> : embed_backward_kernel<1>, dtable.data<float>(),
         bf16_of(dx), sorted, rows, d);
}

}  // namespace bbb::cuda
