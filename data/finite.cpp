#include "data/finite.h"

#include <algorithm>
#include <atomic>

#include "data/files.h"
#include "engine/cpu/thread_pool.h"
#include "quant/check.h"

namespace bbb::data {
namespace {

constexpr int64_t kPieceBytes = int64_t{1} << 20;  // one thread's work at a time

struct Piece {
  const RawWeight* weight;
  int64_t begin, end;  // blocks
};

std::vector<Piece> pieces_of(const std::vector<RawWeight>& weights) {
  std::vector<Piece> pieces;
  for (const RawWeight& w : weights) {
    const int64_t blocks = engine::numel_of(w.shape) / w.type.elements;
    const int64_t step = std::max<int64_t>(1, kPieceBytes / w.type.bytes);
    for (int64_t begin = 0; begin < blocks; begin += step)
      pieces.push_back({&w, begin, std::min(blocks, begin + step)});
  }
  return pieces;
}

// "[3, 17]": the row-major position of an element.
std::string position(int64_t element, const engine::Shape& shape) {
  std::string text;
  for (size_t i = shape.size(); i-- > 0; element /= shape[i])
    text = cat(element % shape[i], text.empty() ? "" : ", ", text);
  return "[" + text + "]";
}

[[noreturn]] void report(const Piece& piece, const std::string& path) {
  const RawWeight& w = *piece.weight;
  std::vector<float> values(static_cast<size_t>(w.type.elements));
  for (int64_t block = piece.begin; block < piece.end; ++block) {
    w.type.expand(values.data(), w.data + block * w.type.bytes, 1);
    const auto bad = std::find_if_not(values.begin(), values.end(), is_weight);
    if (bad == values.end()) continue;
    const int64_t element = block * w.type.elements + (bad - values.begin());
    throw Error(cat(path, ": ", printable(w.name), position(element, w.shape), " is ",
                    std::isnan(*bad) ? "nan" : cat(*bad),
                    std::isfinite(*bad) ? ", beyond BF16's range" : ""));
  }
  BBB_ASSERT(false);
}

}  // namespace

void check_finite(const std::vector<RawWeight>& weights, const std::string& path) {
  const std::vector<Piece> pieces = pieces_of(weights);
  const int64_t count = static_cast<int64_t>(pieces.size());
  std::atomic<int64_t> first{count};  // the first piece with a bad weight; `count`: none
  const auto scan = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end && i < first; ++i) {
      const Piece& piece = pieces[static_cast<size_t>(i)];
      const BlockType& type = piece.weight->type;
      if (type.finite(piece.weight->data + piece.begin * type.bytes, piece.end - piece.begin))
        continue;
      int64_t known = first;
      while (i < known && !first.compare_exchange_weak(known, i)) {
      }
    }
  };
  int64_t bytes = 0;
  for (const Piece& p : pieces) bytes += (p.end - p.begin) * p.weight->type.bytes;
  engine::ThreadPool(engine::threads_for(bytes, kPieceBytes)).parallel_for(count, 1, scan);
  if (first < count) report(pieces[static_cast<size_t>(first.load())], path);
}

}  // namespace bbb::data
