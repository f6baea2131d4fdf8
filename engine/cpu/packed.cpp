// Products with packed weights, a range of rows per task.
//
//     CpuBackend<float>   panels of 16 rows, integer products (quant/host_panels.h)
//     CpuBackend<double>  the file's bytes, exact loops (quant/host.h): the oracle
//
// Rows of a packed table are unpacked by id, times S.
#include <algorithm>
#include <vector>

#include "engine/cpu/cpu_backend.h"
#include "engine/cpu/row_ops.h"
#include "quant/host_panels.h"

namespace bbb::engine {

namespace host = quant::host;

namespace {

constexpr int64_t kLeastWeights = 1 << 14;  // of one task; less is not worth waking a thread
constexpr int64_t kSplitElements = 8192;    // of x that one task splits: 4 us

host::PanelView panel_view(const PackedWeight& w) {
  return {w.layout.data<uint8_t>(), w[quant::StoredPart::MasterScale].data<float>(), w.format.n,
          w.format.stored_k(), w.format.weight};
}

// Panels of one task, of `count` panels of rows of k codes. One task a thread: a product of a small
// model takes a few microseconds, and fetching another task a good part of one.
int64_t panel_grain(int64_t count, int64_t k, int threads) {
  const int64_t panel = host::kPanelRows * k;
  return std::max((count + threads - 1) / threads, (kLeastWeights + panel - 1) / panel);
}

}  // namespace

template <typename T>
int64_t CpuBackend<T>::repacked_bytes(const quant::LinearFormat& format) const {
  return kPanels ? host::panels_bytes(format.n, format.stored_k(), format.weight)
                 : quant::joined_parts(format).bytes;
}

template <typename T>
void CpuBackend<T>::do_repack(const Tensor& layout, const PackedWeight& file) {
  if constexpr (kPanels)
    parallel_for(panel_view(file).count(), 1, [&](int64_t begin, int64_t end) {
      host::make_panels(layout.data<uint8_t>(), file.view(), {begin, end});
    });
  else
    join_parts(*this, layout, file);
}

template <typename T>
void CpuBackend<T>::do_unpack(const Tensor& wq, const PackedWeight& w) {
  if constexpr (kPanels) {
    const host::PanelView panels = panel_view(w);
    parallel_for(panels.count(), panel_grain(panels.count(), panels.k, threads()),
                 [&](int64_t begin, int64_t end) {
                   host::unpack_panels(data(wq), panels, {begin, end});
                 });
  } else {
    const quant::PackedView packed = joined_view(w);
    parallel_for(packed.n, row_grain(packed.k), [&](int64_t begin, int64_t end) {
      host::unpack(data(wq), packed, {begin, end});
    });
  }
}

template <typename T>
void CpuBackend<T>::do_embed_packed(const Tensor& out, const Tensor& ids, const PackedWeight& w) {
  const int64_t width = out.dim(1), vocabulary = w.format.n;
  const int32_t* const id = ids.data<int32_t>();
  const T master_scale = T(w[quant::StoredPart::MasterScale].data<float>()[0]);
  for (int64_t m = 0; m < out.dim(0); ++m)
    BBB_CHECK(id[m] >= 0 && id[m] < vocabulary, "embed_packed: id ", id[m], " is not in [0, ",
              vocabulary, ")");
  parallel_for(out.dim(0), row_grain(width), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      T* const to = data(out) + m * width;
      if constexpr (kPanels)
        host::unpack_panel_row(to, panel_view(w), id[m]);
      else
        host::unpack_row(to, joined_view(w), id[m]);
      for (int64_t i = 0; i < width; ++i) to[i] *= master_scale;
    }
  });
}

template <typename T>
template <typename Activations>
void CpuBackend<T>::packed_products(const PackedProducts& products, const Activations& x,
                                    int64_t m) {
  if constexpr (kPanels) {
    // All products take the same rows, which are split once, and share one loop.
    static thread_local host::SplitRows rows;
    const quant::LinearFormat& format = products[0].weight.format;
    rows.resize(m, format.stored_k(), format.weight.group);
    parallel_for(m * rows.groups, kSplitElements / format.weight.group,
                 [&, to = &rows](int64_t begin, int64_t end) {
                   host::split_rows(*to, x, {begin, end});
                 });
    int64_t count = 0;
    for (const PackedProduct& product : products) count += panel_view(product.weight).count();
    parallel_for(count, panel_grain(count, rows.k, threads()),
                 [&, from = &rows](int64_t begin, int64_t end) {
                   for (const PackedProduct& product : products) {
                     const host::PanelView w = panel_view(product.weight);
                     if (begin < w.count() && end > 0)
                       host::panel_gemv(data(product.y), *from, w, data(product.addend),
                                        {std::max<int64_t>(begin, 0), std::min(end, w.count())},
                                        host::fastest_set());
                     begin -= w.count();
                     end -= w.count();
                   }
                 });
  } else {
    for (const PackedProduct& product : products) {
      const quant::PackedView packed = joined_view(product.weight);
      parallel_for(packed.n, row_grain(packed.k), [&](int64_t begin, int64_t end) {
        host::packed_gemv(data(product.y), x, packed, data(product.addend), {begin, end}, m);
      });
    }
  }
}

// Products of `rows` rows x of K channels, or of their operand.
template <typename T>
void CpuBackend<T>::operand_products(const PackedProducts& products, const T* x, int64_t rows,
                                     const OperandSpec* spec) {
  if (spec == nullptr) return packed_products(products, x, rows);
  static thread_local std::vector<T> buffer;
  static thread_local std::vector<uint8_t> bytes;
  const int64_t k = spec->view.stored_k, groups = k / spec->view.group;
  host::QuantizedRows<T> codes;
  T* operand = nullptr;
  if (spec->quantizes()) {
    codes.codes = scratch(bytes, rows * (k + groups));
    codes.zeros = codes.codes + rows * k;
    codes.scales = scratch(buffer, rows * groups);
  } else {
    operand = scratch(buffer, rows * k);
  }
  parallel_for(rows, row_grain(k), [&](int64_t begin, int64_t end) {
    host::operand(operand, static_cast<uint8_t*>(nullptr), codes, x, {begin, end}, spec->view,
                  spec->rounding);
  });
  if (spec->quantizes())
    packed_products(products, codes, rows);
  else
    packed_products(products, static_cast<const T*>(operand), rows);
}

template <typename T>
void CpuBackend<T>::do_packed_gemv(const PackedProducts& products, const Tensor& x,
                                   const OperandSpec* spec) {
  operand_products(products, data(x), x.dim(0), spec);
}

template <typename T>
void CpuBackend<T>::do_packed_gemv_normed(const PackedProducts& products, const Tensor& x,
                                          const Tensor& w, double eps, const OperandSpec* spec) {
  const int64_t rows = x.dim(0), d = x.dim(1);
  static thread_local std::vector<T> buffer;
  T* const normed = scratch(buffer, rows * d);
  parallel_for(rows, row_grain(d), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m)
      rms_norm_row(normed + m * d, data(x) + m * d, data(w), d, static_cast<T>(eps));
  });
  operand_products(products, normed, rows, spec);
}

template <typename T>
void CpuBackend<T>::do_packed_gemv_gated(const PackedProducts& products, const Tensor& gate,
                                         const Tensor& up, const OperandSpec* spec) {
  static thread_local std::vector<T> buffer;
  T* const h = scratch(buffer, gate.numel());
  parallel_for(gate.numel(), kElementGrain, [&](int64_t begin, int64_t end) {
    swiglu_run(h + begin, data(gate) + begin, data(up) + begin, end - begin);
  });
  operand_products(products, h, gate.dim(0), spec);
}

template <typename T>
void CpuBackend<T>::do_quantized_gemv(const PackedProducts& products, const OperandRows& x) {
  packed_products(products, quantized_rows<T>(x), x.codes.dim(0));
}

template int64_t CpuBackend<float>::repacked_bytes(const quant::LinearFormat&) const;
template int64_t CpuBackend<double>::repacked_bytes(const quant::LinearFormat&) const;
BBB_CPU_INSTANTIATE(repack);
BBB_CPU_INSTANTIATE(unpack);
BBB_CPU_INSTANTIATE(embed_packed);
BBB_CPU_INSTANTIATE(packed_gemv);
BBB_CPU_INSTANTIATE(packed_gemv_normed);
BBB_CPU_INSTANTIATE(packed_gemv_gated);
BBB_CPU_INSTANTIATE(quantized_gemv);

}  // namespace bbb::engine
