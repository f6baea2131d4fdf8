// All layers of a decode step of one sequence in one kernel (Backend::layer_decoder):
//
//     x -> RMSNorm -> q k v -> rope, append, attention -> output (+ x) -> RMSNorm -> gate, up
//       -> SwiGLU -> down (+ x) -> next layer
//
// Weights are 2-bit codes in tiles, multiplied as cuda/packed_gemv.cu describes. One block runs on
// every multiprocessor. quant/decode_plan.h says which rows, slices of K and keys it takes.
//
// Weights. Each warp has a ring of tiles in shared memory, about 190 KB a block, and fills it by
// bulk copies with what it will multiply, in order, over the products and layers. A warp copies as
// soon as it has multiplied, and never waits for an activation before it copies. So the copies run
// ahead while the block waits for other blocks.
//
// Activations travel through L2 in words of 8 bytes: 32 bits of data (two bf16 or one F32) and a
// flag, the number of the layer counted over all steps. A word is written and read as a whole. So
// whoever reads a word with the right flag has its data, and no barrier of the grid is needed:
//
//     block A   multiply | publish words          |
//     block B   multiply | publish | read until all flags are right | multiply
//
// Nobody overwrites a word that another block still has to read. Between two writes of a word lie
// five products and attentions, each of which needs results of every block that read the word.
//
// A product: the block reads the words of its part of the input (all of x for a norm), makes the
// operand in integers in shared memory, and multiplies. Every warp sends its sums to the block of
// the cluster that finishes these rows: rank r finishes the r-th part of the cluster's rows. It
// waits until all bytes of one of two exchange buffers are there, and adds in a fixed order: ranks,
// then lanes. A buffer is free again two products later: a block sends sums of the next product
// only after all its warps have finished this one, and nobody sends those of the one after before
// it has got all sums of the next. A thread finishes one row, the same one of `output` and
// of `down`, and keeps its x in a register.
//
// Attention: 8 neighbouring columns of a key are a lane's. Every group of head_dim / 8 lanes walks
// keys of its own with running maximum, sum and output; these are merged over lanes, warps and the
// ranks of the cluster, and over clusters by the readers.
//
// Every wait ends, because all blocks are on the GPU at once; a wait of seconds traps.
// Bytes moved: tiles, keys and values once.
#include <algorithm>
#include <bit>
#include <cstdio>
#include <memory>
#include <optional>
#include <vector>

#include "cuda/attention.h"
#include "cuda/cuda_backend.h"
#include "cuda/early_start.h"
#include "cuda/hadamard.h"
#include "cuda/hopper.h"
#include "cuda/reduce.h"
#include "cuda/rotation.h"
#include "cuda/swiglu.h"
#include "cuda/tile_product.h"
#include "quant/decode_plan.h"

namespace bbb::cuda {

namespace {

using quant::ClusterShare;
using quant::DecodeMemory;
using quant::DecodePlan;
using quant::DecodeProduct;
using quant::DecodeShape;
using quant::kDecodeProducts;
using quant::kDecodeThreads;
using quant::kDecodeWarps;
using quant::kLayerMatrices;
using quant::kMaxNormLines;
using quant::kMaxPartials;
using quant::kMaxRanks;
using quant::kOperandBytes;
using quant::kPartTiles;
using quant::kTileBytes;
using quant::kTileColumns;
using quant::kTileRows;
using quant::kUnitHeads;
using quant::LayerEntry;
using quant::WarpShare;

// Reads of words that are not there yet: the first ones at once, later ones after a pause.
constexpr int kReadsWithoutPause = 8;
constexpr unsigned kPauseNs = 40;
constexpr int kMaxReads = 1 << 22;  // seconds
constexpr unsigned kAllLanes = 0xFFFFFFFFu;
constexpr int kKeyLoads = 2;        // keys and values of a lane in flight
constexpr float kNoScore = -1e30f;  // below every score

// The operand of a product of one layer.
struct DecodeSite {
  const int32_t* channels;  // null: position p holds channel p
  int32_t stored_k;
  int32_t rotated_begin, rotated_end;
  int32_t pairs_begin, pairs_end;
  float pair_factor;
};

// A layer's memory.
struct alignas(16) LayerView {
  const uint8_t* tiles[kLayerMatrices];
  const float* master_scales[kLayerMatrices];
  const float* norms[2];
  bf16 *k, *v;  // (Tmax, K, d)
  DecodeSite sites[kDecodeProducts];
};

struct StepState {
  unsigned first_flag;  // of the next step
  unsigned done;        // blocks of this step
};

struct DecodeArgs {
  const LayerView* layers;
  const ClusterShare* shares;  // (products, clusters)
  StepState* state;
  // Words of two bf16 each: x before a layer, x after attention, q k v, SwiGLU's output. Then of
  // one F32 each: (heads, partials, d + 2) outputs of attention, maximum and sum.
  uint64_t *x_words, *middle_words, *qkv_words, *hidden_words, *attention_words;
  bf16* x;  // (D): in and out
  const int* start;
  const float* inv_freq;
  CacheFault* fault;
  DecodeMemory memory;
  int layers_count, clusters, ranks, rank_shift;  // ranks = 2^rank_shift
  int d_model, hidden, heads, kv_heads, group;    // group of the weights
  int units, partials, t_max, window;
  float eps, rope_factor;
};

// --- words --------------------------------------------------------------------------------------

__device__ __forceinline__ void publish(uint64_t* to, uint32_t data, uint32_t flag) {
  store_word(to, uint64_t{flag} << 32 | data);
}

__device__ __noinline__ void give_up(const char* what, unsigned flag) {
  printf("decode_layers: block %u thread %u waits for %s of flag %u for seconds\n", blockIdx.x,
         threadIdx.x, what, flag);
  __trap();
}

// Reads lines of two words until their flags are right. Line -1: none, data 0.
template <int kLines>
__device__ __forceinline__ void read_lines(uint2 (&data)[kLines], const uint64_t* words,
                                           const int (&line)[kLines], uint32_t flag) {
  unsigned missing = 0;
#pragma unroll
  for (int i = 0; i < kLines; ++i) {
    data[i] = {0, 0};
    if (line[i] >= 0) missing |= 1u << i;
  }
  for (int reads = 0; missing != 0; ++reads) {
    ulonglong2 read[kLines];
#pragma unroll
    for (int i = 0; i < kLines; ++i)
      if ((missing >> i & 1u) != 0) read[i] = load_words(words + int64_t{2} * line[i]);
#pragma unroll
    for (int i = 0; i < kLines; ++i) {
      if ((missing >> i & 1u) == 0) continue;
      if (read[i].x >> 32 != flag || read[i].y >> 32 != flag) continue;
      data[i] = {static_cast<uint32_t>(read[i].x), static_cast<uint32_t>(read[i].y)};
      missing &= ~(1u << i);
    }
    if (missing == 0) break;
    if (reads >= kReadsWithoutPause) __nanosleep(kPauseNs);
    if (reads >= kMaxReads) give_up("words", flag);
  }
  __syncwarp();
}

// The bf16 values of a word.
__device__ __forceinline__ float low_value(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_value(uint32_t pair) {
  return __uint_as_float(pair & 0xFFFF0000u);
}
__device__ __forceinline__ float rounded(float x) {
  return __bfloat162float(__float2bfloat16_rn(x));
}

// --- a warp's stream of tiles -------------------------------------------------------------------

// Chunks, each the tiles of a part in one slice, in the order of use.

// The next chunk to copy, and the free part of the ring. A warp's lane 0 keeps it in shared memory.
struct alignas(16) TileCursor {
  const uint8_t* from;
  int64_t step_bytes;         // to the same part of the warp's next slice
  int layer, product;         // layer == layers_count: there is none
  int slice, end, lanes;      // slices of the block; the warp takes every lanes-th
  int tiles;                  // of the chunk
  int free_tiles, ring_tile;  // of the ring
  int barrier;
};

class TileStream {
 public:
  __device__ TileStream(const DecodeArgs& args, unsigned char* smem, const ClusterShare* shares,
                        TileCursor* cursors)
      : a_(args), smem_(smem), shares_(shares), cursor_(cursors + threadIdx.x / 32) {}

  // Goes to the first chunk and copies as many as fit.
  __device__ void start(int lane) {
    if (lane == 0) {
#pragma unroll 1
      for (int i = 0; i < a_.memory.ring_tiles; ++i) mbarrier_init(barrier(i), 1);
      mbarrier_init_fence();
      async_proxy_fence();
      TileCursor cursor{};
      cursor.free_tiles = a_.memory.ring_tiles;
      enter(cursor, 0, 0);
      copy_chunks(cursor);
    }
    __syncwarp();
  }

  __device__ const LayerEntry& entry(int layer) const {
    return reinterpret_cast<const LayerEntry*>(smem_ + a_.memory.entries)[layer];
  }
  // Slices [first, end) of this block.
  __device__ int first_slice(int layer, int product) const {
    return cluster_rank() * entry(layer).slices[product] >> a_.rank_shift;
  }
  __device__ int end_slice(int layer, int product) const {
    return (cluster_rank() + 1) * entry(layer).slices[product] >> a_.rank_shift;
  }

  // Waits for the next chunk; then its tile i is at tile(i).
  __device__ void wait() const {
    for (int i = 0; !mbarrier_try_wait(barrier(read_barrier_), parity_); ++i)
      if (i >= kMaxReads) give_up("tiles", static_cast<unsigned>(read_barrier_));
  }
  __device__ const unsigned char* tile(int i) const {
    const int at = read_ + i;
    return ring() + (at >= a_.memory.ring_tiles ? at - a_.memory.ring_tiles : at) * kTileBytes;
  }
  // The whole warp is done with the chunk of so many tiles: others take its place.
  __device__ void release(int tiles, int lane) {
    __syncwarp();
    if (lane == 0) {
      TileCursor cursor = *cursor_;
      cursor.free_tiles += tiles;
      copy_chunks(cursor);
    }
    skip(tiles);
  }
  // Waits for all copies, if no chunk has been read yet.
  __device__ void drain() {
    const int next = cursor_->barrier;
    for (int chunks = next == 0 && cursor_->free_tiles == 0 ? a_.memory.ring_tiles : next;
         chunks > 0; --chunks) {
      wait();
      skip(0);
    }
  }

 private:
  // Goes to the first chunk of a product, or of one after it.
  __device__ void enter(TileCursor& cursor, int layer, int product) const {
    for (; layer < a_.layers_count; ++layer, product = 0)
      for (; product < kDecodeProducts; ++product) {
        const WarpShare& w = shares_[product].warps[threadIdx.x / 32];
        cursor.slice = first_slice(layer, product) + w.lane;
        cursor.end = end_slice(layer, product);
        if (w.tiles == 0 || cursor.slice >= cursor.end) continue;
        const int64_t n = w.matrix_tiles;
        cursor.layer = layer, cursor.product = product;
        cursor.lanes = shares_[product].lanes;
        cursor.tiles = w.tiles;
        cursor.from = entry(layer).tiles[w.matrix] + (cursor.slice * n + w.first_tile) * kTileBytes;
        cursor.step_bytes = cursor.lanes * n * kTileBytes;
        return;
      }
    cursor.layer = a_.layers_count;
  }

  // Copies as many chunks as fit. One lane.
  __device__ __forceinline__ void copy_chunks(TileCursor& cursor) {
    const int ring_tiles = a_.memory.ring_tiles;
    while (cursor.layer < a_.layers_count && cursor.tiles <= cursor.free_tiles) {
      const uint32_t to = barrier(cursor.barrier);
      const int first = min(cursor.tiles, ring_tiles - cursor.ring_tile);
      mbarrier_expect(to, cursor.tiles * kTileBytes);
      copy_bytes(shared_address(ring() + cursor.ring_tile * kTileBytes), cursor.from,
                 first * kTileBytes, to);
      if (first < cursor.tiles)
        copy_bytes(shared_address(ring()), cursor.from + first * kTileBytes,
                   (cursor.tiles - first) * kTileBytes, to);
      cursor.free_tiles -= cursor.tiles;
      cursor.ring_tile += cursor.tiles;
      if (cursor.ring_tile >= ring_tiles) cursor.ring_tile -= ring_tiles;
      if (++cursor.barrier == ring_tiles) cursor.barrier = 0;
      cursor.from += cursor.step_bytes;
      cursor.slice += cursor.lanes;
      if (cursor.slice >= cursor.end) enter(cursor, cursor.layer, cursor.product + 1);
    }
    *cursor_ = cursor;
  }

  // To the next chunk.
  __device__ void skip(int tiles) {
    read_ += tiles;
    if (read_ >= a_.memory.ring_tiles) read_ -= a_.memory.ring_tiles;
    if (++read_barrier_ == a_.memory.ring_tiles) {
      read_barrier_ = 0;
      parity_ ^= 1;
    }
  }

  __device__ unsigned char* ring() const {
    return smem_ + static_cast<int>(threadIdx.x / 32) * (a_.memory.ring_tiles * kTileBytes);
  }
  __device__ uint32_t barrier(int i) const {
    return shared_address(smem_ + a_.memory.barriers) +
           (static_cast<int>(threadIdx.x / 32) * a_.memory.ring_tiles + i) * 8;
  }

  const DecodeArgs& a_;
  unsigned char* smem_;
  const ClusterShare* shares_;
  TileCursor* cursor_;
  // The next chunk to read: its first tile and its barrier.
  int read_ = 0, read_barrier_ = 0, parity_ = 0;
};

// --- a block ------------------------------------------------------------------------------------

// The part of shared memory that depends on the head size alone.
template <int kD>
struct SmallMemory {
  LayerView layers[2];  // this layer and the next one
  ClusterShare shares[kDecodeProducts];
  TileCursor cursors[kDecodeWarps];
  uint64_t received[2];  // barriers: all sums are in an exchange buffer
  float sums[kDecodeWarps];
  float2 rotations[kD / 2];
  float q[kUnitHeads][kD];
  bf16 key[kD], value[kD];  // of this step's token
  float2 warp_stats[kDecodeWarps][kUnitHeads];
  // Of the ranks, in alternate units: outputs (ranks, heads, d / ranks), maxima and sums.
  float outputs[2][kUnitHeads * kD];
  float2 stats[2][kMaxRanks][kUnitHeads];
};

template <int kD>
class DecodeBlock {
 public:
  __device__ DecodeBlock(const DecodeArgs& args, unsigned char* smem)
      : a_(args),
        smem_(smem),
        small_(*reinterpret_cast<SmallMemory<kD>*>(smem + args.memory.total)),
        thread_(static_cast<int>(threadIdx.x)),
        lane_(thread_ % 32),
        warp_(thread_ / 32),
        rank_(cluster_rank()),
        stream_(args, smem, small_.shares, small_.cursors) {}

  __device__ void run() {
    load_tables();
    if (thread_ == 0) {
      for (uint64_t& barrier : small_.received) mbarrier_init(shared_address(&barrier), 1);
      mbarrier_init_fence();
    }
    __syncthreads();
    stream_.start(lane_);
    cluster_arrive();
    wait_for_previous_kernel();
    cluster_wait();  // the other blocks of the cluster run
    position_ = load_past_l1(a_.start);
    if (position_ < 0 || position_ >= a_.t_max) return fail();
    const unsigned first_flag = load_past_l1(&a_.state->first_flag);
    for (int i = thread_; i < kD / 2; i += kDecodeThreads)
      small_.rotations[i] = rotation(position_, a_.inv_freq[i], 1.0f, a_.rope_factor);
    publish_input(first_flag);

#pragma unroll 1
    for (int layer = 0; layer < a_.layers_count; ++layer) {
      const LayerView& view = small_.layers[layer % 2];
      prepare_layer(layer + 1);
      if (layer + 1 == a_.layers_count) start_next_kernel();
      const uint32_t flag = first_flag + 1 + static_cast<uint32_t>(layer);
#pragma unroll 1
      for (int product = 0; product < kDecodeProducts; ++product) {
        if (product == static_cast<int>(DecodeProduct::Output)) attend(view, flag);
        if (small_.shares[product].tiles == 0) continue;
        if (thread_ == 0) mbarrier_expect(received_barrier(), exchange_bytes(product));
        make_operand(view, layer, product, flag);
        multiply(layer, product);
        finish(layer, product, flag);
        received_phase_ ^= parity_;
        parity_ ^= 1;
      }
      cp_async_wait<0>();
      __syncthreads();  // the next layer's view is there, and nobody reads this one
    }
    end_step(first_flag);
  }

 private:
  __device__ void load_tables() {
    LayerEntry* const entries = reinterpret_cast<LayerEntry*>(smem_ + a_.memory.entries);
    for (int i = thread_; i < a_.layers_count; i += kDecodeThreads) {
      const LayerView& view = a_.layers[i];
#pragma unroll
      for (int m = 0; m < kLayerMatrices; ++m) {
        entries[i].tiles[m] = view.tiles[m];
        entries[i].master_scales[m] = *view.master_scales[m];
      }
#pragma unroll
      for (int p = 0; p < kDecodeProducts; ++p)
        entries[i].slices[p] = (view.sites[p].stored_k + kTileColumns - 1) / kTileColumns;
    }
    constexpr int kViewWords = sizeof(LayerView) / 4;
    for (int i = thread_; i < kViewWords; i += kDecodeThreads)
      reinterpret_cast<int*>(small_.layers)[i] = reinterpret_cast<const int*>(a_.layers)[i];
    constexpr int kWords = sizeof(ClusterShare) / 4;
    for (int i = thread_; i < kDecodeProducts * kWords; i += kDecodeThreads) {
      const int64_t share = int64_t{i / kWords} * a_.clusters + cluster();
      reinterpret_cast<int*>(small_.shares)[i] =
          reinterpret_cast<const int*>(a_.shares + share)[i % kWords];
    }
  }

  // Starts to copy a layer's view; its norms come to L2, a share from each block.
  __device__ __forceinline__ void prepare_layer(int layer) {
    constexpr int kCopies = sizeof(LayerView) / 16, kLine = 128 / sizeof(float);
    static_assert(sizeof(LayerView) % 16 == 0 && kCopies <= 32);
    if (warp_ != kDecodeWarps - 1 || layer >= a_.layers_count) return;
    const LayerView* const from = a_.layers + layer;
    if (lane_ < kCopies) {
      const int at = lane_ * 16;
      cp_async_16(shared_address(&small_.layers[layer % 2]) + at,
                  reinterpret_cast<const unsigned char*>(from) + at, true);
      cp_async_commit();
    }
    const int column =
        (static_cast<int>(blockIdx.x) + lane_ / 2 * static_cast<int>(gridDim.x)) * kLine;
    if (column < a_.d_model) prefetch_to_l2(from->norms[lane_ % 2] + column);
    __syncwarp();
  }

  // The tiles copied ahead are waited for: a block must not end while copies into it are in flight.
  __device__ void fail() {
    if (blockIdx.x == 0 && thread_ == 0) *a_.fault = {position_, 1, a_.t_max};
    stream_.drain();
  }

  __device__ int cluster() const { return static_cast<int>(blockIdx.x) >> a_.rank_shift; }

  // Rows of a share that a rank finishes, one a thread.
  __device__ int rank_rows(int product) const {
    return small_.shares[product].tiles * kTileRows >> a_.rank_shift;
  }

  __device__ void publish_input(uint32_t flag) {
    const int rows = rank_rows(static_cast<int>(DecodeProduct::Down));
    const int row = small_.shares[static_cast<int>(DecodeProduct::Down)].first_tile * kTileRows +
                    rank_ * rows + thread_;
    const bool mine = thread_ < rows && row < a_.d_model;
    if (mine) own_x_ = __bfloat162float(load_past_l1(a_.x + row));
    publish_pair(a_.x_words, row, own_x_, mine, flag);
  }

  // Threads of even rows publish theirs and the next row. The whole warp takes part.
  __device__ __forceinline__ void publish_pair(uint64_t* words, int row, float value, bool mine,
                                               uint32_t flag) {
    const float next = __shfl_down_sync(kAllLanes, value, 1);
    if (mine && row % 2 == 0) publish(words + row / 2, pack_bf16(value, next), flag);
  }

  // --- operands ---

  __device__ bf16* staged() const { return reinterpret_cast<bf16*>(smem_ + a_.memory.staged); }

  // Stages channels [begin, end) of the product's input, then makes the operand of this block's
  // slices.
  __device__ void make_operand(const LayerView& view, int layer, int product, uint32_t flag) {
    const DecodeSite site = view.sites[product];
    const int first = stream_.first_slice(layer, product), end = stream_.end_slice(layer, product);
    int from = first * kTileColumns, to = min(end * kTileColumns, site.stored_k);
    if (site.channels != nullptr) {
      from = 0;
      to = product == static_cast<int>(DecodeProduct::Down)     ? a_.hidden
           : product == static_cast<int>(DecodeProduct::Output) ? a_.heads * kD
                                                                : a_.d_model;
    }
    switch (static_cast<DecodeProduct>(product)) {
      case DecodeProduct::QueryKeyValue:
        stage_normalized(a_.x_words, view.norms[0], from, to, flag - 1);
        break;
      case DecodeProduct::Output:
        stage_attention(from, to, flag);
        break;
      case DecodeProduct::GateUp:
        stage_normalized(a_.middle_words, view.norms[1], from, to, flag);
        break;
      case DecodeProduct::Down:
        stage_hidden(from, to, flag);
        break;
    }
    __syncthreads();
    const int pieces = (end - first) * (kTileColumns / kPieceWidth);
    switch (a_.group) {
      case 32:
        make_pieces<32>(site, first * kTileColumns, from, pieces);
        break;
      case 64:
        make_pieces<64>(site, first * kTileColumns, from, pieces);
        break;
      default:
        make_pieces<128>(site, first * kTileColumns, from, pieces);
    }
    __syncthreads();
  }

  __device__ __forceinline__ void stage_normalized(const uint64_t* words, const float* norm,
                                                   int from, int to, uint32_t flag) {
    int line[kMaxNormLines];
    float4 weight[kMaxNormLines];
    uint2 data[kMaxNormLines];
#pragma unroll
    for (int i = 0; i < kMaxNormLines; ++i) {
      const int at = thread_ + i * kDecodeThreads;
      line[i] = at * 4 < a_.d_model ? at : -1;
      weight[i] = line[i] >= 0 ? __ldg(reinterpret_cast<const float4*>(norm) + at)
                               : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
    read_lines(data, words, line, flag);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kMaxNormLines; ++i) {
      const float v[4] = {low_value(data[i].x), high_value(data[i].x), low_value(data[i].y),
                          high_value(data[i].y)};
#pragma unroll
      for (int j = 0; j < 4; ++j) sum = fmaf(v[j], v[j], sum);
    }
    sum = warp_sum(sum);
    if (lane_ == 0) small_.sums[warp_] = sum;
    __syncthreads();
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < kDecodeWarps; ++w) total += small_.sums[w];
    const float r = 1.0f / sqrtf(total / static_cast<float>(a_.d_model) + a_.eps);
#pragma unroll
    for (int i = 0; i < kMaxNormLines; ++i) {
      const int column = line[i] * 4;
      if (line[i] < 0 || column < from || column >= to) continue;
      *reinterpret_cast<uint2*>(staged() + column - from) = {
          pack_bf16(low_value(data[i].x) * r * weight[i].x,
                    high_value(data[i].x) * r * weight[i].y),
          pack_bf16(low_value(data[i].y) * r * weight[i].z,
                    high_value(data[i].y) * r * weight[i].w)};
    }
  }

  __device__ __forceinline__ void stage_hidden(int from, int to, uint32_t flag) {
    constexpr int kLines = 2;
    for (int base = from / 4; base < to / 4; base += kLines * kDecodeThreads) {
      int line[kLines];
      uint2 data[kLines];
#pragma unroll
      for (int i = 0; i < kLines; ++i) {
        const int at = base + i * kDecodeThreads + thread_;
        line[i] = at < to / 4 ? at : -1;
      }
      read_lines(data, a_.hidden_words, line, flag);
#pragma unroll
      for (int i = 0; i < kLines; ++i)
        if (line[i] >= 0) *reinterpret_cast<uint2*>(staged() + line[i] * 4 - from) = data[i];
    }
  }

  // Merges the partial outputs of two columns a thread.
  __device__ __forceinline__ void stage_attention(int from, int to, uint32_t flag) {
    for (int base = from / 2; base < to / 2; base += kDecodeThreads) {
      const int at = base + thread_, head = at * 2 / kD, column = at * 2 % kD;
      int line[2 * kMaxPartials];
      uint2 data[2 * kMaxPartials];
#pragma unroll
      for (int j = 0; j < kMaxPartials; ++j) {
        const int words = (head * a_.partials + j) * (kD + 2);
        const bool has = at < to / 2 && j < a_.partials;
        line[j] = has ? (words + column) / 2 : -1;
        line[kMaxPartials + j] = has ? (words + kD) / 2 : -1;
      }
      read_lines(data, a_.attention_words, line, flag);
      if (at >= to / 2) continue;
      float most = kNoScore, sum = 0.0f, low = 0.0f, high = 0.0f;
#pragma unroll
      for (int j = 0; j < kMaxPartials; ++j)
        if (j < a_.partials) most = fmaxf(most, __uint_as_float(data[kMaxPartials + j].x));
#pragma unroll
      for (int j = 0; j < kMaxPartials; ++j) {
        if (j >= a_.partials) continue;
        const float weight = exp2_approx(__uint_as_float(data[kMaxPartials + j].x) - most);
        sum = fmaf(weight, __uint_as_float(data[kMaxPartials + j].y), sum);
        low = fmaf(weight, __uint_as_float(data[j].x), low);
        high = fmaf(weight, __uint_as_float(data[j].y), high);
      }
      *reinterpret_cast<uint32_t*>(staged() + at * 2 - from) = pack_bf16(low / sum, high / sum);
    }
  }

  // Integers of the block's positions from `begin` on, eight a lane; the staged row starts with
  // channel `from`.
  template <int kGroup>
  __device__ __forceinline__ void make_pieces(const DecodeSite& site, int begin, int from,
                                              int pieces) {
    unsigned char* const operand = smem_ + a_.memory.operand;
    for (int base = warp_ * 32; base < pieces; base += kDecodeThreads) {
      const int piece = base + lane_, position = begin + piece * kPieceWidth;
      uint4 packed = {0, 0, 0, 0};
      if (piece < pieces && position < site.stored_k)
        packed = site.channels == nullptr
                     ? *reinterpret_cast<const uint4*>(staged() + position - from)
                     : gather(site, position);
      uint32_t pair[4] = {packed.x, packed.y, packed.z, packed.w};
      const int first = begin + base * kPieceWidth;  // of the warp
      if (first < site.rotated_end && first + 32 * kPieceWidth > site.rotated_begin) {
        float x[kPieceWidth];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          x[2 * i] = low_value(pair[i]);
          x[2 * i + 1] = high_value(pair[i]);
        }
        rotate<kGroup>(x);
        if (position >= site.rotated_begin && position < site.rotated_end) {
#pragma unroll
          for (int i = 0; i < 4; ++i) pair[i] = pack_bf16(x[2 * i], x[2 * i + 1]);
        }
      }

      uint32_t most = __vmaxu2(__vmaxu2(pair[0] & 0x7FFF7FFFu, pair[1] & 0x7FFF7FFFu),
                               __vmaxu2(pair[2] & 0x7FFF7FFFu, pair[3] & 0x7FFF7FFFu));
      most = __vmaxu2(most, __shfl_xor_sync(kAllLanes, most, 1));
      most = __vmaxu2(most, __shfl_xor_sync(kAllLanes, most, 2));
      const IntegerUnit integers(max(most & 0xFFFFu, most >> 16));
      uint32_t halves[4], sum = 0;  // v + 128 of two positions each
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t low = integers.shifted(low_value(pair[i]));
        const uint32_t high = integers.shifted(high_value(pair[i]));
        sum += low + high - 2 * IntegerUnit::kShift;
        halves[i] = __byte_perm(low, high, 0x5410);
      }
      sum += __shfl_xor_sync(kAllLanes, sum, 1);
      sum += __shfl_xor_sync(kAllLanes, sum, 2);
      // Word t of register r has positions P + 16 r of quant/packed_tiles.h: those below 8 of an even
      // lane and the others of the odd one behind it. The even lane stores words 0 and 1.
      const int odd = lane_ % 2;
      uint32_t other[2];
#pragma unroll
      for (int i = 0; i < 2; ++i)
        other[i] = __shfl_xor_sync(kAllLanes, odd ? halves[i] : halves[2 + i], 1);
      if (piece >= pieces) continue;

      unsigned char* const slice = operand + piece / 16 * kOperandBytes;
      const int group = piece / 4 % 4;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t below = odd ? other[i] : halves[i], above = odd ? halves[2 + i] : other[i];
        uint32_t* const to = reinterpret_cast<uint32_t*>(slice + group * 64 + (2 * odd + i) * 8) +
                             lane_ % 4 / 2;
        to[0] = __byte_perm(below, above, 0x7351);
        to[8] = __byte_perm(below, above, 0x6240) ^ 0x80808080u;
      }
      if (lane_ % 4 == 0)
        *reinterpret_cast<uint2*>(slice + 256 + group * 8) = {
            sum, __float_as_uint(integers.unit * __uint_as_float((127 - 2 * group) << 23))};
    }
  }

  __device__ __forceinline__ uint4 gather(const DecodeSite& site, int position) const {
    const int4* const quads = reinterpret_cast<const int4*>(site.channels + position);
    const int4 low = __ldg(quads), high = __ldg(quads + 1);
    const int channel[kPieceWidth] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    float x[kPieceWidth];
#pragma unroll
    for (int i = 0; i < kPieceWidth; ++i) {
      x[i] = channel[i] < 0 ? 0.0f : __bfloat162float(staged()[channel[i]]);
      if (position + i >= site.pairs_begin && position + i < site.pairs_end)
        x[i] *= site.pair_factor;
    }
    return {pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]),
            pack_bf16(x[6], x[7])};
  }

  // --- products ---

  __device__ float* exchange() const {
    return reinterpret_cast<float*>(smem_ + a_.memory.exchange) +
           parity_ * a_.memory.exchange_floats;
  }
  __device__ uint32_t received_barrier() const { return shared_address(&small_.received[parity_]); }
  // That a block gets of a product.
  __device__ int exchange_bytes(int product) const {
    return a_.ranks * small_.shares[product].lanes * kinds_of(product) * rank_rows(product) * 4;
  }
  static __device__ int kinds_of(int product) {
    return product == static_cast<int>(DecodeProduct::GateUp) ? 2 : 1;
  }

  __device__ void multiply(int layer, int product) {
    static_assert(kPartTiles == 8);
    switch (small_.shares[product].warps[warp_].tiles) {
      case 1:
        return multiply_part<1>(layer, product);
      case 2:
        return multiply_part<2>(layer, product);
      case 3:
        return multiply_part<3>(layer, product);
      case 4:
        return multiply_part<4>(layer, product);
      case 5:
        return multiply_part<5>(layer, product);
      case 6:
        return multiply_part<6>(layer, product);
      case 7:
        return multiply_part<7>(layer, product);
      case 8:
        return multiply_part<8>(layer, product);
      default:
        return;
    }
  }

  template <int kTiles>
  __device__ __forceinline__ void multiply_part(int layer, int product) {
    const ClusterShare& share = small_.shares[product];
    const WarpShare& own = share.warps[warp_];
    const int first = stream_.first_slice(layer, product), end = stream_.end_slice(layer, product);
    const int lanes = share.lanes;
    float sum[kTiles][2] = {};
#pragma unroll 1
    for (int slice = own.lane; slice < end - first; slice += lanes) {
      const unsigned char* const operand = smem_ + a_.memory.operand + slice * kOperandBytes;
      const uint2 columns = *reinterpret_cast<const uint2*>(operand + lane_ * 8);
      const uint2 scale = *reinterpret_cast<const uint2*>(operand + 256 + lane_ % 4 * 8);
      SliceOperand<false> x;
      x.set_columns(columns.x, columns.y, lane_);
      x.sum[0] = static_cast<int>(scale.x);
      x.unit[0] = __uint_as_float(scale.y);
      stream_.wait();
#pragma unroll
      for (int i = 0; i < kTiles; ++i) multiply_tile<false>(sum[i], stream_.tile(i), x, lane_);
      stream_.release(kTiles, lane_);
    }

    // exchange: (ranks, lanes, kinds, rows of the receiver)
    const int rows = rank_rows(product), kinds = kinds_of(product);
    const int kind = kinds == 2 && own.matrix == 5 ? 1 : 0;
    float* const to = exchange() + ((rank_ * lanes + own.lane) * kinds + kind) * rows;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        sum[i][half] += __shfl_xor_sync(kAllLanes, sum[i][half], 1);
        sum[i][half] += __shfl_xor_sync(kAllLanes, sum[i][half], 2);
      }
      // Lane t of a quad sends row r + 8 t.
      const int t = lane_ % 4;
      const int row = (own.slot + i) * kTileRows + lane_ / 4 + 8 * t;
      int receiver = 0;
#pragma unroll
      for (int r = 1; r < kMaxRanks; ++r) receiver += row >= r * rows && r < a_.ranks ? 1 : 0;
      if (t < 2)
        send_to_block(shared_address(to + row - receiver * rows), received_barrier(), receiver,
                      t == 0 ? sum[i][0] : sum[i][1]);
    }
  }

  // The sum of this thread's row.
  __device__ __forceinline__ float received(int product, int kind) const {
    const int rows = rank_rows(product), kinds = kinds_of(product);
    const float* const from = exchange() + kind * rows + thread_;
    const int parts = a_.ranks * small_.shares[product].lanes;
    float total = 0.0f;
#pragma unroll 8
    for (int i = 0; i < parts; ++i) total += from[i * kinds * rows];
    return total;
  }

  __device__ void finish(int layer, int product, uint32_t flag) {
    const LayerEntry& entry = reinterpret_cast<const LayerEntry*>(smem_ + a_.memory.entries)[layer];
    const int rows = rank_rows(product);
    if (warp_ * 32 >= rows) return;
    for (int i = 0; !mbarrier_try_wait(received_barrier(), received_phase_); ++i)
      if (i >= kMaxReads) give_up("sums", flag);
    const bool has = thread_ < rows;
    const int row =
        small_.shares[product].first_tile * kTileRows + rank_ * rows + thread_;  // of the product
    const float total = has ? received(product, 0) : 0.0f;
    switch (static_cast<DecodeProduct>(product)) {
      case DecodeProduct::QueryKeyValue: {
        const int q = a_.heads * kD, kv = a_.kv_heads * kD;
        const int matrix = row < q ? 0 : row < q + kv ? 1 : 2;
        publish_pair(a_.qkv_words, row, total * entry.master_scales[matrix], has, flag);
        return;
      }
      case DecodeProduct::GateUp: {
        const float gate = rounded(total * entry.master_scales[4]);
        const float up = has ? rounded(received(product, 1) * entry.master_scales[5]) : 0.0f;
        publish_pair(a_.hidden_words, row, swiglu_of(gate, up), has && row < a_.hidden, flag);
        return;
      }
      default: {
        const bool last = product == static_cast<int>(DecodeProduct::Down);
        const bool mine = has && row < a_.d_model;
        if (mine) own_x_ = rounded(total * entry.master_scales[last ? 6 : 3] + own_x_);
        publish_pair(last ? a_.x_words : a_.middle_words, row, own_x_, mine, flag);
        if (mine && last && layer + 1 == a_.layers_count) a_.x[row] = __float2bfloat16_rn(own_x_);
      }
    }
  }

  // --- attention ---

  static constexpr int kLanes = kD / 8;      // of a key
  static constexpr int kKeys = 32 / kLanes;  // of a load of a warp
  static constexpr int kStep = kKeyLoads * kKeys;

  struct KeyRange {
    int begin, end;
  };
  struct LoadedKeys {
    uint4 k[kKeyLoads], v[kKeyLoads];
  };

  __device__ __forceinline__ int key_of(int base, int load) const {
    return base + load * kKeys + lane_ / kLanes;
  }

  // The key at this step's position is not in memory.
  __device__ __forceinline__ void load_keys(LoadedKeys& keys, const LayerView& view, int kv_head,
                                            int base, const KeyRange& range) const {
#pragma unroll
    for (int i = 0; i < kKeyLoads; ++i) {
      const int key = key_of(base, i);
      keys.k[i] = keys.v[i] = {0, 0, 0, 0};
      if (key >= range.end || key == position_) continue;
      const int64_t at = (int64_t{key} * a_.kv_heads + kv_head) * kD + lane_ % kLanes * 8;
      keys.k[i] = load_past_l1(reinterpret_cast<const uint4*>(view.k + at));
      keys.v[i] = load_past_l1(reinterpret_cast<const uint4*>(view.v + at));
    }
  }

  // This step's queries of the unit, rotated, to shared memory; with `current` key and value too,
  // which also go to the cache.
  __device__ __forceinline__ void stage_queries(const LayerView& view, int head0, int heads,
                                                int kv_head, bool current, bool appends,
                                                uint32_t flag) {
    constexpr int kQuads = kD / 8;  // of half a head
    const int row = thread_ / kQuads, i = thread_ % kQuads * 4;
    const int rows = heads + (current ? 2 : 0);
    if (warp_ * 32 >= rows * kQuads) return;
    const bool is_k = row == heads, is_v = row == heads + 1;
    const int head = is_v   ? a_.heads + a_.kv_heads + kv_head
                     : is_k ? a_.heads + kv_head
                            : head0 + row;
    const int first = (head * kD + i) / 4;
    const bool has = row < rows;
    const int line[2] = {has ? first : -1, has ? first + kD / 8 : -1};
    uint2 data[2];
    read_lines(data, a_.qkv_words, line, flag);
    if (!has) return;
    float low[4] = {low_value(data[0].x), high_value(data[0].x), low_value(data[0].y),
                    high_value(data[0].y)};
    float high[4] = {low_value(data[1].x), high_value(data[1].x), low_value(data[1].y),
                     high_value(data[1].y)};
    if (!is_v) {
#pragma unroll
      for (int j = 0; j < 4; ++j) cuda::rotate(low[j], high[j], small_.rotations[i + j]);
    }
    if (row < heads) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        small_.q[row][i + j] = rounded(low[j]);
        small_.q[row][i + kD / 2 + j] = rounded(high[j]);
      }
      return;
    }
    const uint2 packed[2] = {{pack_bf16(low[0], low[1]), pack_bf16(low[2], low[3])},
                             {pack_bf16(high[0], high[1]), pack_bf16(high[2], high[3])}};
    bf16* const to = is_v ? small_.value : small_.key;
    bf16* const cache =
        (is_v ? view.v : view.k) + (int64_t{position_} * a_.kv_heads + kv_head) * kD;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int column = i + half * (kD / 2);
      *reinterpret_cast<uint2*>(to + column) = packed[half];
      if (appends) *reinterpret_cast<uint2*>(cache + column) = packed[half];
    }
  }

  struct RunningHead {
    float most = kNoScore, sum = 0.0f, out[8] = {};
  };

  __device__ __forceinline__ void add_keys(RunningHead (&heads)[kUnitHeads], int count,
                                           LoadedKeys& keys, int base, const KeyRange& range,
                                           float scale_log2) const {
    const int column = lane_ % kLanes * 8;
#pragma unroll
    for (int i = 0; i < kKeyLoads; ++i) {
      const int key = key_of(base, i);
      if (key == position_ && key < range.end) {
        keys.k[i] = *reinterpret_cast<const uint4*>(small_.key + column);
        keys.v[i] = *reinterpret_cast<const uint4*>(small_.value + column);
      }
    }
#pragma unroll
    for (int h = 0; h < kUnitHeads; ++h) {
      if (h >= count) continue;
      const float4 q0 = *reinterpret_cast<const float4*>(small_.q[h] + column);
      const float4 q1 = *reinterpret_cast<const float4*>(small_.q[h] + column + 4);
      float score[kKeyLoads], most = heads[h].most;
#pragma unroll
      for (int i = 0; i < kKeyLoads; ++i) {
        const uint4& k = keys.k[i];
        float s = low_value(k.x) * q0.x;
        s = fmaf(high_value(k.x), q0.y, s);
        s = fmaf(low_value(k.y), q0.z, s);
        s = fmaf(high_value(k.y), q0.w, s);
        s = fmaf(low_value(k.z), q1.x, s);
        s = fmaf(high_value(k.z), q1.y, s);
        s = fmaf(low_value(k.w), q1.z, s);
        s = fmaf(high_value(k.w), q1.w, s);
#pragma unroll
        for (int lanes = 1; lanes < kLanes; lanes *= 2) s += __shfl_xor_sync(kAllLanes, s, lanes);
        score[i] = s * scale_log2;
        if (key_of(base, i) < range.end) most = fmaxf(most, score[i]);
      }
      const float keep = exp2_approx(heads[h].most - most);
      heads[h].most = most;
      heads[h].sum *= keep;
#pragma unroll
      for (int j = 0; j < 8; ++j) heads[h].out[j] *= keep;
#pragma unroll
      for (int i = 0; i < kKeyLoads; ++i) {
        const float p = key_of(base, i) < range.end ? exp2_approx(score[i] - most) : 0.0f;
        const uint32_t v[4] = {keys.v[i].x, keys.v[i].y, keys.v[i].z, keys.v[i].w};
        heads[h].sum += p;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          heads[h].out[2 * j] = fmaf(p, low_value(v[j]), heads[h].out[2 * j]);
          heads[h].out[2 * j + 1] = fmaf(p, high_value(v[j]), heads[h].out[2 * j + 1]);
        }
      }
    }
  }

  // Merges a warp's groups of lanes and leaves the result for the block.
  __device__ __forceinline__ void leave_warp(RunningHead (&heads)[kUnitHeads], int count,
                                             float* merged) {
#pragma unroll
    for (int h = 0; h < kUnitHeads; ++h) {
      if (h >= count) continue;
      RunningHead& head = heads[h];
      float most = head.most;
#pragma unroll
      for (int lanes = kLanes; lanes < 32; lanes *= 2)
        most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, lanes));
      const float weight = exp2_approx(head.most - most);
      head.sum *= weight;
#pragma unroll
      for (int j = 0; j < 8; ++j) head.out[j] *= weight;
#pragma unroll
      for (int lanes = kLanes; lanes < 32; lanes *= 2) {
        head.sum += __shfl_xor_sync(kAllLanes, head.sum, lanes);
#pragma unroll
        for (int j = 0; j < 8; ++j) head.out[j] += __shfl_xor_sync(kAllLanes, head.out[j], lanes);
      }
      if (lane_ < kLanes) {
        float4* const to =
            reinterpret_cast<float4*>(merged + (warp_ * kUnitHeads + h) * kD + lane_ * 8);
        to[0] = make_float4(head.out[0], head.out[1], head.out[2], head.out[3]);
        to[1] = make_float4(head.out[4], head.out[5], head.out[6], head.out[7]);
      }
      if (lane_ == 0) small_.warp_stats[warp_][h] = make_float2(most, head.sum);
    }
  }

  __device__ void attend(const LayerView& view, uint32_t flag) {
    const int group = a_.heads / a_.kv_heads, chunks = (group + kUnitHeads - 1) / kUnitHeads;
    if (cluster() >= a_.units * a_.partials) return;
#pragma unroll 1
    for (int item = cluster(); item < a_.units * a_.partials; item += a_.clusters) {
      const int unit = item % a_.units, partial = item / a_.units;
      const int kv_head = unit / chunks, chunk = unit % chunks;
      const int head0 = kv_head * group + chunk * kUnitHeads;
      attend_unit(view, head0, min(kUnitHeads, group - chunk * kUnitHeads), kv_head, partial,
                  chunk == 0, flag);
      unit_parity_ ^= 1;
    }
  }

  __device__ __forceinline__ void attend_unit(const LayerView& view, int head0, int heads,
                                              int kv_head, int partial, bool appends,
                                              uint32_t flag) {
    const int first_key = max(0, position_ + 1 - a_.window), visible = position_ + 1 - first_key;
    const int pieces = a_.partials * a_.ranks, piece = partial * a_.ranks + rank_;
    const KeyRange range{first_key + static_cast<int>(int64_t{visible} * piece / pieces),
                         first_key + static_cast<int>(int64_t{visible} * (piece + 1) / pieces)};
    const float scale_log2 = score_scale(kD) * kLog2E;

    LoadedKeys keys;
    int base = range.begin + warp_ * kStep;
    load_keys(keys, view, kv_head, base, range);
    // The last piece has this step's key.
    stage_queries(view, head0, heads, kv_head, piece + 1 == pieces, appends, flag);
    __syncthreads();  // also: no warp still reads the exchange, in whose memory `merged` is
    RunningHead running[kUnitHeads];
#pragma unroll 1
    while (base < range.end) {
      LoadedKeys next;
      load_keys(next, view, kv_head, base + kDecodeWarps * kStep, range);
      add_keys(running, heads, keys, base, range, scale_log2);
      keys = next;
      base += kDecodeWarps * kStep;
    }
    float* const merged = reinterpret_cast<float*>(smem_ + a_.memory.operand);
    leave_warp(running, heads, merged);
    __syncthreads();

    // A thread adds the warps' results of columns and sends them to the rank that merges them.
    const int width = kD >> a_.rank_shift;
    float* const outputs = small_.outputs[unit_parity_];
    float2(*const stats)[kUnitHeads] = small_.stats[unit_parity_];
    for (int i = thread_; i < heads * kD; i += kDecodeThreads) {
      const int h = i / kD, column = i % kD;
      float most = kNoScore, sum = 0.0f, out = 0.0f;
#pragma unroll
      for (int w = 0; w < kDecodeWarps; ++w) most = fmaxf(most, small_.warp_stats[w][h].x);
#pragma unroll
      for (int w = 0; w < kDecodeWarps; ++w) {
        const float2 of_warp = small_.warp_stats[w][h];
        const float weight = exp2_approx(of_warp.x - most);
        sum = fmaf(weight, of_warp.y, sum);
        out = fmaf(weight, merged[(w * kUnitHeads + h) * kD + column], out);
      }
      const int receiver = column / width;
      store_to_block(shared_address(outputs + (rank_ * kUnitHeads + h) * width + column % width),
                     receiver, out);
      if (column % width != 0) continue;
      store_to_block(shared_address(&stats[rank_][h].x), receiver, most);
      store_to_block(shared_address(&stats[rank_][h].y), receiver, sum);
    }
    __syncwarp();
    cluster_arrive();
    cluster_wait();
    for (int i = thread_; i < heads * width; i += kDecodeThreads) {
      const int h = i / width, column = i % width;
      float most = kNoScore, sum = 0.0f, out = 0.0f;
#pragma unroll 1
      for (int r = 0; r < a_.ranks; ++r) most = fmaxf(most, stats[r][h].x);
#pragma unroll 1
      for (int r = 0; r < a_.ranks; ++r) {
        const float weight = exp2_approx(stats[r][h].x - most);
        sum = fmaf(weight, stats[r][h].y, sum);
        out = fmaf(weight, outputs[(r * kUnitHeads + h) * width + column], out);
      }
      uint64_t* const words =
          a_.attention_words + int64_t{(head0 + h) * a_.partials + partial} * (kD + 2);
      publish(words + rank_ * width + column, __float_as_uint(out), flag);
      if (rank_ != 0 || column != 0) continue;
      publish(words + kD, __float_as_uint(most), flag);
      publish(words + kD + 1, __float_as_uint(sum), flag);
    }
  }

  // The last block to end prepares the next step.
  __device__ void end_step(unsigned first_flag) {
    __syncthreads();
    if (thread_ != 0 || atomicAdd(&a_.state->done, 1u) + 1 != gridDim.x) return;
    a_.state->done = 0;
    a_.state->first_flag = first_flag + static_cast<unsigned>(a_.layers_count) + 1;
  }

  const DecodeArgs& a_;
  unsigned char* smem_;
  SmallMemory<kD>& small_;
  int thread_, lane_, warp_, rank_;
  TileStream stream_;
  int position_ = 0;
  int parity_ = 0;          // of the exchange buffer
  int received_phase_ = 0;  // of its barrier
  int unit_parity_ = 0;     // of attention's results
  float own_x_ = 0.0f;      // x of the row that this thread finishes
};

template <int kD>
__global__ void __launch_bounds__(kDecodeThreads, 1)
    decode_layers_kernel(const __grid_constant__ DecodeArgs args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  DecodeBlock<kD>(args, reinterpret_cast<unsigned char*>(dynamic_smem())).run();
#endif
}

// --- host ---------------------------------------------------------------------------------------

using Kernel = void (*)(DecodeArgs);

struct KernelOfSize {
  Kernel kernel;
  int64_t small_bytes;
};
KernelOfSize kernel_of(int64_t head_dim) {
  if (head_dim == 64) return {decode_layers_kernel<64>, sizeof(SmallMemory<64>)};
  return {decode_layers_kernel<128>, sizeof(SmallMemory<128>)};
}

// How many clusters of so many blocks are on the GPU at once.
int clusters_at_once(const KernelOfSize& kernel, int ranks, int64_t smem_bytes) {
  const void* const function = reinterpret_cast<const void*>(kernel.kernel);
  BBB_CUDA(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                static_cast<int>(smem_bytes)));
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(ranks), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(ranks));
  config.blockDim = dim3(kDecodeThreads);
  config.dynamicSmemBytes = static_cast<size_t>(smem_bytes);
  config.attrs = &cluster;
  config.numAttrs = 1;
  int clusters = 0;
  BBB_CUDA(cudaOccupancyMaxActiveClusters(&clusters, function, &config));
  return clusters;
}

// The plan with the largest clusters that leave few multiprocessors idle.
std::optional<DecodePlan> plan_for(const DecodeShape& shape, const cudaDeviceProp& properties) {
  if (shape.head_dim != 64 && shape.head_dim != 128) return {};
  const KernelOfSize kernel = kernel_of(shape.head_dim);
  const int64_t smem_bytes = static_cast<int64_t>(properties.sharedMemPerBlockOptin);
  for (int ranks = kMaxRanks; ranks > 0; ranks /= 2) {
    const int clusters = clusters_at_once(kernel, ranks, smem_bytes);
    if (clusters * ranks * 10 < properties.multiProcessorCount * 9) continue;
    if (auto plan = plan_decode(shape, clusters, ranks, smem_bytes - kernel.small_bytes))
      return plan;
  }
  return {};
}

// A buffer of `count` words with flags that no step has.
Tensor make_words(CudaBackend& backend, int64_t count) {
  return backend.zeros({count, int64_t{sizeof(uint64_t)}}, DType::U8);
}
uint64_t* words_of(const Tensor& words) { return static_cast<uint64_t*>(words.raw()); }

template <typename T>
Tensor upload_values(CudaBackend& backend, const std::vector<T>& values) {
  const Tensor out = backend.empty({static_cast<int64_t>(values.size() * sizeof(T))}, DType::U8);
  backend.upload(out, values.data());
  return out;
}

DecodeSite site_of(const engine::DecodeLayer& layer, int product) {
  const auto& operand = layer.operands[static_cast<size_t>(product)];
  const quant::LinearFormat& format =
      layer.linears[static_cast<size_t>(quant::first_matrix(product))].format;
  if (!operand) return {nullptr, static_cast<int>(format.stored_k()), 0, 0, 0, 0, 1.0f};
  const quant::OperandView& view = operand->view;
  return {view.channels,
          static_cast<int>(view.stored_k),
          static_cast<int>(view.rotated_begin),
          static_cast<int>(view.rotated_end),
          static_cast<int>(view.outliers),
          static_cast<int>(view.pairs_end),
          view.pair_factor};
}

class CudaLayerDecoder final : public engine::LayerDecoder {
 public:
  CudaLayerDecoder(CudaBackend& backend, const engine::DecodeStack& stack, const DecodePlan& plan,
                   CacheFault* fault)
      : backend_(backend), stack_(stack), kernel_(kernel_of(plan.shape.head_dim)) {
    std::vector<LayerView> views;
    for (const engine::DecodeLayer& layer : stack_.layers) {
      LayerView& view = views.emplace_back();
      for (size_t i = 0; i < kLayerMatrices; ++i) {
        const PackedWeight& w = layer.linears[i];
        view.tiles[i] = w.layout.data<uint8_t>();
        view.master_scales[i] = w[quant::StoredPart::MasterScale].data<float>();
      }
      view.norms[0] = layer.input_norm.data<float>();
      view.norms[1] = layer.post_norm.data<float>();
      view.k = bf16_of(layer.k_cache);
      view.v = bf16_of(layer.v_cache);
      for (int p = 0; p < kDecodeProducts; ++p) view.sites[p] = site_of(layer, p);
    }
    std::vector<ClusterShare> shares;
    for (const auto& product : plan.shares)
      shares.insert(shares.end(), product.begin(), product.end());
    const DecodeShape& shape = plan.shape;
    const int64_t d = shape.head_dim;
    const auto hold = [&](Tensor t) {
      memory_.push_back(t);
      return t;
    };
    // Flags start at 1: a word of zeros is one that nobody has written.
    args_.layers = reinterpret_cast<const LayerView*>(hold(upload_values(backend, views)).raw());
    args_.shares =
        reinterpret_cast<const ClusterShare*>(hold(upload_values(backend, shares)).raw());
    args_.state =
        static_cast<StepState*>(hold(upload_values(backend, std::vector<StepState>{{1, 0}})).raw());
    args_.x_words = words_of(hold(make_words(backend, shape.d_model / 2)));
    args_.middle_words = words_of(hold(make_words(backend, shape.d_model / 2)));
    args_.qkv_words =
        words_of(hold(make_words(backend, (shape.heads + 2 * shape.kv_heads) * d / 2)));
    args_.hidden_words = words_of(hold(make_words(backend, shape.hidden / 2)));
    args_.attention_words =
        words_of(hold(make_words(backend, shape.heads * plan.partials * (d + 2))));
    args_.start = stack_.start.data<int32_t>();
    args_.inv_freq = stack_.inv_freq.data<float>();
    args_.fault = fault;
    args_.memory = plan.memory;
    args_.layers_count = checked_int(shape.layers);
    args_.clusters = plan.clusters;
    args_.ranks = plan.ranks;
    args_.rank_shift = std::countr_zero(static_cast<unsigned>(plan.ranks));
    args_.d_model = checked_int(shape.d_model);
    args_.hidden = checked_int(shape.hidden);
    args_.heads = checked_int(shape.heads);
    args_.kv_heads = checked_int(shape.kv_heads);
    args_.group = stack_.layers[0].linears[0].format.weight.group;
    args_.units = plan.units;
    args_.partials = plan.partials;
    args_.t_max = checked_int(stack_.layers[0].k_cache.dim(1));
    args_.window = window_of(stack_.attention.window);
    args_.eps = static_cast<float>(stack_.eps);
    args_.rope_factor = static_cast<float>(stack_.attention.rope_factor);
  }

  void run(const Tensor& x) override {
    args_.x = bf16_of(x);
    launch(backend_.stream(),
           {dim3(static_cast<unsigned>(args_.clusters * args_.ranks)), dim3(kDecodeThreads),
            args_.memory.total + kernel_.small_bytes, true, static_cast<unsigned>(args_.ranks)},
           kernel_.kernel, args_);
  }

 private:
  CudaBackend& backend_;
  engine::DecodeStack stack_;  // keeps the layers' memory
  KernelOfSize kernel_;
  DecodeArgs args_{};
  std::vector<Tensor> memory_;  // that args_ points to
};

}  // namespace

std::unique_ptr<engine::LayerDecoder> CudaBackend::do_layer_decoder(
    const engine::DecodeStack& stack) {
  const engine::DecodeLayer& first = stack.layers[0];
  DecodeShape shape{};
  shape.d_model = first.input_norm.numel();
  shape.hidden = first.linears[4].format.n;
  shape.head_dim = first.k_cache.dim(3);
  shape.kv_heads = first.k_cache.dim(2);
  shape.heads = first.linears[0].format.n / shape.head_dim;
  shape.layers = static_cast<int64_t>(stack.layers.size());
  const int group = first.linears[0].format.weight.group;
  for (const engine::DecodeLayer& layer : stack.layers) {
    for (const PackedWeight& w : layer.linears)
      if (!takes_tiles(w.format) || w.format.weight.group != group) return nullptr;
    for (int p = 0; p < kDecodeProducts; ++p) {
      const auto& operand = layer.operands[static_cast<size_t>(p)];
      if (operand && operand->view.grid.bits != 16) return nullptr;
      const DecodeSite site = site_of(layer, p);
      int64_t& stored_k = shape.stored_k[static_cast<size_t>(p)];
      stored_k = std::max<int64_t>(stored_k, site.stored_k);
      shape.gathers[static_cast<size_t>(p)] |= site.channels != nullptr;
    }
    BBB_ASSERT(aligned(layer.k_cache, layer.v_cache, layer.input_norm, layer.post_norm));
  }
  const std::optional<DecodePlan> plan = plan_for(shape, properties_);
  if (!plan) return nullptr;
  return std::make_unique<CudaLayerDecoder>(*this, stack, *plan, cache_fault_.get());
}

}  // namespace bbb::cuda
