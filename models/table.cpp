#include "models/table.h"

#include "engine/cpu/thread_pool.h"
#include "quant/host.h"

namespace bbb::models {

using quant::StoredPart;

static constexpr int64_t kQuantizeRows = 256;  // one thread's work

const engine::Tensor& Table::tensor() const {
  BBB_ASSERT(packed == nullptr);
  return dense.value();
}

int64_t Table::bytes() const { return packed ? packed->format.bytes() : dense.value().bytes(); }

LinearResult quantize_table(const std::vector<float>& values, const quant::LinearFormat& format) {
  const int64_t n = format.n, k = format.k;
  BBB_ASSERT(static_cast<int64_t>(values.size()) == n * k);
  const quant::WeightGrid& grid = format.weight;
  const int64_t groups = format.groups();
  std::vector<uint8_t> e(static_cast<size_t>(n * groups)), z(e.size()), codes(values.size());
  std::vector<float> ranges(static_cast<size_t>(n));  // the maximum group range of each row
  engine::ThreadPool threads(0);
  threads.parallel_for(n, kQuantizeRows, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      ranges[static_cast<size_t>(row)] = quant::host::group_range_max<float>(
          values.data(), nullptr, {row, row + 1}, k, grid.group);
  });
  const float master_scale =
      quant::master_scale_of(quant::raw_scale(quant::host::largest(ranges.data(), n), grid.bits));
  threads.parallel_for(n * groups, kQuantizeRows * groups, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      const float* const w = values.data() + g * grid.group;
      quant::Range<float> range;
      for (int i = 0; i < grid.group; ++i) range.include(w[i]);
      const quant::GroupParams p = quant::group_params(range, master_scale, grid.bits);
      e[static_cast<size_t>(g)] = p.e;
      z[static_cast<size_t>(g)] = p.z;
      const float step = quant::step_of(p.e, master_scale);
      for (int i = 0; i < grid.group; ++i)
        codes[static_cast<size_t>(g * grid.group + i)] =
            static_cast<uint8_t>(quant::code_of(w[i], step, p.z, grid.bits));
    }
  });
  LinearResult result;
  result.format = format;
  result.part(StoredPart::Codes) = pack_rows(codes, n, grid.bits);
  result.part(StoredPart::Scales) = std::move(e);
  result.part(StoredPart::Zeros) = pack_rows(z, n, grid.bits);
  const auto* const s = reinterpret_cast<const uint8_t*>(&master_scale);
  result.part(StoredPart::MasterScale).assign(s, s + sizeof master_scale);
  return result;
}

}  // namespace bbb::models
