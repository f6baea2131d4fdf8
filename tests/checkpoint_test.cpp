// The three kinds of checkpoints: what loads, under which names, and what is refused.
#include "models/checkpoint.h"

#include <catch2/catch.hpp>
#include <cmath>
#include <filesystem>

#include "data/files.h"
#include "tests/model_files.h"
#include "tests/support.h"

using namespace bbb;
using namespace bbb::models;
using Catch::Matchers::Contains;
using data::FileDType;
using tests::FileTensor;
using tests::raw;
using tests::TempDir;

namespace {

void write_model(const TempDir& dir, const std::string& config,
                 const std::vector<FileTensor>& tensors) {
  tests::write_plain(dir / "config.json", config);
  tests::write_plain(dir / "model.safetensors", tests::safetensors_of(tensors));
}

FileTensor& named(std::vector<FileTensor>& tensors, const std::string& name) {
  for (FileTensor& t : tensors)
    if (t.name == name) return t;
  throw Error("the test names no tensor: " + name);
}

void remove(std::vector<FileTensor>& tensors, const std::string& name) {
  std::erase_if(tensors, [&](const FileTensor& t) { return t.name == name; });
}

// Gives a tensor another dtype and shape, and bytes that match.
void change(std::vector<FileTensor>& tensors, const std::string& name, FileDType dtype,
            const engine::Shape& shape) {
  FileTensor& t = named(tensors, name);
  t.dtype = dtype;
  t.shape = shape;
  t.bytes.assign(static_cast<size_t>(engine::numel_of(shape) * data::size_bytes(dtype)), '\0');
}

const std::string kQ = "model.layers.1.self_attn.q_proj";

}  // namespace

TEST_CASE("checkpoint: a Hugging Face directory, untied and tied") {
  for (const bool tied : {false, true}) {
    const TempDir dir;
    engine::Rng rng(3);
    LlamaConfig c = tests::file_model_config();
    c.tied_head = tied;
    std::vector<FileTensor> tensors = tests::tiny_hf(c, rng);
    const std::string text = config_to_json(c);
    write_model(dir, text, tensors);
    const auto checkpoint = open_checkpoint(dir.path());
    CHECK(checkpoint->kind() == CheckpointKind::HuggingFace);
    CHECK(checkpoint->config_json() == text);
    CHECK(checkpoint->generation_config_json().empty());
    CHECK(tests::has_tensor(*checkpoint, "lm_head.weight") == !tied);
    CHECK(checkpoint->list().size() == tensors.size());
    CHECK(checkpoint->bits_per_weight() == 16);
    CHECK_FALSE(checkpoint->packed_format(kQ, 64, 64));
    CHECK_THROWS_WITH(checkpoint->stored(kQ + ".qweight"), Contains("is not packed"));
    CHECK(checkpoint->load(kQ + ".weight", {64, 64}).size() == 64 * 64);
    CHECK_THROWS_WITH(checkpoint->load(kQ + ".weight", {64, 65}), Contains("has shape (64, 64)"));
    CHECK_THROWS_WITH(checkpoint->load("x", {1}), Contains("tensor 'x' is missing"));
    tests::write_plain(dir / "generation_config.json", "{}");
    CHECK(checkpoint->generation_config_json() == "{}");
  }
}

TEST_CASE("checkpoint: a file with its own head, although config.json ties it") {
  const TempDir dir;
  engine::Rng rng(3);
  LlamaConfig c = tests::file_model_config();
  c.tied_head = true;
  std::vector<FileTensor> tensors = tests::tiny_hf(c, rng);
  // Old files contain the rope table.
  tensors.push_back(
      tests::file_tensor("model.layers.0.self_attn.rotary_emb.inv_freq", FileDType::F32, {8}, rng));
  FileTensor& table = named(tensors, kEmbedding);
  table.bytes.clear();
  for (int i = 0; i < 40 * 64; ++i) table.bytes += raw(static_cast<uint16_t>(0x3f80 + i % 50));
  FileTensor same = table, wider = table, other = table, misshapen = table;
  for (FileTensor* t : {&same, &wider, &other, &misshapen}) t->name = kHead;
  wider.dtype = FileDType::F32;
  wider.bytes.clear();
  for (int i = 0; i < 40 * 64; ++i)
    wider.bytes += raw(static_cast<uint32_t>(0x3f80 + i % 50) << 16);
  other.bytes.back() = '\x40';
  misshapen.shape = {64, 40};
  const auto open = [&](const FileTensor& head) {
    std::vector<FileTensor> all = tensors;
    all.push_back(head);
    write_model(dir, config_to_json(c), all);
    return open_checkpoint(dir.path());
  };
  for (const FileTensor& head : {same, wider}) CHECK(open(head)->config().tied_head);
  {
    const auto checkpoint = open(other);
    CHECK_FALSE(checkpoint->config().tied_head);
    CHECK(checkpoint->load(kHead, {40, 64}).back() == 4.28125f);
  }
  wider.bytes.back() = '\x40';
  CHECK_FALSE(open(wider)->config().tied_head);
  CHECK_THROWS_WITH(open(misshapen), Contains("'lm_head.weight' has shape (64, 40)"));

  // The same for an exported file.
  std::vector<FileTensor> packed = tests::tiny_packed(c, 2, 32, rng);
  packed.push_back(other);
  write_model(dir, tests::packed_config(c), packed);
  CHECK_FALSE(open_checkpoint(dir.path())->config().tied_head);
  packed.back().bytes = named(packed, kEmbedding).bytes;
  write_model(dir, tests::packed_config(c), packed);
  CHECK(open_checkpoint(dir.path())->config().tied_head);
}

TEST_CASE("checkpoint: bad weights are named with their position") {
  const float inf = INFINITY;
  const auto f16 = [](uint16_t bits) { return raw(bits); };
  struct Case {
    const char* name;
    FileDType dtype;
    std::string value;
    const char* message;  // "": no error
  };
  const Case cases[] = {
      {"model.layers.1.mlp.up_proj.weight", FileDType::F32, raw(NAN), "[3, 17] is nan"},
      {"model.layers.1.mlp.up_proj.weight", FileDType::F32, raw(-NAN), "[3, 17] is nan"},
      {"model.layers.1.mlp.up_proj.weight", FileDType::F32, raw(-inf), "[3, 17] is -inf"},
      {"model.layers.1.mlp.up_proj.weight", FileDType::F32, raw(3.3961776e38f),
       "[3, 17] is 3.39618e+38, beyond BF16's range"},
      {"model.layers.1.mlp.up_proj.weight", FileDType::F32, raw(3.38e38f), ""},
      {"model.layers.0.self_attn.q_proj.weight", FileDType::F64, raw(double{NAN}), "is nan"},
      {"model.layers.0.self_attn.q_proj.weight", FileDType::F64, raw(1e300), "is inf"},
      {"model.layers.0.self_attn.q_proj.weight", FileDType::F64, raw(-3.38e38), ""},
      {"model.embed_tokens.weight", FileDType::F16, f16(0x7c01), "is nan"},
      {"model.embed_tokens.weight", FileDType::F16, f16(0xfc00), "is -inf"},
      {"model.embed_tokens.weight", FileDType::F16, f16(0x7bff), ""},
      {"lm_head.weight", FileDType::BF16, f16(0xffff), "is nan"},
      {"lm_head.weight", FileDType::BF16, f16(0x7f80), "is inf"},
      {"lm_head.weight", FileDType::BF16, f16(0xff7f), ""},
      {"model.norm.weight", FileDType::F32, raw(inf), "[17] is inf"},
      {"model.layers.0.input_layernorm.weight", FileDType::BF16, f16(0x7fc0), "[17] is nan"},
      {"model.layers.1.post_attention_layernorm.weight", FileDType::F16, f16(0x7c00), "is inf"},
  };
  const TempDir dir;
  const LlamaConfig c = tests::file_model_config();
  const auto open = [&](auto edit) {
    engine::Rng rng(3);
    std::vector<FileTensor> tensors = tests::tiny_hf(c, rng);
    for (FileTensor& t : tensors) t.bytes.assign(t.bytes.size(), '\0');
    tensors.push_back({"model.layers.0.self_attn.rotary_emb.inv_freq",
                       FileDType::F32,
                       {1},
                       raw(NAN)});  // not used
    edit(tensors);
    write_model(dir, config_to_json(c), tensors);
    return open_checkpoint(dir.path());
  };
  for (const Case& k : cases) {
    INFO(k.name << k.message);
    const auto checkpoint = open([&](auto& tensors) {
      FileTensor& t = named(tensors, k.name);
      const engine::Shape shape = t.shape;
      change(tensors, k.name, k.dtype, shape);
      const int64_t at = shape.size() == 1 ? 17 : 3 * shape[1] + 17;
      t.bytes.replace(static_cast<size_t>(at) * k.value.size(), k.value.size(), k.value);
    });
    if (*k.message)
      CHECK_THROWS_WITH(checkpoint->check_finite(),
                        Contains(std::string(": ") + k.name) && Contains(k.message));
    else
      CHECK_NOTHROW(checkpoint->check_finite());
  }
}

TEST_CASE("checkpoint: the first of many bad weights is named, whichever thread finds it") {
  const TempDir dir;
  LlamaConfig c = tests::file_model_config();
  c.vocab = 40000;  // the check splits this table into five pieces
  engine::Rng rng(3);
  std::vector<FileTensor> tensors = tests::tiny_hf(c, rng);
  for (FileTensor& t : tensors) t.bytes.assign(t.bytes.size(), '\0');
  for (const size_t row : {39999u, 20001u, 33333u})
    named(tensors, kEmbedding).bytes.replace(row * 128 + 126, 2, raw(uint16_t{0x7fc0}));
  named(tensors, "model.norm.weight").bytes = std::string(256, '\xff');
  write_model(dir, config_to_json(c), tensors);
  const auto checkpoint = open_checkpoint(dir.path());
  for (int i = 0; i < 20; ++i)
    CHECK_THROWS_WITH(checkpoint->check_finite(),
                      Contains("embed_tokens.weight[20001, 63] is nan"));
}

TEST_CASE("checkpoint: the scales of a GGUF and of an export are checked too") {
  const TempDir dir;
  const LlamaConfig c = tests::file_model_config();
  struct Type {
    uint32_t number;
    std::string name;
    size_t bytes;
    std::vector<size_t> halves;
  };
  // K is 64 for the first of these and 256 for the others.
  const Type types[] = {{2, "Q4_0", 18, {0}},      {3, "Q4_1", 20, {0, 2}},
                        {6, "Q5_0", 22, {0}},      {7, "Q5_1", 24, {0, 2}},
                        {8, "Q8_0", 34, {0}},      {12, "Q4_K", 144, {0, 2}},
                        {13, "Q5_K", 176, {0, 2}}, {14, "Q6_K", 210, {208}}};
  LlamaConfig wide = c;
  wide.hidden = 256;
  for (const Type& t : types)
    for (const size_t half : t.halves)
      for (const uint16_t bits : {0x7e00, 0xfc00, 0x7bff}) {
        INFO(t.name << " " << half << " " << bits);
        engine::Rng rng(4);
        tests::GgufFile file = tests::tiny_gguf(wide, rng, "blk.1.ffn_down.weight");
        const size_t row = (t.number < 9 ? 8 : 1) * t.bytes;
        std::string blocks(64 * row, '\0');
        blocks.replace(5 * row + half, 2, raw(bits));
        file.tensor("blk.1.ffn_down.weight", {64, 256}, t.number, blocks);
        tests::write_plain(dir / "m", file.bytes());
        const auto checkpoint = open_checkpoint(dir / "m");
        if (bits == 0x7bff)
          CHECK_NOTHROW(checkpoint->check_finite());
        else
          CHECK_THROWS_WITH(checkpoint->check_finite(),
                            Contains("m: blk.1.ffn_down.weight[5, 0] is "));
      }

  struct Scale {
    const char *code, *message;  // "": no error
  };
  for (const Scale& scale :
       {Scale{"\x7f", "is nan"}, Scale{"\xff", "is nan"}, Scale{"\x7e", ""},
        Scale{"\xb8", "is -1: a scale has no sign"}, Scale{"\x80", "is -0: a scale has no sign"}}) {
    engine::Rng rng(5);
    std::vector<FileTensor> tensors = tests::tiny_packed(c, 2, 32, rng);
    for (FileTensor& t : tensors)
      if (!t.name.ends_with(".master_scale")) t.bytes.assign(t.bytes.size(), '\0');
    named(tensors, kQ + ".scales").bytes.replace(2 * 7 + 1, 1, scale.code);
    for (FileTensor& t : tensors)
      if (t.name.ends_with("weight") && t.dtype == FileDType::U8)
        t.bytes.assign(t.bytes.size(), '\xff');  // codes: any byte is valid
    write_model(dir, tests::packed_config(c), tensors);
    const auto checkpoint = open_checkpoint(dir.path());
    if (*scale.message)
      CHECK_THROWS_WITH(checkpoint->check_finite(),
                        Contains(": " + kQ + ".scales[7, 1] " + scale.message));
    else
      CHECK_NOTHROW(checkpoint->check_finite());
  }
}

TEST_CASE("checkpoint: the ids that end a text") {
  const TempDir dir;
  engine::Rng rng(3);
  LlamaConfig c = tests::file_model_config();
  c.eos_ids = {7, 3};
  write_model(dir, config_to_json(c), tests::tiny_hf(c, rng));
  const auto checkpoint = open_checkpoint(dir.path());
  const auto stops_with = [&](const std::string& generation) {
    tests::write_plain(dir / "generation_config.json", generation);
    return checkpoint->stop_ids();
  };
  using Ids = std::vector<int32_t>;
  CHECK(checkpoint->stop_ids() == Ids{7, 3});
  CHECK(stops_with("{}") == Ids{7, 3});
  CHECK(stops_with(R"({"eos_token_id": 5, "top_p": NaN})") == Ids{7, 3, 5});
  CHECK(stops_with(R"({"eos_token_id": [3, 9, 9, 40, -1]})") == Ids{7, 3, 9});  // ids below 40
  CHECK_THROWS_WITH(stops_with("{"), Contains("generation_config.json: malformed JSON"));
  CHECK_THROWS_WITH(stops_with(R"({"eos_token_id": "x"})"), Contains("'eos_token_id' is not"));

  tests::GgufFile file = tests::tiny_gguf(c, rng);
  file.integer("tokenizer.ggml.eos_token_id", 2);
  file.integer("tokenizer.ggml.eot_token_id", 9);
  file.integer("tokenizer.ggml.eom_token_id", 2);
  tests::write_plain(dir / "m", file.bytes());
  const auto gguf = open_checkpoint(dir / "m");
  CHECK(gguf->stop_ids() == Ids{2, 9});
  CHECK(config_from_json(gguf->config_json(), "f").eos_ids == std::vector<int64_t>{2, 9});
}

TEST_CASE("checkpoint: a Hugging Face directory that does not fit its config") {
  const LlamaConfig c = tests::file_model_config();
  const auto open = [&](auto edit) {
    const TempDir dir;
    engine::Rng rng(3);
    std::vector<FileTensor> tensors = tests::tiny_hf(c, rng);
    edit(tensors);
    write_model(dir, config_to_json(c), tensors);
    open_checkpoint(dir.path());
  };
  CHECK_NOTHROW(open([](auto&) {}));
  for (const char* name :
       {"lm_head.weight", "model.norm.weight", "model.embed_tokens.weight",
        "model.layers.1.input_layernorm.weight", "model.layers.0.mlp.down_proj.weight"})
    CHECK_THROWS_WITH(open([&](auto& t) { remove(t, name); }),
                      Contains("tensor '" + std::string(name) + "' is missing"));
  CHECK_THROWS_WITH(
      open([](auto& t) {
        change(t, kQ + ".weight", FileDType::BF16, {64, 63});
      }),
      Contains("tensor '" + kQ + ".weight' has shape (64, 63), the model needs (64, 64)"));
  CHECK_THROWS_WITH(open([](auto& t) {
                      change(t, kQ + ".weight", FileDType::I8, {64, 64});
                    }),
                    Contains("is I8, not a floating-point"));
  CHECK_THROWS_WITH(open([](auto& t) { named(t, "model.norm.weight").name = "model.norm.bias"; }),
                    Contains("'model.norm.weight' is missing"));
  CHECK_THROWS_WITH(open([](auto& t) {
                      t.push_back({kQ + ".bias", FileDType::U8, {1}, "x"});
                    }),
                    Contains("'" + kQ + ".bias' is no part of a llama model"));
}

TEST_CASE("checkpoint: paths without a model") {
  const TempDir dir;
  CHECK_THROWS_WITH(open_checkpoint(dir / "none"), Contains("no such file"));
  CHECK_THROWS_WITH(open_checkpoint(dir.path()), Contains("no config.json"));
  tests::write_plain(dir / "f.safetensors", "x");
  tests::write_plain(dir / "f.gguf", "something else");
  for (const char* name : {"f.safetensors", "f.gguf"})
    CHECK_THROWS_WITH(open_checkpoint(dir / name), Contains("not a GGUF file; a model is one, or"));
  tests::write_plain(dir / "config.json", config_to_json(tests::file_model_config()));
  CHECK_THROWS_WITH(open_checkpoint(dir.path()), Contains("neither model.safetensors"));
}

TEST_CASE("checkpoint: a GGUF under Hugging Face names, Q and K unpermuted") {
  const TempDir dir;
  engine::Rng rng(4);
  LlamaConfig c = tests::file_model_config();
  tests::GgufFile file = tests::tiny_gguf(c, rng);
  tests::write_plain(dir / "m.gguf", file.bytes());
  const auto checkpoint = open_checkpoint(dir / "m.gguf");
  CHECK(checkpoint->kind() == CheckpointKind::Gguf);
  CHECK(checkpoint->config().vocab == 40);
  CHECK(checkpoint->config().rms_eps == 1e-5);
  CHECK_FALSE(checkpoint->config().tied_head);
  CHECK(checkpoint->bits_per_weight() == 4.5);
  CHECK(config_to_json(config_from_json(checkpoint->config_json(), "f")) ==
        checkpoint->config_json());

  const data::Gguf gguf(dir / "m.gguf");
  const auto stored = [&](const std::string& name) {
    const data::GgufTensor& t = gguf.tensor(name);
    std::vector<float> out(static_cast<size_t>(t.numel()));
    data::gguf_dequantize(out.data(), t, name);
    return out;
  };
  CHECK(checkpoint->load("model.layers.1.self_attn.v_proj.weight", {32, 64}) ==
        stored("blk.1.attn_v.weight"));
  CHECK(checkpoint->load("model.layers.0.mlp.down_proj.weight", {64, 96}) ==
        stored("blk.0.ffn_down.weight"));
  // The converter permutes the rows of a head: (2, d/2) become (d/2, 2).
  for (const auto& [ours, theirs, heads] :
       {std::tuple("q_proj", "attn_q", 4), std::tuple("k_proj", "attn_k", 2)}) {
    const std::vector<float> w = checkpoint->load(
        "model.layers.1.self_attn." + std::string(ours) + ".weight", {heads * 16, 64});
    std::vector<float> permuted;
    for (int h = 0; h < heads; ++h)
      for (int j = 0; j < 8; ++j)
        for (int p = 0; p < 2; ++p) {
          const auto row = w.begin() + (h * 16 + p * 8 + j) * 64;
          permuted.insert(permuted.end(), row, row + 64);
        }
    CHECK(permuted == stored("blk.1." + std::string(theirs) + ".weight"));
  }
  CHECK_THROWS_WITH(checkpoint->load("model.layers.9.mlp.up_proj.weight", {96, 64}),
                    Contains("'blk.9.ffn_up.weight' is missing"));
  CHECK_THROWS_WITH(checkpoint->load("x", {1}), Contains("'x' is missing"));
}

TEST_CASE("checkpoint: a GGUF's rope factors") {
  const TempDir dir;
  LlamaConfig c = tests::file_model_config();
  c.tied_head = true;
  c.rope_theta = 5e5;
  const std::vector<float> plain = rope_inv_freq(c);
  c.rope_scaling = RopeScaling{.factor = 32};
  const std::vector<float> scaled = rope_inv_freq(c);
  const auto open = [&](const std::string& factors) {
    engine::Rng rng(4);
    tests::GgufFile file = tests::tiny_gguf(c, rng);
    file.tensor("rope_freqs.weight", {static_cast<int64_t>(factors.size() / 4)}, 0, factors);
    tests::write_plain(dir / "m.gguf", file.bytes());
    return open_checkpoint(dir / "m.gguf");
  };
  std::string llama3, own;
  for (size_t i = 0; i < 8; ++i) {
    llama3 += tests::raw(plain[i] / scaled[i]);
    own += tests::raw(1.5f);
  }
  const auto known = open(llama3);
  REQUIRE(known->config().rope_scaling);
  CHECK(known->config().rope_scaling->factor == 32);
  CHECK(rope_inv_freq(known->config()) == scaled);
  CHECK(known->config().tied_head);

  const auto unknown = open(own);
  CHECK(unknown->config().rope_factors == std::vector<float>(8, 1.5f));
  CHECK(rope_inv_freq(config_from_json(unknown->config_json(), "f")) ==
        rope_inv_freq(unknown->config()));
  CHECK_THROWS_WITH(open(own.substr(4)), Contains("'rope_freqs.weight' has shape (7)"));
  CHECK_THROWS_WITH(open(std::string(32, '\0')), Contains("a rope factor is not positive"));
}

TEST_CASE("checkpoint: a GGUF that is not a Llama, or incomplete") {
  const TempDir dir;
  const auto open = [&](const std::string& from, const std::string& to, auto edit) {
    engine::Rng rng(4);
    tests::GgufFile file = tests::tiny_gguf(tests::file_model_config(), rng);
    edit(file);
    std::string bytes = file.bytes();
    if (!from.empty()) bytes.replace(bytes.find(from), from.size(), to);
    tests::write_plain(dir / "m.gguf", bytes);
    open_checkpoint(dir / "m.gguf");
  };
  const auto same = [](tests::GgufFile&) {};
  CHECK_THROWS_WITH(
      open("architecture" + tests::raw<uint32_t>(8) + tests::gguf_string("llama"),
           "architecture" + tests::raw<uint32_t>(8) + tests::gguf_string("gemma"), same),
      Contains("unsupported architecture 'gemma'; llama, qwen2, qwen3 are read"));
  tests::GgufFile experts;
  experts.text("general.architecture", "qwen3moe");
  tests::write_plain(dir / "moe.gguf", experts.bytes());
  CHECK_THROWS_WITH(open_checkpoint(dir / "moe.gguf"),
                    Contains("'qwen3moe' is a mixture of experts"));
  CHECK_THROWS_WITH(open("llama.block_count", "llama.block_cound", same),
                    Contains("metadata 'llama.block_count' is missing"));
  CHECK_THROWS_WITH(open("blk.1.ffn_up.weight", "blk.1.ffn_ux.weight", same),
                    Contains("tensor 'blk.1.ffn_up.weight' is missing"));
  CHECK_THROWS_WITH(
      open("", "", [](auto& f) { f.tensor("blk.0.attn_q.bias", {4}, 0, std::string(16, 'x')); }),
      Contains("tensor 'blk.0.attn_q.bias' has shape (4), the model needs (64)"));
  CHECK_THROWS_WITH(
      open("", "", [](auto& f) { f.tensor("blk.0.attn_v.bias", {4}, 0, std::string(16, 'x')); }),
      Contains("'blk.0.attn_v.bias' is no part of a llama model"));
  CHECK_THROWS_WITH(open("", "", [](auto& f) { f.text("llama.rope.scaling.type", "longrope"); }),
                    Contains("unsupported rope scaling 'longrope'"));
  // Without a type, the scaling is linear.
  for (const char* type : {"", "linear", "none"}) {
    const auto scaled = [&](const char* key, float factor) {
      open("", "", [&](auto& f) {
        if (*type) f.text("llama.rope.scaling.type", type);
        f.real(key, factor);
      });
    };
    for (const char* key : {"llama.rope.scaling.factor", "llama.rope.scale_linear"}) {
      CHECK_NOTHROW(scaled(key, 1));
      CHECK_NOTHROW(scaled(key, 0));
      CHECK_THROWS_WITH(scaled(key, -4), Contains("factor is -4"));
      scaled(key, 4);
      const LlamaConfig c = open_checkpoint(dir / "m.gguf")->config();
      CHECK(c.rope_scaling.has_value() == (*type != 'n'));
      if (c.rope_scaling) CHECK(c.rope_scaling->kind == RopeKind::Linear);
      if (c.rope_scaling) CHECK(c.rope_scaling->factor == 4);
    }
    CHECK_THROWS_WITH(scaled("llama.rope.scaling.attn_factor", 2), Contains("attn_factor is 2"));
  }
  CHECK_NOTHROW(open("", "", [](auto& f) {
    f.tensor("blk.1.attn_rot_embd.weight", {8}, 0, std::string(32, 'x'));
  }));
  CHECK_THROWS_WITH(open("", "", [](auto& f) { f.integer("llama.rope.dimension_count", 8); }),
                    Contains("llama.rope.dimension_count is 8, head_dim is 16"));
  CHECK_THROWS_WITH(open("", "", [](auto& f) { f.integer("llama.vocab_size", 41); }),
                    Contains("llama.vocab_size is 41, token_embd.weight has 40 rows"));
  CHECK_THROWS_WITH(open("", "", [](auto& f) { f.integer("llama.expert_count", 8); }),
                    Contains("mixture of experts"));
}

TEST_CASE("checkpoint: an exported directory") {
  const TempDir dir;
  engine::Rng rng(5);
  const LlamaConfig c = tests::file_model_config();
  const std::string text = tests::packed_config(c);
  write_model(dir, text, tests::tiny_packed(c, 2, 32, rng));
  const auto checkpoint = open_checkpoint(dir.path());
  CHECK(checkpoint->kind() == CheckpointKind::Packed);
  CHECK(checkpoint->config_json() == text);
  const auto format = checkpoint->packed_format(kQ, 64, 64);
  REQUIRE(format);
  CHECK(*format == quant::LinearFormat{.n = 64, .k = 64, .weight = {.bits = 2, .group = 32}});
  CHECK_THROWS_WITH(checkpoint->load(kQ + ".weight", {64, 64}), Contains("is missing"));

  // Codes: 2 bits. Scales: 8 / 32. Zero points: a byte per row (K is 64 or 96). A master scale
  // each.
  int64_t bytes = 0, weights = 0;
  for (const LinearShape& l : block_linears(c)) {
    bytes += l.n * (l.k / 4 + l.k / 32 + 1) + 4;
    weights += l.n * l.k;
  }
  CHECK(checkpoint->bits_per_weight() ==
        Approx(8.0 * static_cast<double>(bytes) / static_cast<double>(weights)));
}

TEST_CASE("checkpoint: an export with other than 2 bits, and one with an unquantized linear") {
  const LlamaConfig c = tests::file_model_config();
  for (const int bits : {3, 4, 8}) {
    const TempDir dir;
    engine::Rng rng(6);
    write_model(dir, tests::packed_config(c, "\"bits\": 2", "\"bits\": " + std::to_string(bits)),
                tests::tiny_packed(c, bits, 32, rng));
    CHECK(open_checkpoint(dir.path())->packed_format(kQ, 64, 64)->weight.bits == bits);
  }
  const TempDir dir;
  engine::Rng rng(6);
  std::vector<FileTensor> tensors = tests::tiny_packed(c, 2, 32, rng);
  for (const char* suffix : {".scales", ".zeros", ".master_scale"}) remove(tensors, kQ + suffix);
  named(tensors, kQ + ".qweight").name = kQ + ".weight";
  change(tensors, kQ + ".weight", FileDType::BF16, {64, 64});
  write_model(dir, tests::packed_config(c, "\"lm_head\"", "\"lm_head\", \"" + kQ + "\""), tensors);
  const auto checkpoint = open_checkpoint(dir.path());
  CHECK_FALSE(checkpoint->packed_format(kQ, 64, 64));
  CHECK(checkpoint->load(kQ + ".weight", {64, 64}).size() == 64 * 64);
}

TEST_CASE("checkpoint: quantization_config is checked exactly") {
  const TempDir dir;
  engine::Rng rng(7);
  const LlamaConfig c = tests::file_model_config();
  const std::vector<FileTensor> tensors = tests::tiny_packed(c, 2, 32, rng);
  const auto open = [&](const std::string& from, const std::string& to) {
    write_model(dir, tests::packed_config(c, from, to), tensors);
    open_checkpoint(dir.path());
  };
  CHECK_NOTHROW(open(R"("nested": false,)", R"("nested": false, "overrides": {},)"));
  struct Case {
    const char *from, *to, *message;
  };
  const Case cases[] = {
      {"\"bbb\"", "\"gptq\"", "unsupported quant_method \"gptq\""},
      {R"("quant_method": "bbb", )", "", "'quant_method' is missing"},
      {"\"format_version\": 1", "\"format_version\": 2", "unsupported format_version 2"},
      {"float8_e4m3fn", "float8_e5m2", "unsupported scale_dtype \"float8_e5m2\""},
      {"\"bits\": 2", "\"bits\": 5", "unsupported bits 5"},
      {"\"bits\": 2", "\"bits\": \"2\"", "unsupported bits \"2\""},
      {"\"group_size\": 32", "\"group_size\": 16", "unsupported group_size 16"},
      {"\"symmetric\": false", "\"symmetric\": true", "zeros' is one too many"},
      {"\"activation_bits\": 16", "\"activation_bits\": 5", "unsupported activation_bits 5"},
      {"\"nested\": false", "\"nested\": true", "nested codes of 2 bits"},
      {"\"nested\": false", "\"nested\": 1", "unsupported nested 1"},
      {"\"nested\": false", R"("rotate": "rows")", "unsupported rotate \"rows\""},
      {"\"nested\": false", R"("activation_range": "max")", "unsupported activation_range"},
      {"\"nested\": false", R"("overrides": [])", "overrides is not an object"},
      {"\"nested\": false", R"("overrides": {"a": {}})", "overrides of 'a': no linear"},
      {"\"nested\": false", R"("novel": 1)", "unknown key 'novel'"},
      {"\"lm_head\"", "\"lm_tail\"", "modules_to_not_convert holds \"lm_tail\""},
  };
  for (const Case& k : cases) {
    INFO(k.message);
    CHECK_THROWS_WITH(open(k.from, k.to), Contains(k.message));
  }
  // Bits and group sizes that do not match the tensors.
  CHECK_THROWS_WITH(open("\"bits\": 2", "\"bits\": 4"), Contains("qweight' has shape"));
  CHECK_THROWS_WITH(open("\"group_size\": 32", "\"group_size\": 64"),
                    Contains("scales' has shape"));
}

TEST_CASE("checkpoint: exported tensors are checked one by one") {
  const LlamaConfig c = tests::file_model_config();
  const auto open = [&](auto edit) {
    const TempDir dir;
    engine::Rng rng(8);
    std::vector<FileTensor> tensors = tests::tiny_packed(c, 2, 32, rng);
    edit(tensors);
    write_model(dir, tests::packed_config(c), tensors);
    open_checkpoint(dir.path());
  };
  for (const char* suffix : {".qweight", ".scales", ".zeros", ".master_scale"})
    CHECK_THROWS_WITH(open([&](auto& t) { remove(t, kQ + suffix); }),
                      Contains("tensor '" + kQ + suffix + "' is missing"));
  CHECK_THROWS_WITH(open([](auto& t) {
                      change(t, kQ + ".zeros", FileDType::U8, {64, 2});
                    }),
                    Contains("zeros' has shape (64, 2), the model needs (64, 1)"));
  CHECK_THROWS_WITH(open([](auto& t) {
                      change(t, kQ + ".scales", FileDType::U8, {64, 2});
                    }),
                    Contains("scales' is U8, not F8_E4M3"));
  CHECK_THROWS_WITH(open([](auto& t) { change(t, "model.norm.weight", FileDType::BF16, {64}); }),
                    Contains("'model.norm.weight' is BF16, not F32"));
  for (const float s : {0.0f, -0.5f, 0.3f, INFINITY, NAN})
    CHECK_THROWS_WITH(open([&](auto& t) { named(t, kQ + ".master_scale").bytes = tests::raw(s); }),
                      Contains("not a power of two"));
  for (const char* extra : {".split_channels", ".outlier_channels"})
    CHECK_THROWS_WITH(open([&](auto& t) {
                        t.push_back({kQ + extra, FileDType::I32, {1}, tests::raw(int32_t{3})});
                      }),
                      Contains(std::string(extra) == ".split_channels"
                                   ? "qweight' has shape (64, 16), the model needs (64, 24)"
                                   : "1 outlier channels are no multiple of the group 32"));
  CHECK_THROWS_WITH(open([](auto& t) {
                      t.push_back({"extra", FileDType::U8, {1}, "x"});
                    }),
                    Contains("'extra' is one too many"));
  CHECK_THROWS_WITH(open([](auto& t) {
                      t.push_back({kQ + ".weight", FileDType::U8, {1}, "x"});
                    }),
                    Contains(".weight' is one too many"));
}

TEST_CASE("checkpoint: the demo model") {
  const std::string path = tests::demo_model();
  if (path.empty()) return;
  const auto checkpoint = open_checkpoint(path);
  CHECK(checkpoint->config_json() == config_to_json(synthetic_config("smollm2-135m")));
  CHECK(checkpoint->bits_per_weight() == 5);
  // Values of the reference package (gguf.quants.dequantize), with K's rows unpermuted.
  const std::vector<float> k =
      checkpoint->load("model.layers.0.self_attn.k_proj.weight", {192, 576});
  CHECK(k[0] == Approx(-0.15527344));
  CHECK(k[576] == Approx(0.20336914));
  CHECK(k[33 * 576 + 5] == Approx(0.22955322));
}
