// Algorithms that the library has but does not suggest: its kernels by tile, cluster and variant.
//
// Tiles cover D and run in waves of one tile per multiprocessor. A product is fast if few
// multiprocessors idle in the last wave, and if every fetched operand is used often: in a large
// tile, and in a cluster of two tiles that share the operand of their longer side. Fetching costs
// energy, which on a large product costs time (gemm_tuning.cpp). The library suggests few tile
// shapes. Of the shapes below, this file proposes those with the best estimates, each in the
// variants that ran best for such tiles. The timing that follows decides.
#ifdef BBB_HAS_CUDA
#include <algorithm>
#include <iterator>

#include "cuda/cuda_backend.h"
#include "cuda/gemm.h"
#include "cuda/vector.h"

namespace bbb::cuda {
namespace {

constexpr size_t kTiles = 7;      // proposed: those with the best estimates
constexpr int kFirstVariant = 4;  // on an H200 no earlier one was best for a large tile

// Rows and columns of D, column-major.
struct Tile {
  int m, n;
  cublasLtMatmulTile_t id;
};

#define BBB_TILE(m, n) \
  Tile { m, n, CUBLASLT_MATMUL_TILE_##m##x##n }
// Two warpgroups of 128 threads hold a tile's sums in registers, which limits its area. One side is
// a multiple of their 64 rows, the other a multiple of 8.
constexpr Tile kShapes[] = {
    BBB_TILE(128, 128), BBB_TILE(128, 136), BBB_TILE(128, 144), BBB_TILE(128, 152),
    BBB_TILE(128, 160), BBB_TILE(128, 168), BBB_TILE(128, 176), BBB_TILE(128, 184),
    BBB_TILE(128, 192), BBB_TILE(128, 200), BBB_TILE(128, 208), BBB_TILE(128, 216),
    BBB_TILE(128, 224), BBB_TILE(128, 232), BBB_TILE(128, 240), BBB_TILE(128, 248),
    BBB_TILE(128, 256), BBB_TILE(128, 272), BBB_TILE(128, 288), BBB_TILE(128, 304),
    BBB_TILE(128, 320), BBB_TILE(128, 336), BBB_TILE(192, 96),  BBB_TILE(192, 112),
    BBB_TILE(192, 128), BBB_TILE(192, 144), BBB_TILE(192, 160), BBB_TILE(192, 176),
    BBB_TILE(192, 192), BBB_TILE(192, 208), BBB_TILE(192, 224), BBB_TILE(256, 64),
    BBB_TILE(256, 72),  BBB_TILE(256, 80),  BBB_TILE(256, 88),  BBB_TILE(256, 96),
    BBB_TILE(256, 104), BBB_TILE(256, 112), BBB_TILE(256, 120), BBB_TILE(256, 128),
    BBB_TILE(256, 136), BBB_TILE(256, 144), BBB_TILE(256, 152), BBB_TILE(256, 160),
    BBB_TILE(256, 168), BBB_TILE(320, 64),  BBB_TILE(320, 80),  BBB_TILE(320, 96),
    BBB_TILE(320, 112), BBB_TILE(320, 128), BBB_TILE(136, 128), BBB_TILE(144, 128),
    BBB_TILE(152, 128), BBB_TILE(160, 128), BBB_TILE(168, 128), BBB_TILE(176, 128),
    BBB_TILE(184, 128), BBB_TILE(200, 128), BBB_TILE(208, 128), BBB_TILE(216, 128),
    BBB_TILE(224, 128), BBB_TILE(232, 128), BBB_TILE(240, 128), BBB_TILE(248, 128),
    BBB_TILE(272, 128), BBB_TILE(288, 128), BBB_TILE(304, 128), BBB_TILE(336, 128),
    BBB_TILE(96, 192),  BBB_TILE(112, 192), BBB_TILE(128, 192), BBB_TILE(144, 192),
    BBB_TILE(160, 192), BBB_TILE(176, 192), BBB_TILE(208, 192), BBB_TILE(224, 192),
    BBB_TILE(64, 256),  BBB_TILE(80, 256),  BBB_TILE(96, 256),  BBB_TILE(112, 256),
    BBB_TILE(136, 256), BBB_TILE(144, 256), BBB_TILE(152, 256), BBB_TILE(160, 256),
    BBB_TILE(168, 256), BBB_TILE(96, 320),  BBB_TILE(112, 320)};
#undef BBB_TILE

// Tiles of a cluster, along the rows and the columns of D.
struct Cluster {
  int m, n;
  cublasLtClusterShape_t id;
};
Cluster cluster_of(const Tile& tile) {
  return tile.m <= tile.n ? Cluster{2, 1, CUBLASLT_CLUSTER_SHAPE_2x1x1}
                          : Cluster{1, 2, CUBLASLT_CLUSTER_SHAPE_1x2x1};
}

// Proportional to the energy of all tiles. Fitted on H200s to 115 tiles for eleven products (4096
// to 16384 rows and columns), with a residual of 1.4 %. An idle multiprocessor takes 0.4 of the
// energy of a busy one; the fetches per multiply-add fall with the sides of the tile.
double estimate(const Tile& tile, const GemmShape& shape, int processors) {
  const Cluster cluster = cluster_of(tile);
  const auto covering = [](int64_t size, int tile_size, int together) {
    const int64_t step = int64_t{tile_size} * together;
    return (size + step - 1) / step * together;
  };
  const int64_t tiles = covering(shape.m, tile.m, cluster.m) * covering(shape.n, tile.n, cluster.n);
  const int64_t places = (tiles + processors - 1) / processors * processors;
  constexpr double kIdle = 0.4, kFetch = 8;
  return ((1 - kIdle) * static_cast<double>(tiles) + kIdle * static_cast<double>(places)) *
         (tile.m * tile.n) * (1 + kFetch / tile.m + kFetch / tile.n);
}

template <typename T>
bool set(GemmAlgorithm& algorithm, cublasLtMatmulAlgoConfigAttributes_t attribute, T value) {
  return cublasLtMatmulAlgoConfigSetAttribute(&algorithm, attribute, &value, sizeof value) ==
         CUBLAS_STATUS_SUCCESS;
}

// The largest variant number of a kernel family; 0 if the library reports none.
int last_variant(const GemmAlgorithm& algorithm) {
  int last = 0;
  size_t written = 0;
  if (cublasLtMatmulAlgoCapGetAttribute(&algorithm, CUBLASLT_ALGO_CAP_CUSTOM_OPTION_MAX, &last,
                                        sizeof last, &written) != CUBLAS_STATUS_SUCCESS)
    return 0;
  return last;
}

}  // namespace

std::vector<GemmAlgorithm> GemmPlanner::explored(const Plan& plan, const GemmShape& shape) const {
  // The library's check does not know the alignment, so only fully aligned products are searched.
  if (std::min({shape.align_a, shape.align_b, shape.align_c, shape.align_d}) < kWideBytes)
    return {};
  int device = 0, processors = 0;
  BBB_CUDA(cudaGetDevice(&device));
  BBB_CUDA(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  std::vector<Tile> tiles(std::begin(kShapes), std::end(kShapes));
  const auto better = [&](const Tile& a, const Tile& b) {
    return estimate(a, shape, processors) < estimate(b, shape, processors);
  };
  std::partial_sort(tiles.begin(), tiles.begin() + kTiles, tiles.end(), better);
  tiles.resize(kTiles);

  // Vary the first suggestion, keeping its kernel family and its other attributes.
  const int variants = last_variant(plan.algorithm);
  std::vector<GemmAlgorithm> found;
  for (const Tile& tile : tiles)
    for (int variant = variants > kFirstVariant ? kFirstVariant : 0; variant <= variants;
         ++variant) {
      GemmAlgorithm algorithm = plan.algorithm;
      cublasLtMatmulHeuristicResult_t needs{};
      if (set(algorithm, CUBLASLT_ALGO_CONFIG_TILE_ID, static_cast<uint32_t>(tile.id)) &&
          set(algorithm, CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID,
              static_cast<uint16_t>(cluster_of(tile).id)) &&
          set(algorithm, CUBLASLT_ALGO_CONFIG_CUSTOM_OPTION, static_cast<uint32_t>(variant)) &&
          runs(plan, algorithm, needs))
        found.push_back(algorithm);
    }
  return found;
}

}  // namespace bbb::cuda
#endif
