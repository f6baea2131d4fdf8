// The public method of every op. It checks shapes, dtypes and device; nothing below checks again.
//
// A violation throws one line: the op, the tensor, what was expected and what it is. Without a
// violation a check only compares integers, because decoding runs every op for every token.
#include "engine/backend.h"

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <limits>

#include "engine/cpu/thread_pool.h"
#include "quant/grid.h"
#include "quant/moments.h"
#include "quant/pack.h"

namespace bbb::engine {
namespace {

using Dims = std::initializer_list<int64_t>;

bool has_shape(const Tensor& t, Dims dims) {
  if (static_cast<size_t>(t.rank()) != dims.size()) return false;
  int i = 0;
  for (const int64_t d : dims)
    if (t.shape()[static_cast<size_t>(i++)] != d) return false;
  return true;
}

std::string describe(const Tensor& t) {
  return t.defined() ? cat(name_of(t.dtype()), " ", to_string(t.shape())) : "undefined";
}

// The checks of one op.
class Op {
 public:
  Op(const Backend& backend, const char* name) : backend_(backend), name_(name) {}

  // Defined and on this backend's device.
  void here(const char* what, const Tensor& t) const {
    BBB_CHECK(t.defined(), name_, ": ", what, " is undefined");
    BBB_CHECK(t.device() == backend_.device(), name_, ": ", what, " ", describe(t),
              " is on the other device");
  }

  void is(const char* what, const Tensor& t, DType dtype, Dims dims) const {
    here(what, t);
    BBB_CHECK(t.dtype() == dtype && has_shape(t, dims), name_, ": ", what, " must be ",
              name_of(dtype), " ", to_string(Shape(dims)), ", got ", describe(t));
  }

  void is_or_undefined(const char* what, const Tensor& t, DType dtype, Dims dims) const {
    if (t.defined()) is(what, t, dtype, dims);
  }

  // A batch with an order, whose rows have the length and dtype of those of `t`.
  void batch(const char* what, const Rows& rows, const char* other, const Tensor& t) const {
    dtype(what, rows.src, t.dtype());
    rank("order", rows.order, 1);
    dtype("order", rows.order, DType::I32);
    is("cursor", rows.cursor, DType::I32, {1});
    BBB_CHECK(t.rank() > 0 && rows.src.rank() > 0 && t.dim(0) > 0 && rows.src.dim(0) > 0 &&
                  t.numel() / t.dim(0) == rows.src.numel() / rows.src.dim(0),
              name_, ": rows of ", other, " ", describe(t), " and ", what, " ", describe(rows.src),
              " differ");
  }

  // act, or real for an op that also takes full precision.
  void is_act_or_real(const char* what, const Tensor& t, Dims dims) const {
    here(what, t);
    BBB_CHECK((t.dtype() == backend_.act() || t.dtype() == backend_.real()) && has_shape(t, dims),
              name_, ": ", what, " must be ", name_of(backend_.act()), " or ",
              name_of(backend_.real()), " ", to_string(Shape(dims)), ", got ", describe(t));
  }

  // The dtype to expect of a constant that may be BF16 on every backend.
  DType bf16_or_act(const Tensor& t) const {
    return t.dtype() == DType::BF16 ? DType::BF16 : backend_.act();
  }

  // A parameter's gradient: it must be real if the op adds to it.
  void gradient(const char* what, const Tensor& t, Dims dims, Write mode) const {
    is_act_or_real(what, t, dims);
    BBB_CHECK(mode == Write::Overwrite || t.dtype() == backend_.real(), name_, ": ", what,
              " must be ", name_of(backend_.real()), " to be added to, got ", describe(t));
  }

  void like(const char* what, const Tensor& t, DType dtype, const Shape& shape) const {
    here(what, t);
    BBB_CHECK(t.dtype() == dtype && t.shape() == shape, name_, ": ", what, " must be ",
              name_of(dtype), " ", to_string(shape), ", got ", describe(t));
  }

  void rank(const char* what, const Tensor& t, int rank) const {
    here(what, t);
    BBB_CHECK(t.rank() == rank, name_, ": ", what, " must have ", rank, " dimensions, got ",
              describe(t));
  }

  void dtype(const char* what, const Tensor& t, DType dtype) const {
    here(what, t);
    BBB_CHECK(t.dtype() == dtype, name_, ": ", what, " must be ", name_of(dtype), ", got ",
              describe(t));
  }

  void same_numel(const char* what, const Tensor& t, const Tensor& other) const {
    BBB_CHECK(t.numel() == other.numel(), name_, ": ", what, " has ", to_string(t.shape()),
              ", which is not as many elements as ", to_string(other.shape()));
  }

  // The inputs of a loss between two models: logits (M, C) of both, targets (M).
  void two_models(const Tensor& logits, const Tensor& teacher, const Tensor& targets) const {
    rank("logits", logits, 2);
    is_act_or_real("logits", logits, {logits.dim(0), logits.dim(1)});
    like("teacher", teacher, logits.dtype(), logits.shape());
    is("targets", targets, DType::I32, {logits.dim(0)});
  }
  // The teacher's share of a mixture. The device computes with floats.
  void beta(double value) const {
    const float rounded = static_cast<float>(value);
    BBB_CHECK(rounded > 0 && rounded < 1, name_, ": beta must be between 0 and 1, got ", value);
  }

  // A grid that fits rows of K features.
  void grid(const WeightGrid& spec, int64_t k) const {
    BBB_CHECK(spec.bits == 2 || spec.bits == 3 || spec.bits == 4 || spec.bits == 8, name_,
              ": bits must be 2, 3, 4 or 8, got ", spec.bits);
    group(spec.group);
    BBB_CHECK(k % spec.group == 0, name_, ": ", k, " features are not whole groups of ",
              spec.group);
  }

  // Masters w (N, K), and the grid of their groups.
  void gridded(const Tensor& w, const Tensor& e, const Tensor& z, const Tensor& s,
               const WeightGrid& spec) const {
    rank("w", w, 2);
    const int64_t n = w.dim(0), k = w.dim(1);
    grid(spec, k);
    dtype("w", w, backend_.real());
    is("e", e, DType::U8, {n, k / spec.group});
    is("z", z, DType::U8, {n, k / spec.group});
    is("s", s, backend_.real(), {1});
  }

  // A flat buffer with one element for each of `count` masters.
  void flat(const char* what, const Tensor& t, int64_t count) const {
    is(what, t, backend_.real(), {count});
    whole_units(what, count);
  }
  void flat_gradient(const char* what, const Tensor& t, int64_t count) const {
    gradient(what, t, {count}, Write::Overwrite);
    whole_units(what, count);
  }
  void whole_units(const char* what, int64_t count) const {
    BBB_CHECK(count % quant::kTileAlign == 0, name_, ": ", what, " has ", count,
              " elements, no multiple of ", quant::kTileAlign);
  }

  void group(int group) const {
    BBB_CHECK(group == 32 || group == 64 || group == 128, name_,
              ": group must be 32, 64 or 128, got ", group);
  }
  void tiles(const Tensor& tiles) const {
    rank("tiles", tiles, 2);
    is("tiles", tiles, DType::I32, {tiles.dim(0), 4});
  }
  void table(const Tensor& tiles, const Tensor& slots) const {
    this->tiles(tiles);
    rank("slots", slots, 2);
    is("slots", slots, backend_.real(), {slots.dim(0), 3});
  }
  // The quantizer of `count` masters.
  void quantizer(const QuantizedWeights& q, int64_t count) const {
    group(q.group);
    tiles(q.tiles);
    rank("bits", q.bits, 1);
    dtype("bits", q.bits, DType::I32);
    const int64_t slots = q.bits.dim(0);
    is("max_range", q.max_range, backend_.real(), {slots});
    is("s", q.s, backend_.real(), {slots});
    is("prequantized", q.prequantized, backend_.real(), {slots});
    is("clipped", q.clipped, DType::U8, {count / 8});
    is("wq", q.wq, backend_.act(), {count});
    is("e", q.e, DType::U8, {count / q.group});
    is("z", q.z, DType::U8, {count / q.group});
    is_or_undefined("ratios", q.ratios, DType::U8, {count / q.group});
  }

  // A weight behind LC (N, K).
  void lc(const LcWeight& from) const {
    rank("latent", from.latent, 2);
    const int64_t n = from.latent.dim(0), k = from.latent.dim(1);
    is("latent", from.latent, backend_.real(), {n, k});
    lc_input(from.u, from.map, k);
    lc_side("v", from.v, n);
  }
  void lc_input(const Tensor& u, const Tensor& map, int64_t k) const {
    lc_side("u", u, k);
    is("map", map, backend_.real(), {quant::kLcVector, quant::kLcVector + 1});
  }
  void lc_side(const char* what, const Tensor& t, int64_t features) const {
    BBB_CHECK(quant::lc_block(features) > 0, name_, ": ", features, " features of ", what,
              " are no multiple of ", quant::kLcLeastBlock);
    is(what, t, backend_.real(), {features});
  }

  // The outputs of an operand of `rows` rows.
  void operand(const OperandRows& out, int64_t rows, const OperandSpec& spec) const {
    const quant::OperandView& view = spec.view;
    const int64_t groups = view.stored_k / view.group;
    layout(spec);
    is_or_undefined("out", out.x, backend_.act(), {rows, view.stored_k});
    is_or_undefined("clipped", out.clipped, DType::U8, {rows, view.stored_k / 8});
    if (!out.codes.defined()) return here("out", out.x);
    BBB_CHECK(view.grid.bits < 16, name_, ": an operand that is not quantized has no codes");
    is("codes", out.codes, DType::U8, {rows, view.stored_k});
    is("zero_points", out.zeros, DType::U8, {rows, groups});
    is("group_scales", out.scales, backend_.real(), {rows, groups});
  }
  void layout(const OperandSpec& spec) const {
    const quant::OperandView& view = spec.view;
    group(view.group);
    if (!spec.channels.defined())
      BBB_CHECK(view.stored_k >= view.k && view.stored_k % view.group == 0, name_, ": ", view.k,
                " channels in ", view.stored_k, " positions of groups of ", view.group);
    is_or_undefined("channels", spec.channels, DType::I32, {view.stored_k});
    is_or_undefined("positions", spec.positions, DType::I32, {view.k});
    is_or_undefined("offsets", spec.offsets, DType::U8, {2 * view.stored_k});
  }

  // K of the rows of which products with weights of this format make their operand.
  int64_t row_channels(const quant::LinearFormat& format, const OperandSpec* operand) const {
    if (operand == nullptr) return format.stored_k();
    layout(*operand);
    const quant::OperandView& view = operand->view;
    BBB_CHECK(!operand->quantizes() || operand->rounding == Rounding::Nearest, name_,
              ": codes of an operand are rounded to nearest");
    BBB_CHECK(view.stored_k == format.stored_k() && view.group == format.weight.group, name_,
              ": an operand of ", view.stored_k, " positions in groups of ", view.group,
              ", weights of ", format.stored_k(), " in groups of ", format.weight.group);
    return view.k;
  }

  // q (B, T, H, d) against k and v (B, S, K, d).
  void heads(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionSpec& spec) const {
    const DType act = backend_.act();
    rank("q", q, 4);
    rank("k", k, 4);
    dtype("q", q, act);
    query_groups(q.dim(2), k.dim(2), spec);
    is("k", k, act, {q.dim(0), k.dim(1), k.dim(2), q.dim(3)});
    like("v", v, act, k.shape());
    is_or_undefined("first_key", spec.first_key, DType::I32, {q.dim(0), q.dim(1)});
  }
  void query_groups(int64_t heads, int64_t kv_heads, const AttentionSpec& spec) const {
    BBB_CHECK(kv_heads > 0 && heads % kv_heads == 0, name_, ": ", heads,
              " query heads are not a multiple of ", kv_heads, " kv-heads");
    BBB_CHECK(spec.window >= 0, name_, ": window must not be negative, got ", spec.window);
  }

  // Keys and values of `batch` sequences, of any number of positions.
  void caches(const Tensor& k, const Tensor& v, int64_t batch, int64_t kv_heads, int64_t d,
              KvFormat format) const {
    rank("k_cache", k, 4);
    if (format.quantized()) {
      BBB_CHECK(format.bits == 8 || format.bits == 4, name_, ": a cache of ", format.bits, " bits");
      BBB_CHECK(d % KvFormat::kGroup == 0, name_, ": a quantized cache takes head sizes that are ",
                "multiples of ", KvFormat::kGroup, ", not ", d);
      BBB_CHECK(k.dim(1) % KvFormat::kTokenUnit == 0, name_, ": a quantized cache of ", k.dim(1),
                " positions, not a multiple of ", KvFormat::kTokenUnit);
    }
    is("k_cache", k, format.quantized() ? DType::U8 : backend_.act(),
       {batch, k.dim(1), kv_heads, format.quantized() ? format.head_bytes(d) : d});
    like("v_cache", v, k.dtype(), k.shape());
  }

  // inv_freq holds a frequency for each pair (i, i + d/2) of x (B, T, H, d).
  void pairs(const Tensor& x, const Tensor& inv_freq) const {
    BBB_CHECK(x.dim(3) % 2 == 0, name_, ": ", to_string(x.shape()), " has an odd head dimension");
    is("inv_freq", inv_freq, DType::F32, {x.dim(3) / 2});
  }

  // Of a product that reads packed codes directly.
  void few_rows(const char* what, const Tensor& x, int64_t most) const {
    BBB_CHECK(x.dim(0) <= most, name_, ": ", what, " ", to_string(x.shape()), " has more than ",
              most, " rows");
  }

  // A weight in the file's layout.
  void stored(const PackedWeight& w) const {
    grid({w.format.code_bits(), w.format.weight.group}, w.format.stored_k());
    BBB_CHECK(!w.repacked(), name_, ": the weight is repacked already");
    BBB_CHECK(!w.format.is_symmetric(), name_,
              ": a symmetric weight, see LinearFormat::multiplied");
    for (const quant::StoredTensor& stored : w.format.loaded_tensors())
      like(stored.suffix, w[stored.part], dtype_of(stored), stored.shape);
  }
  // A weight in the backend's layout.
  void repacked(const PackedWeight& w) const {
    BBB_CHECK(w.repacked(), name_, ": the weight is in the file's layout, call repack first");
    is("layout", w.layout, DType::U8, {backend_.repacked_bytes(w.format)});
  }
  // Products of the same m rows. Returns the format of the first weight: all have its K and group.
  const quant::LinearFormat& products(const PackedProducts& products, int64_t m) const {
    BBB_CHECK(!products.empty(), name_, ": no product");
    const quant::LinearFormat& first = products[0].weight.format;
    for (const PackedProduct& product : products) {
      const quant::LinearFormat& format = product.weight.format;
      BBB_CHECK(format.stored_k() == first.stored_k() && format.weight.group == first.weight.group,
                name_, ": weights of ", format.stored_k(), " columns in groups of ",
                format.weight.group, " and of ", first.stored_k(), " in groups of ",
                first.weight.group);
      repacked(product.weight);
      is_act_or_real("y", product.y, {m, format.n});
      is_or_undefined("addend", product.addend, backend_.act(), {m, format.n});
    }
    return first;
  }

  // What append_kv reads and writes.
  void new_keys(const Tensor& k_cache, const Tensor& v_cache, const Tensor& k, const Tensor& v,
                const Tensor& start, const Tensor& q, const Tensor& inv_freq,
                KvFormat format) const {
    rank("k", k, 4);
    dtype("k", k, backend_.act());
    like("v", v, backend_.act(), k.shape());
    caches(k_cache, v_cache, k.dim(0), k.dim(2), k.dim(3), format);
    is("start", start, DType::I32, {k.dim(0)});
    BBB_CHECK(q.defined() == inv_freq.defined(), name_, ": q without inv_freq, or the reverse");
    if (!q.defined()) return;
    rank("q", q, 4);
    is("q", q, backend_.act(), {k.dim(0), k.dim(1), q.dim(2), k.dim(3)});
    pairs(q, inv_freq);
  }
  // What attention_cached reads and writes.
  void queries(const Tensor& o, const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
               const Tensor& start, const AttentionSpec& spec, KvFormat format) const {
    rank("q", q, 4);
    rank("k_cache", k_cache, 4);
    dtype("q", q, backend_.act());
    query_groups(q.dim(2), k_cache.dim(2), spec);
    caches(k_cache, v_cache, q.dim(0), k_cache.dim(2), q.dim(3), format);
    like("o", o, backend_.act(), q.shape());
    is("start", start, DType::I32, {q.dim(0)});
    BBB_CHECK(!spec.first_key.defined(), name_, ": takes no first_key");
  }

 private:
  const Backend& backend_;
  const char* name_;
};

// The sizes of an attention_cached, for its scratch.
Shape cached_sizes(const Tensor& q, const Tensor& k_cache, KvFormat format) {
  return {q.dim(0), q.dim(1), q.dim(2), q.dim(3), k_cache.dim(1), k_cache.dim(2), format.bits};
}

}  // namespace

DType dtype_of(const quant::StoredTensor& tensor) {
  return tensor.dtype == quant::FileDType::F32   ? DType::F32
         : tensor.dtype == quant::FileDType::I32 ? DType::I32
                                                 : DType::U8;
}

// The parts of a symmetric linear as products read them (LinearFormat::multiplied).
struct MultipliedParts {
  std::vector<uint8_t> codes, zeros;
  float master_scale;
};

static MultipliedParts multiplied_parts(const quant::LinearFormat& format, const uint8_t* codes,
                                        float master_scale) {
  const int64_t rows = format.n, k = format.stored_k(), groups = format.groups();
  const int from = format.weight.bits, to = format.multiplied().weight.bits;
  const int64_t from_bytes = quant::code_row_bytes(k, from),
                to_bytes = quant::code_row_bytes(k, to),
                zero_bytes = quant::zero_row_bytes(k, format.weight.group, to);
  MultipliedParts out{std::vector<uint8_t>(static_cast<size_t>(rows * to_bytes)),
                      std::vector<uint8_t>(static_cast<size_t>(rows * zero_bytes)),
                      master_scale / 2};
  const std::vector<uint8_t> zeros(static_cast<size_t>(groups),
                                   static_cast<uint8_t>(quant::max_code(from)));
  constexpr int64_t kRows = 64;  // of one thread's work
  ThreadPool(0).parallel_for(rows, kRows, [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> row(static_cast<size_t>(k));
    for (int64_t n = begin; n < end; ++n) {
      quant::unpack_codes(row.data(), codes + n * from_bytes, k, from);
      for (uint8_t& code : row) code = static_cast<uint8_t>(2 * code);
      quant::pack_codes(out.codes.data() + n * to_bytes, row.data(), k, to);
      quant::pack_codes(out.zeros.data() + n * zero_bytes, zeros.data(), groups, to);
    }
  });
  return out;
}

PackedWeight upload_packed(Backend& backend, const quant::LinearFormat& format,
                           const std::function<const void*(const quant::StoredTensor&)>& bytes) {
  PackedWeight weight{format.multiplied(), {}, {}};
  MultipliedParts made;
  if (format.is_symmetric() && backend.computes()) {
    const std::vector<quant::StoredTensor> stored = format.tensors();
    const auto of = [&](quant::StoredPart part) {
      return bytes(*std::ranges::find(stored, part, &quant::StoredTensor::part));
    };
    float master_scale;  // in a file it may stand at any byte
    std::memcpy(&master_scale, of(quant::StoredPart::MasterScale), sizeof master_scale);
    made = multiplied_parts(format, static_cast<const uint8_t*>(of(quant::StoredPart::Codes)),
                            master_scale);
  }
  const auto content = [&](const quant::StoredTensor& stored) -> const void* {
    if (format.is_symmetric()) {
      if (stored.part == quant::StoredPart::Codes) return made.codes.data();
      if (stored.part == quant::StoredPart::Zeros) return made.zeros.data();
      if (stored.part == quant::StoredPart::MasterScale) return &made.master_scale;
    }
    return bytes(stored);
  };
  for (const quant::StoredTensor& stored : weight.format.loaded_tensors()) {
    Tensor& tensor = weight.tensors[static_cast<size_t>(stored.part)];
    tensor = backend.empty(stored.shape, dtype_of(stored));
    backend.upload(tensor, content(stored));
  }
  return backend.repack(weight);
}

void join_parts(Backend& backend, const Tensor& layout, const PackedWeight& file) {
  const quant::JoinedParts parts = quant::joined_parts(file.format);
  const std::pair<quant::StoredPart, int64_t> offsets[] = {
      {quant::StoredPart::Codes, 0},
      {quant::StoredPart::Scales, parts.scales},
      {quant::StoredPart::Zeros, parts.zeros}};
  for (const auto& [part, offset] : offsets)
    backend.copy(layout.slice(offset, file[part].numel()), file[part]);
}

quant::PackedView joined_view(const PackedWeight& repacked) {
  return quant::joined_view(repacked.format, repacked.layout.data<uint8_t>(),
                            repacked[quant::StoredPart::MasterScale].data<float>());
}

quant::PackedView PackedWeight::view() const {
  const auto bytes = [&](quant::StoredPart part) {
    return static_cast<const uint8_t*>((*this)[part].raw());
  };
  return {.qweight = bytes(quant::StoredPart::Codes),
          .scales = bytes(quant::StoredPart::Scales),
          .zeros = bytes(quant::StoredPart::Zeros),
          .master_scale = (*this)[quant::StoredPart::MasterScale].data<float>(),
          .n = format.n,
          .k = format.stored_k(),
          .grid = format.weight};
}

OperandSpec upload_operand(Backend& backend, const quant::LinearFormat& format) {
  OperandSpec spec;
  const quant::ChannelOrder order = format.channel_order();
  if (!order.is_identity()) {
    spec.channels = backend.empty({order.stored_k()}, DType::I32);
    spec.positions = backend.empty({order.k()}, DType::I32);
    backend.upload(spec.channels, order.channels().data());
    backend.upload(spec.positions, order.positions().data());
    if (2 * order.k() <= std::numeric_limits<uint16_t>::max()) {
      std::vector<uint16_t> offsets;
      for (const int64_t channel : order.channels())
        offsets.push_back(static_cast<uint16_t>(2 * (channel < 0 ? order.k() : channel)));
      spec.offsets = backend.empty({2 * order.stored_k()}, DType::U8);
      backend.upload(spec.offsets, offsets.data());
    }
  }
  spec.view =
      quant::operand_view(format, spec.channels.data<int32_t>(), spec.positions.data<int32_t>());
  return spec;
}

// Memory.

Tensor Backend::empty(Shape shape, DType dtype) { return do_empty(std::move(shape), dtype); }

Tensor Backend::zeros(Shape shape, DType dtype) {
  Tensor t = do_empty(std::move(shape), dtype);
  do_zero(t);
  return t;
}

void Backend::upload(const Tensor& dst, const void* src) {
  const Op op(*this, "upload");
  op.here("dst", dst);
  BBB_CHECK(src != nullptr || dst.numel() == 0, "upload: src is null");
  do_upload(dst, src);
}

void Backend::download(void* dst, const Tensor& src) {
  const Op op(*this, "download");
  op.here("src", src);
  BBB_CHECK(dst != nullptr || src.numel() == 0, "download: dst is null");
  do_download(dst, src);
}

void Backend::copy(const Tensor& dst, const Tensor& src) {
  const Op op(*this, "copy");
  op.here("dst", dst);
  op.dtype("src", src, dst.dtype());
  op.same_numel("src", src, dst);
  do_copy(dst, src);
}

void Backend::cast(const Tensor& dst, const Tensor& src) {
  const Op op(*this, "cast");
  const auto castable = [this](DType t) {
    return t == act() || t == real() || t == DType::F32 || t == DType::BF16;
  };
  op.here("dst", dst);
  op.here("src", src);
  BBB_CHECK(castable(dst.dtype()) && castable(src.dtype()), "cast: no cast from ", describe(src),
            " to ", describe(dst));
  op.same_numel("src", src, dst);
  do_cast(dst, src);
}

void Backend::zero(const Tensor& dst) {
  const Op op(*this, "zero");
  op.here("dst", dst);
  do_zero(dst);
}

// Embedding, rows.

void Backend::embed(const Tensor& out, const Tensor& ids, const Tensor& table) {
  const Op op(*this, "embed");
  op.rank("out", out, 2);
  op.rank("table", table, 2);
  op.is("ids", ids, DType::I32, {out.dim(0)});
  op.is("table", table, op.bf16_or_act(table), {table.dim(0), out.dim(1)});
  op.dtype("out", out, act());
  do_embed(out, ids, table);
}

void Backend::embed_packed(const Tensor& out, const Tensor& ids, const PackedWeight& table) {
  const Op op(*this, "embed_packed");
  const WeightGrid& grid = table.format.weight;
  BBB_CHECK((grid.bits == 4 || grid.bits == 8) && !grid.nested,
            "embed_packed: a table has 4 or 8 bits, not ", grid.bits,
            grid.nested ? " nested bits" : "");
  op.repacked(table);
  op.rank("out", out, 2);
  op.is("out", out, act(), {out.dim(0), table.format.stored_k()});
  op.is("ids", ids, DType::I32, {out.dim(0)});
  do_embed_packed(out, ids, table);
}

void Backend::embed_backward(const Tensor& dtable, const Tensor& dx, const Tensor& ids,
                             Write mode) {
  const Op op(*this, "embed_backward");
  op.rank("dtable", dtable, 2);
  op.rank("dx", dx, 2);
  op.is("ids", ids, DType::I32, {dx.dim(0)});
  op.dtype("dx", dx, act());
  op.is("dtable", dtable, real(), {dtable.dim(0), dx.dim(1)});
  do_embed_backward(dtable, dx, ids, mode,
                    make_scratch(ScratchOp::EmbedBackward, {dx.dim(0), dtable.dim(0)}));
}

void Backend::gather_rows(const Tensor& out, const Rows& batch) {
  const Op op(*this, "gather_rows");
  op.here("out", out);
  op.batch("src", batch, "out", out);
  do_gather_rows(out, batch);
}

void Backend::advance(const Tensor& cursor) {
  const Op op(*this, "advance");
  op.rank("cursor", cursor, 1);
  op.dtype("cursor", cursor, DType::I32);
  do_advance(cursor);
}

void Backend::log_control(const Tensor& log, const Tensor& control, const Tensor& cursor) {
  const Op op(*this, "log_control");
  op.rank("log", log, 2);
  op.is("log", log, real(), {log.dim(0), kControlSize});
  op.is("control", control, real(), {kControlSize});
  op.is("cursor", cursor, DType::I32, {1});
  do_log_control(log, control, cursor);
}

// Matrix products.

void Backend::gemm_nt(const Tensor& y, const Tensor& x, const Tensor& w, const Tensor& alpha,
                      const Tensor& addend) {
  const Op op(*this, "gemm_nt");
  op.rank("x", x, 2);
  op.rank("w", w, 2);
  op.dtype("x", x, act());
  op.is("w", w, op.bf16_or_act(w), {w.dim(0), x.dim(1)});
  op.is_act_or_real("y", y, {x.dim(0), w.dim(0)});
  op.is_or_undefined("alpha", alpha, real(), {1});
  op.is_or_undefined("addend", addend, act(), {x.dim(0), w.dim(0)});
  do_gemm_nt(y, x, w, alpha, addend);
}

void Backend::gemm_nn(const Tensor& dx, const Tensor& dy, const Tensor& w, const Tensor& alpha,
                      Write mode) {
  const Op op(*this, "gemm_nn");
  op.rank("dy", dy, 2);
  op.rank("w", w, 2);
  op.dtype("dy", dy, act());
  op.is("w", w, act(), {dy.dim(1), w.dim(1)});
  op.is_act_or_real("dx", dx, {dy.dim(0), w.dim(1)});
  op.is_or_undefined("alpha", alpha, real(), {1});
  do_gemm_nn(dx, dy, w, alpha, mode);
}

void Backend::gemm_tn(const Tensor& dw, const Tensor& dy, const Tensor& x, Write mode) {
  const Op op(*this, "gemm_tn");
  op.rank("dy", dy, 2);
  op.rank("x", x, 2);
  op.dtype("dy", dy, act());
  op.is("x", x, act(), {dy.dim(0), x.dim(1)});
  op.gradient("dw", dw, {dy.dim(1), x.dim(1)}, mode);
  do_gemm_tn(dw, dy, x, mode);
}

// Norms, activations, positions.

void Backend::rms_norm(const Tensor& y, const Tensor& inv_rms, const Tensor& x, const Tensor& w,
                       double eps) {
  const Op op(*this, "rms_norm");
  op.rank("x", x, 2);
  op.dtype("x", x, act());
  op.is("y", y, act(), {x.dim(0), x.dim(1)});
  op.is("inv_rms", inv_rms, real(), {x.dim(0)});
  op.is("w", w, real(), {x.dim(1)});
  do_rms_norm(y, inv_rms, x, w, eps);
}

void Backend::rms_norm_backward(const Tensor& dx, const Tensor& dw, const Tensor& dy,
                                const Tensor& x, const Tensor& inv_rms, const Tensor& w,
                                Write dx_mode, Write dw_mode) {
  const Op op(*this, "rms_norm_backward");
  op.rank("x", x, 2);
  op.dtype("x", x, act());
  op.is_or_undefined("dx", dx, act(), {x.dim(0), x.dim(1)});
  if (dw.defined()) op.gradient("dw", dw, {x.dim(1)}, dw_mode);
  op.is("dy", dy, act(), {x.dim(0), x.dim(1)});
  op.is("inv_rms", inv_rms, real(), {x.dim(0)});
  op.is("w", w, real(), {x.dim(1)});
  do_rms_norm_backward(
      dx, dw, dy, x, inv_rms, w, dx_mode, dw_mode,
      dw.defined() ? make_scratch(ScratchOp::RmsNormBackward, x.shape()) : Tensor());
}

void Backend::input_scale_gradient(const Tensor& ds, const Tensor& s, const Tensor& w,
                                   const Tensor& alpha, const Tensor& dw, Write mode) {
  const Op op(*this, "input_scale_gradient");
  op.rank("w", w, 2);
  op.dtype("w", w, act());
  op.is("ds", ds, real(), {w.dim(1)});
  op.is("s", s, real(), {w.dim(1)});
  op.is_or_undefined("alpha", alpha, real(), {1});
  op.is_act_or_real("dw", dw, {w.dim(0), w.dim(1)});
  do_input_scale_gradient(ds, s, w, alpha, dw, mode,
                          make_scratch(ScratchOp::InputScaleGradient, w.shape()));
}

void Backend::swiglu(const Tensor& h, const Tensor& gate, const Tensor& up) {
  const Op op(*this, "swiglu");
  op.dtype("gate", gate, act());
  op.like("up", up, act(), gate.shape());
  op.like("h", h, act(), gate.shape());
  do_swiglu(h, gate, up);
}

void Backend::swiglu_backward(const Tensor& dgate, const Tensor& dup, const Tensor& dh,
                              const Tensor& gate, const Tensor& up) {
  const Op op(*this, "swiglu_backward");
  op.dtype("gate", gate, act());
  op.like("up", up, act(), gate.shape());
  op.like("dh", dh, act(), gate.shape());
  op.like("dgate", dgate, act(), gate.shape());
  op.like("dup", dup, act(), gate.shape());
  do_swiglu_backward(dgate, dup, dh, gate, up);
}

void Backend::operand(const OperandRows& out, const Tensor& x, const OperandSpec& spec) {
  const Op op(*this, "operand");
  op.rank("x", x, 2);
  op.is("x", x, act(), {x.dim(0), spec.view.k});
  op.operand(out, x.dim(0), spec);
  do_operand(out, x, spec);
}

void Backend::rms_norm_operand(const OperandRows& out, const Tensor& inv_rms, const Tensor& x,
                               const Tensor& w, double eps, const OperandSpec& spec) {
  const Op op(*this, "rms_norm_operand");
  op.rank("x", x, 2);
  op.is("x", x, act(), {x.dim(0), spec.view.k});
  op.is("inv_rms", inv_rms, real(), {x.dim(0)});
  op.is("w", w, real(), {spec.view.k});
  op.operand(out, x.dim(0), spec);
  do_rms_norm_operand(out, inv_rms, x, w, eps, spec);
}

void Backend::swiglu_operand(const OperandRows& out, const Tensor& gate, const Tensor& up,
                             const OperandSpec& spec) {
  const Op op(*this, "swiglu_operand");
  op.rank("gate", gate, 2);
  op.is("gate", gate, act(), {gate.dim(0), spec.view.k});
  op.like("up", up, act(), gate.shape());
  op.operand(out, gate.dim(0), spec);
  do_swiglu_operand(out, gate, up, spec);
}

void Backend::operand_backward(const Tensor& dx, const Tensor& dout, const Tensor& clipped,
                               const OperandSpec& spec) {
  const Op op(*this, "operand_backward");
  op.rank("dx", dx, 2);
  op.is("dx", dx, act(), {dx.dim(0), spec.view.k});
  op.layout(spec);
  op.is("dout", dout, act(), {dx.dim(0), spec.view.stored_k});
  op.is_or_undefined("clipped", clipped, DType::U8, {dx.dim(0), spec.view.stored_k / 8});
  do_operand_backward(dx, dout, clipped, spec);
}

void Backend::swiglu_operand_backward(const Tensor& dgate, const Tensor& dup, const Tensor& dout,
                                      const Tensor& clipped, const Tensor& gate, const Tensor& up,
                                      const OperandSpec& spec) {
  const Op op(*this, "swiglu_operand_backward");
  op.rank("gate", gate, 2);
  const int64_t rows = gate.dim(0);
  op.is("gate", gate, act(), {rows, spec.view.k});
  for (const Tensor* t : {&dgate, &dup, &up}) op.like("dgate, dup, up", *t, act(), gate.shape());
  op.layout(spec);
  op.is("dout", dout, act(), {rows, spec.view.stored_k});
  op.is_or_undefined("clipped", clipped, DType::U8, {rows, spec.view.stored_k / 8});
  do_swiglu_operand_backward(dgate, dup, dout, clipped, gate, up, spec);
}

void Backend::scale(const Tensor& x, const Tensor& factor) {
  const Op op(*this, "scale");
  op.like("x", x, x.dtype() == real() ? real() : act(), x.shape());
  op.is("factor", factor, real(), {1});
  do_scale(x, factor);
}

void Backend::channel_moments(const Tensor& moments, const Tensor& x) {
  const Op op(*this, "channel_moments");
  op.rank("x", x, 2);
  op.dtype("x", x, act());
  op.is("moments", moments, DType::F64, {kMoments, x.dim(1)});
  do_channel_moments(moments, x, make_scratch(ScratchOp::ChannelMoments, x.shape()));
}

void Backend::rope(const Tensor& x, const Tensor& inv_freq, const Tensor& start, Rotation direction,
                   double factor) {
  const Op op(*this, "rope");
  op.rank("x", x, 4);
  op.dtype("x", x, act());
  op.pairs(x, inv_freq);
  op.is_or_undefined("start", start, DType::I32, {x.dim(0)});
  do_rope(x, inv_freq, start, direction, factor);
}

void Backend::add(const Tensor& out, const Tensor& a, const Tensor& b) {
  const Op op(*this, "add");
  if (a.dtype() != real()) op.dtype("a", a, act());
  op.like("b", b, a.dtype(), a.shape());
  op.like("out", out, a.dtype(), a.shape());
  do_add(out, a, b);
}

void Backend::add_bias(const Tensor& y, const Tensor& bias) {
  const Op op(*this, "add_bias");
  op.rank("y", y, 2);
  op.dtype("y", y, act());
  op.is("bias", bias, real(), {y.dim(1)});
  do_add_bias(y, bias);
}

// Attention.

void Backend::attention(const Tensor& o, const Tensor& lse, const Tensor& q, const Tensor& k,
                        const Tensor& v, const AttentionSpec& spec) {
  const Op op(*this, "attention");
  op.heads(q, k, v, spec);
  op.is("k", k, act(), {q.dim(0), q.dim(1), k.dim(2), q.dim(3)});
  op.like("o", o, act(), q.shape());
  op.is("lse", lse, real(), {q.dim(0), q.dim(2), q.dim(1)});
  do_attention(o, lse, q, k, v, spec, make_scratch(ScratchOp::Attention));
}

void Backend::attention_backward(const Tensor& dq, const Tensor& dk, const Tensor& dv,
                                 const Tensor& dout, const Tensor& q, const Tensor& k,
                                 const Tensor& v, const Tensor& o, const Tensor& lse,
                                 const Tensor& inv_freq, const AttentionSpec& spec) {
  const Op op(*this, "attention_backward");
  op.heads(q, k, v, spec);
  op.is("k", k, act(), {q.dim(0), q.dim(1), k.dim(2), q.dim(3)});
  op.like("dq", dq, act(), q.shape());
  op.like("dk", dk, act(), k.shape());
  op.like("dv", dv, act(), k.shape());
  op.like("dout", dout, act(), q.shape());
  op.like("o", o, act(), q.shape());
  op.is("lse", lse, real(), {q.dim(0), q.dim(2), q.dim(1)});
  if (inv_freq.defined()) op.pairs(q, inv_freq);
  do_attention_backward(dq, dk, dv, dout, q, k, v, o, lse, inv_freq, spec,
                        make_scratch(attention_backward_scratch_bytes(q.shape(), k.shape(), spec)));
}

void Backend::append_kv(const Tensor& k_cache, const Tensor& v_cache, const Tensor& k,
                        const Tensor& v, const Tensor& start, const Tensor& q,
                        const Tensor& inv_freq, KvFormat format, double rope_factor) {
  const Op op(*this, "append_kv");
  op.new_keys(k_cache, v_cache, k, v, start, q, inv_freq, format);
  do_append_kv(k_cache, v_cache, k, v, start, q, inv_freq, format, rope_factor);
}

void Backend::attention_cached(const Tensor& o, const Tensor& q, const Tensor& k_cache,
                               const Tensor& v_cache, const Tensor& start,
                               const AttentionSpec& spec, KvFormat format) {
  const Op op(*this, "attention_cached");
  op.queries(o, q, k_cache, v_cache, start, spec, format);
  do_attention_cached(o, q, k_cache, v_cache, start, spec, format,
                      make_scratch(ScratchOp::AttentionCached, cached_sizes(q, k_cache, format)));
}

void Backend::attention_step(const Tensor& o, const Tensor& q, const Tensor& k, const Tensor& v,
                             const Tensor& k_cache, const Tensor& v_cache, const Tensor& start,
                             const Tensor& inv_freq, const AttentionSpec& spec, KvFormat format) {
  const Op op(*this, "attention_step");
  BBB_CHECK(q.defined() && inv_freq.defined(), "attention_step needs q and inv_freq");
  op.new_keys(k_cache, v_cache, k, v, start, q, inv_freq, format);
  op.queries(o, q, k_cache, v_cache, start, spec, format);
  BBB_CHECK(q.dim(1) == 1, "attention_step takes one position a sequence, not ", q.dim(1));
  do_attention_step(o, q, k, v, k_cache, v_cache, start, inv_freq, spec, format,
                    make_scratch(ScratchOp::AttentionCached, cached_sizes(q, k_cache, format)));
}

// Sampling.

void Backend::sample(const Tensor& ids, const Tensor& logits, const SampleRows& rows,
                     const SampleSpec& spec) {
  const Op op(*this, "sample");
  op.rank("logits", logits, 2);
  const int64_t m = logits.dim(0), v = logits.dim(1);
  op.is("logits", logits, real(), {m, v});
  op.is("ids", ids, DType::I32, {m});
  // Sums of weights of engine::kWeightBits (39) bits fit in 64.
  BBB_CHECK(v > 0 && v <= int64_t{1} << 24, "sample: a vocabulary of ", v);
  BBB_CHECK(
      spec.temperature >= 0 && spec.top_p >= 0 && spec.top_p <= 1 && spec.repetition_penalty > 0,
      "sample: temperature ", spec.temperature, ", top-p ", spec.top_p, ", repetition penalty ",
      spec.repetition_penalty);
  if (spec.temperature > 0) {
    op.is("seeds", rows.seeds, DType::I32, {m, 2});
    op.is("positions", rows.positions, DType::I32, {m});
  }
  if (spec.repetition_penalty != 1) op.here("seen", rows.seen);
  op.is_or_undefined("seen", rows.seen, DType::U8, {m, (v + 7) / 8});
  if (rows.log.defined()) {
    op.rank("log", rows.log, 2);
    op.is("log", rows.log, DType::I32, {rows.log.dim(0), m});
    BBB_CHECK(rows.log.dim(0) > 0, "sample: log has no rows");
    op.is("cursor", rows.cursor, DType::I32, {1});
  }
  do_sample(ids, logits, rows, spec, make_scratch(ScratchOp::Sample, logits.shape()));
}

// Losses.

void Backend::mse(const Tensor& loss, const Tensor& dx, const Tensor& x, const Rows& y) {
  const Op op(*this, "mse");
  op.dtype("x", x, act());
  if (y.order.defined())
    op.batch("y", y, "x", x);
  else
    op.like("y", y.src, act(), x.shape());
  if (dx.defined()) op.like("dx", dx, act(), x.shape());
  op.is("loss", loss, real(), {1});
  BBB_CHECK(x.numel() > 0, "mse: x ", to_string(x.shape()), " is empty");
  do_mse(loss, dx, x, y, make_scratch(ScratchOp::Mse));
}

void Backend::match_moments(const Tensor& loss, const Tensor& dx, const Tensor& x,
                            const Tensor& moments, const Tensor& target, double weight) {
  const Op op(*this, "match_moments");
  op.rank("x", x, 2);
  op.dtype("x", x, act());
  if (dx.defined()) op.like("dx", dx, act(), x.shape());
  op.is("loss", loss, real(), {1});
  op.is("moments", moments, DType::F64, {kMoments, x.dim(1)});
  op.is("target", target, DType::F64, {kMoments, x.dim(1)});
  BBB_CHECK(x.numel() > 0, "match_moments: x ", to_string(x.shape()), " is empty");
  do_match_moments(loss, dx, x, moments, target, weight);
}

void Backend::cross_entropy(const Tensor& loss, const Tensor& dlogits, const Tensor& logits,
                            const Tensor& targets, double scale) {
  const Op op(*this, "cross_entropy");
  op.rank("logits", logits, 2);
  const int64_t m = logits.dim(0), v = logits.dim(1);
  op.is_act_or_real("logits", logits, {m, v});
  op.is("loss", loss, real(), {m});
  op.is_or_undefined("dlogits", dlogits, act(), {m, v});
  op.is("targets", targets, DType::I32, {m});
  do_cross_entropy(loss, dlogits, logits, targets, scale);
}

void Backend::kl_divergence(const Tensor& loss, const Tensor& dlogits, const Tensor& logits,
                            const Tensor& teacher, const Tensor& targets, double scale) {
  const Op op(*this, "kl_divergence");
  op.two_models(logits, teacher, targets);
  op.is("loss", loss, real(), {logits.dim(0)});
  if (dlogits.defined()) op.like("dlogits", dlogits, act(), logits.shape());
  do_kl_divergence(loss, dlogits, logits, teacher, targets, scale);
}

void Backend::cross_entropy_chunk(const Tensor& loss, const Tensor& state, const Tensor& logits,
                                  const Tensor& targets, int64_t first_word, Write mode) {
  const Op op(*this, "cross_entropy_chunk");
  op.rank("logits", logits, 2);
  const int64_t m = logits.dim(0);
  op.is_act_or_real("logits", logits, {m, logits.dim(1)});
  op.is("loss", loss, real(), {m});
  op.is("state", state, real(), {m, kCrossEntropyState});
  op.is("targets", targets, DType::I32, {m});
  BBB_CHECK(first_word >= 0, "cross_entropy_chunk: first_word is ", first_word);
  do_cross_entropy_chunk(loss, state, logits, targets, first_word, mode);
}

void Backend::kl_divergence_chunk(const Tensor& loss, const Tensor& state, const Tensor& logits,
                                  const Tensor& teacher, const Tensor& targets, Write mode) {
  const Op op(*this, "kl_divergence_chunk");
  op.two_models(logits, teacher, targets);
  op.is("loss", loss, real(), {logits.dim(0)});
  op.is("state", state, real(), {logits.dim(0), kKlState});
  do_kl_divergence_chunk(loss, state, logits, teacher, targets, mode);
}

void Backend::cross_entropy_chunk_backward(const Tensor& dlogits, const Tensor& logits,
                                           const Tensor& state, const Tensor& targets,
                                           int64_t first_word, double scale) {
  const Op op(*this, "cross_entropy_chunk_backward");
  op.rank("logits", logits, 2);
  const int64_t m = logits.dim(0);
  op.is_act_or_real("logits", logits, {m, logits.dim(1)});
  op.like("dlogits", dlogits, act(), logits.shape());
  op.is("state", state, real(), {m, kCrossEntropyState});
  op.is("targets", targets, DType::I32, {m});
  BBB_CHECK(first_word >= 0, "cross_entropy_chunk_backward: first_word is ", first_word);
  do_cross_entropy_chunk_backward(dlogits, logits, state, targets, first_word, scale);
}

void Backend::kl_divergence_chunk_backward(const Tensor& dlogits, const Tensor& logits,
                                           const Tensor& teacher, const Tensor& state,
                                           const Tensor& targets, double scale) {
  const Op op(*this, "kl_divergence_chunk_backward");
  op.two_models(logits, teacher, targets);
  op.like("dlogits", dlogits, act(), logits.shape());
  op.is("state", state, real(), {logits.dim(0), kKlState});
  do_kl_divergence_chunk_backward(dlogits, logits, teacher, state, targets, scale);
}

void Backend::jensen_shannon(const Tensor& loss, const Tensor& dlogits, const Tensor& logits,
                             const Tensor& teacher, const Tensor& targets, double beta,
                             double scale) {
  const Op op(*this, "jensen_shannon");
  op.two_models(logits, teacher, targets);
  op.beta(beta);
  op.is("loss", loss, real(), {logits.dim(0)});
  if (dlogits.defined()) op.like("dlogits", dlogits, act(), logits.shape());
  do_jensen_shannon(loss, dlogits, logits, teacher, targets, beta, scale);
}

void Backend::jensen_shannon_chunk(const Tensor& loss, const Tensor& student_kl,
                                   const Tensor& logits, const Tensor& teacher, const Tensor& state,
                                   const Tensor& targets, double beta, Write mode) {
  const Op op(*this, "jensen_shannon_chunk");
  op.two_models(logits, teacher, targets);
  op.beta(beta);
  op.is("loss", loss, real(), {logits.dim(0)});
  op.is("student_kl", student_kl, real(), {logits.dim(0)});
  op.is("state", state, real(), {logits.dim(0), kKlState});
  do_jensen_shannon_chunk(loss, student_kl, logits, teacher, state, targets, beta, mode);
}

void Backend::jensen_shannon_chunk_backward(const Tensor& dlogits, const Tensor& logits,
                                            const Tensor& teacher, const Tensor& state,
                                            const Tensor& student_kl, const Tensor& targets,
                                            double beta, double scale) {
  const Op op(*this, "jensen_shannon_chunk_backward");
  op.two_models(logits, teacher, targets);
  op.beta(beta);
  op.like("dlogits", dlogits, act(), logits.shape());
  op.is("state", state, real(), {logits.dim(0), kKlState});
  op.is("student_kl", student_kl, real(), {logits.dim(0)});
  do_jensen_shannon_chunk_backward(dlogits, logits, teacher, state, student_kl, targets, beta,
                                   scale);
}

void Backend::sum(const Tensor& out, const Tensor& x, double scale, Write mode) {
  const Op op(*this, "sum");
  op.is("out", out, real(), {1});
  op.dtype("x", x, real());
  do_sum(out, x, scale, mode, make_scratch(ScratchOp::Sum));
}

// Quantizer.

void Backend::max_group_range(const QuantizedWeights& q, const Tensor& w) {
  const Op op(*this, "max_group_range");
  op.flat("w", w, w.numel());
  op.quantizer(q, w.numel());
  do_max_group_range(q, w);
}

void Backend::fake_quant(const QuantizedWeights& q, const Tensor& w) {
  const Op op(*this, "fake_quant");
  op.flat("w", w, w.numel());
  op.quantizer(q, w.numel());
  do_fake_quant(q, w);
}

void Backend::nested_levels(const Tensor& wq, const QuantizedWeights& q, const Tensor& w, int bits,
                            quant::NestedDequant dequant) {
  const Op op(*this, "nested_levels");
  op.flat("w", w, w.numel());
  op.quantizer(q, w.numel());
  op.is("wq", wq, act(), {w.numel()});
  BBB_CHECK(bits > 0 && bits < quant::kNestedBits, "nested_levels: ", bits, " bits");
  do_nested_levels(wq, q, w, bits, dequant);
}

void Backend::quantize_codes(const Tensor& codes, const Tensor& w, const Tensor& e, const Tensor& z,
                             const Tensor& s, const WeightGrid& spec) {
  const Op op(*this, "quantize_codes");
  op.gridded(w, e, z, s, spec);
  op.is("codes", codes, DType::U8, {w.dim(0), w.dim(1)});
  do_quantize_codes(codes, w, e, z, s, spec);
}

void Backend::scale_codes(const Tensor& wq, const Tensor& e, const Tensor& s, const Tensor& codes,
                          const Tensor& z, const Tensor& sigma, const WeightGrid& spec) {
  const Op op(*this, "scale_codes");
  op.rank("codes", codes, 2);
  const int64_t n = codes.dim(0), k = codes.dim(1);
  op.grid(spec, k);
  op.dtype("codes", codes, DType::U8);
  op.is("wq", wq, act(), {n, k});
  op.is("e", e, DType::U8, {n, k / spec.group});
  op.is("s", s, real(), {1});
  op.is("z", z, DType::U8, {n, k / spec.group});
  op.is("sigma", sigma, real(), {n, k / spec.group});
  do_scale_codes(wq, e, s, codes, z, sigma, spec);
}

void Backend::scale_codes_backward(const Tensor& dsigma, const Tensor& dw, const Tensor& codes,
                                   const Tensor& z, const WeightGrid& spec, Write mode) {
  const Op op(*this, "scale_codes_backward");
  op.rank("codes", codes, 2);
  const int64_t n = codes.dim(0), k = codes.dim(1);
  op.grid(spec, k);
  op.dtype("codes", codes, DType::U8);
  op.gradient("dw", dw, {n, k}, mode);
  op.is("dsigma", dsigma, dw.dtype(), {n, k / spec.group});
  op.is("z", z, DType::U8, {n, k / spec.group});
  do_scale_codes_backward(dsigma, dw, codes, z, spec, mode);
}

void Backend::learned_quant(const Tensor& wq, const Tensor& e, const Tensor& z, const Tensor& s,
                            const Tensor& w, const Tensor& sigma, const Tensor& zeta,
                            const WeightGrid& spec) {
  const Op op(*this, "learned_quant");
  op.gridded(w, e, z, s, spec);
  const int64_t n = w.dim(0), k = w.dim(1);
  op.is("wq", wq, act(), {n, k});
  op.is("sigma", sigma, real(), {n, k / spec.group});
  op.is_or_undefined("zeta", zeta, real(), {n, k / spec.group});
  do_learned_quant(wq, e, z, s, w, sigma, zeta, spec);
}

void Backend::learned_quant_backward(const Tensor& dw, const Tensor& dsigma, const Tensor& dzeta,
                                     const Tensor& w, const Tensor& e, const Tensor& z,
                                     const Tensor& s, const WeightGrid& spec) {
  const Op op(*this, "learned_quant_backward");
  op.gridded(w, e, z, s, spec);
  const int64_t n = w.dim(0), k = w.dim(1);
  op.gradient("dw", dw, {n, k}, Write::Overwrite);
  op.is("dsigma", dsigma, dw.dtype(), {n, k / spec.group});
  op.is_or_undefined("dzeta", dzeta, dw.dtype(), {n, k / spec.group});
  do_learned_quant_backward(dw, dsigma, dzeta, w, e, z, s, spec);
}

void Backend::ratio_quant(const Tensor& wq, const Tensor& e, const Tensor& z, const Tensor& s,
                          const Tensor& ratio, const Tensor& w, const WeightGrid& spec) {
  const Op op(*this, "ratio_quant");
  op.gridded(w, e, z, s, spec);
  const int64_t n = w.dim(0), k = w.dim(1);
  op.is("wq", wq, act(), {n, k});
  op.is("ratio", ratio, real(), {n, k / spec.group});
  do_ratio_quant(wq, e, z, s, ratio, w, spec);
}

void Backend::ratio_quant_backward(const Tensor& dw, const Tensor& dratio, const Tensor& w,
                                   const Tensor& e, const Tensor& z, const Tensor& s,
                                   const WeightGrid& spec) {
  const Op op(*this, "ratio_quant_backward");
  op.gridded(w, e, z, s, spec);
  const int64_t n = w.dim(0), k = w.dim(1);
  op.gradient("dw", dw, {n, k}, Write::Overwrite);
  op.is("dratio", dratio, dw.dtype(), {n, k / spec.group});
  do_ratio_quant_backward(dw, dratio, w, e, z, s, spec);
}

// LC.

void Backend::lc_weight(const Tensor& w, const LcWeight& from) {
  const Op op(*this, "lc_weight");
  op.lc(from);
  op.like("w", w, act(), from.latent.shape());
  do_lc_weight(w, from);
}

void Backend::lc_weight_backward(const Tensor& dlatent, const Tensor& dv, const Tensor& dmap,
                                 const Tensor& dw, const Tensor& w, const LcWeight& from,
                                 Write dmap_mode) {
  const Op op(*this, "lc_weight_backward");
  op.lc(from);
  const int64_t n = from.latent.dim(0), k = from.latent.dim(1);
  op.is_act_or_real("dw", dw, {n, k});
  op.is("dlatent", dlatent, dw.dtype(), {n, k});
  op.is("dv", dv, dw.dtype(), {n});
  op.is_or_undefined("dmap", dmap, real(), {quant::kLcVector, quant::kLcVector + 1});
  op.is("w", w, act(), {n, k});
  do_lc_weight_backward(dlatent, dv, dmap, dw, w, from, dmap_mode,
                        make_scratch(ScratchOp::LcWeightBackward, {n, k}));
}

void Backend::lora_weight(const Tensor& w, const Tensor& base, const Tensor& a, const Tensor& b,
                          double alpha) {
  const Op op(*this, "lora_weight");
  op.rank("w", w, 2);
  op.rank("a", a, 2);
  op.is("w", w, real(), {w.dim(0), w.dim(1)});
  op.is("base", base, real(), {w.dim(0), w.dim(1)});
  op.is("a", a, real(), {w.dim(0), a.dim(1)});
  op.is("b", b, real(), {a.dim(1), w.dim(1)});
  do_lora_weight(w, base, a, b, alpha);
}

void Backend::lora_weight_backward(const Tensor& da, const Tensor& db, const Tensor& dw,
                                   const Tensor& clipped, const Tensor& a, const Tensor& b,
                                   double alpha) {
  const Op op(*this, "lora_weight_backward");
  op.rank("dw", dw, 2);
  op.rank("a", a, 2);
  const int64_t n = dw.dim(0), k = dw.dim(1), rank = a.dim(1);
  op.is_act_or_real("dw", dw, {n, k});
  op.is("da", da, dw.dtype(), {n, rank});
  op.is("db", db, dw.dtype(), {rank, k});
  op.is_or_undefined("clipped", clipped, DType::U8, {n * k / 8});
  op.is("a", a, real(), {n, rank});
  op.is("b", b, real(), {rank, k});
  do_lora_weight_backward(da, db, dw, clipped, a, b, alpha,
                          make_scratch(ScratchOp::LoraWeightBackward, {n, k, rank}));
}

void Backend::lc_operand(const Tensor& out, const Tensor& constant, const Tensor& x,
                         const Tensor& u, const Tensor& map) {
  const Op op(*this, "lc_operand");
  op.rank("x", x, 2);
  op.dtype("x", x, act());
  op.lc_input(u, map, x.dim(1));
  op.like("out", out, act(), x.shape());
  op.is("constant", constant, real(), {x.dim(0)});
  do_lc_operand(out, constant, x, u, map);
}

void Backend::lc_output(const Tensor& y, const Tensor& product, const Tensor& constant,
                        const Tensor& v, const Tensor& addend) {
  const Op op(*this, "lc_output");
  op.rank("product", product, 2);
  const int64_t m = product.dim(0), n = product.dim(1);
  op.dtype("product", product, real());
  op.is("y", y, act(), {m, n});
  op.is("constant", constant, real(), {m});
  op.lc_side("v", v, n);
  op.is_or_undefined("addend", addend, act(), {m, n});
  do_lc_output(y, product, constant, v, addend);
}

// Packed inference.

PackedWeight Backend::repack(const PackedWeight& file) {
  const Op op(*this, "repack");
  op.stored(file);
  PackedWeight repacked{file.format, {}, do_empty({repacked_bytes(file.format)}, DType::U8)};
  constexpr auto kMasterScale = static_cast<size_t>(quant::StoredPart::MasterScale);
  repacked.tensors[kMasterScale] = file.tensors[kMasterScale];
  do_repack(repacked.layout, file);
  return repacked;
}

void Backend::unpack(const Tensor& wq, const PackedWeight& w) {
  const Op op(*this, "unpack");
  op.repacked(w);
  op.is("wq", wq, act(), {w.format.n, w.format.stored_k()});
  do_unpack(wq, w);
}

void Backend::packed_gemv(const PackedProducts& products, const Tensor& x,
                          const OperandSpec* operand) {
  const Op op(*this, "packed_gemv");
  op.rank("x", x, 2);
  const quant::LinearFormat& format = op.products(products, x.dim(0));
  for (const PackedProduct& product : products)
    op.few_rows("x", x,
                operand != nullptr ? kMaxPackedRows : max_packed_rows(product.weight.format));
  op.is("x", x, act(), {x.dim(0), op.row_channels(format, operand)});
  do_packed_gemv(products, x, operand);
}

void Backend::packed_gemv_normed(const PackedProducts& products, const Tensor& x, const Tensor& w,
                                 double eps, const OperandSpec* operand) {
  const Op op(*this, "packed_gemv_normed");
  op.rank("x", x, 2);
  op.few_rows("x", x, kMaxPackedRows);
  const int64_t k = op.row_channels(op.products(products, x.dim(0)), operand);
  op.is("x", x, act(), {x.dim(0), k});
  op.is("w", w, real(), {k});
  do_packed_gemv_normed(products, x, w, eps, operand);
}

void Backend::packed_gemv_gated(const PackedProducts& products, const Tensor& gate,
                                const Tensor& up, const OperandSpec* operand) {
  const Op op(*this, "packed_gemv_gated");
  op.rank("gate", gate, 2);
  op.few_rows("gate", gate, kMaxPackedRows);
  const quant::LinearFormat& format = op.products(products, gate.dim(0));
  op.is("gate", gate, act(), {gate.dim(0), op.row_channels(format, operand)});
  op.like("up", up, act(), gate.shape());
  do_packed_gemv_gated(products, gate, up, operand);
}

void Backend::quantized_gemv(const PackedProducts& products, const OperandRows& x) {
  const Op op(*this, "quantized_gemv");
  op.rank("codes", x.codes, 2);
  op.few_rows("codes", x.codes, kMaxPackedRows);
  const int64_t m = x.codes.dim(0);
  const quant::LinearFormat& format = op.products(products, m);
  op.is("codes", x.codes, DType::U8, {m, format.stored_k()});
  op.is("zero_points", x.zeros, DType::U8, {m, format.groups()});
  op.is("group_scales", x.scales, real(), {m, format.groups()});
  do_quantized_gemv(products, x);
}

// Optimizer.

void Backend::step_control(const Tensor& control, const Tensor& loss, const Tensor& g,
                           const Tensor& clipped, const Schedule& schedule) {
  const Op op(*this, "step_control");
  op.is("control", control, real(), {kControlSize});
  op.is("loss", loss, real(), {1});
  op.flat_gradient("g", g, g.numel());
  op.is_or_undefined("clipped", clipped, DType::U8, {g.numel() / 8});
  BBB_CHECK(schedule.total_steps > 0, "step_control: total_steps must be positive, got ",
            schedule.total_steps);
  do_step_control(control, loss, g, clipped, schedule, make_scratch(ScratchOp::StepControl));
}

void Backend::muon_momentum(const Tensor& x, const Tensor& m, const Tensor& g,
                            const Tensor& clipped, const Tensor& control, double decay) {
  const Op op(*this, "muon_momentum");
  const int64_t n = x.numel();
  op.is("x", x, act(), {n});
  op.is("m", m, act(), {n});
  op.flat_gradient("g", g, n);
  op.is_or_undefined("clipped", clipped, DType::U8, {n / 8});
  op.is("control", control, real(), {kControlSize});
  do_muon_momentum(x, m, g, clipped, control, decay, make_scratch(ScratchOp::Sum));
}

void Backend::adamw(const Tensor& w, const Tensor& m, const Tensor& v, const Tensor& g,
                    const Tensor& control, const ParameterTable& table, const QuantizedWeights& q,
                    const AdamWSpec& spec) {
  const Op op(*this, "adamw");
  op.flat("w", w, w.numel());
  if (m.dtype() == DType::U8) {
    for (const auto& [what, moments] : {std::pair{"m", &m}, {"v", &v}})
      op.is(what, *moments, DType::U8, {quant::moment_bytes(w.numel())});
  } else {
    op.is("m", m, act(), {w.numel()});
    op.flat("v", v, w.numel());
  }
  op.flat_gradient("g", g, w.numel());
  op.is("control", control, real(), {kControlSize});
  op.table(table.tiles, table.slots);
  if (q.wq.defined()) {
    op.quantizer(q, w.numel());
    op.is("bits", q.bits, DType::I32, {table.slots.dim(0)});
  }
  do_adamw(w, m, v, g, control, table, q, spec);
}

void Backend::average(const Tensor& average, const Tensor& w, const Tensor& control, double decay) {
  const Op op(*this, "average");
  op.dtype("w", w, real());
  op.like("average", average, real(), w.shape());
  op.is("control", control, real(), {kControlSize});
  do_average(average, w, control, decay);
}

void Backend::dampen(const Tensor& g, const Tensor& w, const QuantizedWeights& q, double rate) {
  const Op op(*this, "dampen");
  op.flat("w", w, w.numel());
  op.flat_gradient("g", g, w.numel());
  op.quantizer(q, w.numel());
  do_dampen(g, w, q, rate);
}

void Backend::freeze_flips(const Tensor& state, const Tensor& g, const Tensor& m,
                           const QuantizedWeights& q, const Tensor& control) {
  const Op op(*this, "freeze_flips");
  op.flat_gradient("g", g, g.numel());
  op.is("m", m, act(), {g.numel()});
  op.is("state", state, DType::U8, {g.numel()});
  op.quantizer(q, g.numel());
  op.is("control", control, real(), {kControlSize});
  do_freeze_flips(state, g, m, q, control);
}

}  // namespace bbb::engine
