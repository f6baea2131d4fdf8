// Algorithms that the library has but does not suggest: its kernels by tile, cluster and variant.
//
// A product is as many tiles as cover D, worked on in waves of one a multiprocessor. It takes least
// where few of them stand idle in the last wave, and where an operand that was fetched meets many
// others: in a large tile, and in a cluster of two tiles that share their longer side's operand.
// Fetching is energy, which on a large product is time (gemm_tuning.cpp). The library suggests few
// shapes of tiles; for each product this takes the best by estimate of those below, each in the
// variants that such tiles ran best in. What an estimate is worth shows in the timing that follows.
#ifdef BBB_HAS_CUDA
#include <algorithm>
#include <iterator>

#include "cuda/cuda_backend.h"
#include "cuda/gemm.h"
#include "cuda/vector.h"

namespace bbb::cuda {
namespace {

constexpr size_t kTiles = 7;      // with the best estimates: these are looked at
constexpr int kFirstVariant = 4;  // on an H200 no earlier one was best for a large tile

// Rows and columns of D, column-major.
struct Tile {
  int m, n;
  cublasLtMatmulTile_t id;
};

#define BBB_TILE(m, n) \
  Tile { m, n, CUBLASLT_MATMUL_TILE_##m##x##n }
// Two warpgroups of 128 threads hold a tile's sums in registers, which bounds its area; one side is
// a whole number of their 64 rows, the other any multiple of 8.
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

// Tiles of a cluster, down D's rows and along its columns.
struct Cluster {
  int m, n;
  cublasLtClusterShape_t id;
};
Cluster cluster_of(const Tile& tile) {
  return tile.m <= tile.n ? Cluster{2, 1, CUBLASLT_CLUSTER_SHAPE_2x1x1}
                          : Cluster{1, 2, CUBLASLT_CLUSTER_SHAPE_1x2x1};
}

// Proportional to the energy of all tiles, as fitted to 115 tiles for eleven products on H200s
// (4096 to 16384 rows and columns) with a residue of 1.4 %: an idle multiprocessor takes 0.4 of
// what a working one does, and a multiply-add's share of the fetching falls with the tile's sides.
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

// The greatest number of a kernel family's variants; 0 where it says nothing.
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
  // The library's check sees no addresses.
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

  // Of the first suggestion's family, whose other attributes stay as they are.
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
