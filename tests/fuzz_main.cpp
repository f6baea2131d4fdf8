// Mutation fuzzer for the parsers: bbb_fuzz COUNT SEED. It takes well-formed safetensors, GGUF,
// config.json, exported directories, GGUF models and split ones, damages each a little, and reads
// it. A bad file may only cause a bbb::Error of one line. An accepted file is read to its last
// byte, under sanitizers. Prints a summary line; on any other outcome the exit code is not 0.
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <memory>

#include "models/checkpoint.h"
#include "tests/model_files.h"

// Inputs are below 200 kB. A larger allocation means that a count from a file was not checked.
extern "C" const char* __asan_default_options();
extern "C" const char* __asan_default_options() { return "max_allocation_size_mb=64"; }

namespace {

using namespace bbb;
using engine::Rng;

const uint64_t kNasty[] = {0,          1,          2,          7,          31,         33,
                           255,        0x7fff,     0x80000000, 0xffffffff, 1ull << 32, 1ull << 40,
                           1ull << 61, 1ull << 62, INT64_MAX,  1ull << 63, ~0ull - 1,  ~0ull};
constexpr int64_t kNastyCount = std::size(kNasty);
const char* const kFragments[] = {
    "{",  "}", "[",     "]",  "null", "-1",      "1e999", "\"\"", "true", "0.5", "\\ud800",  "\xff",
    "\n", ":", "[[[[[", "{}", "1e18", "\"F32\"", "\"a\"", "\"..", ",",    "NaN", "-Infinity"};
constexpr int64_t kFragmentCount = std::size(kFragments);

// Half of all edits fall on the first 2 kB, where headers are.
size_t position(Rng& rng, const std::string& s) {
  const size_t reach = rng.below(2) ? std::min<size_t>(s.size(), 2048) : s.size();
  return static_cast<size_t>(rng.below(static_cast<int64_t>(reach) + 1));
}

void edit_bytes(Rng& rng, std::string& s) {
  const size_t at = position(rng, s);
  const size_t span = std::min<size_t>(static_cast<size_t>(1 + rng.below(16)), s.size() - at);
  switch (rng.below(7)) {
    case 0:
      if (at < s.size()) s[at] = static_cast<char>(s[at] ^ (1 << rng.below(8)));
      break;
    case 1:
      if (at < s.size()) s[at] = static_cast<char>(rng.below(256));
      break;
    case 2: {  // an integer of a size that headers hold
      const std::string value = tests::raw(kNasty[rng.below(kNastyCount)]);
      const size_t width = rng.below(2) ? 8 : 4;
      if (at + width <= s.size()) s.replace(at, width, value.substr(0, width));
      break;
    }
    case 3:
      if (rng.below(4) == 0) s.resize(at);
      break;
    case 4:
      s.erase(at, span);
      break;
    case 5:
      s.insert(at, s.substr(at, span));
      break;
    case 6:
      s.insert(at, tests::random_bytes(rng, 1 + rng.below(9)));
      break;
  }
}

void edit_text(Rng& rng, std::string& s) {
  if (rng.below(3) == 0) return edit_bytes(rng, s);
  size_t at = static_cast<size_t>(rng.below(static_cast<int64_t>(s.size()) + 1));
  const size_t digit = s.find_first_of("0123456789", at);
  switch (rng.below(3)) {
    case 0:  // another number
      if (digit != std::string::npos) {
        const size_t end = s.find_first_not_of("0123456789", digit);
        s.replace(digit, end - digit, std::to_string(kNasty[rng.below(kNastyCount)]));
      }
      break;
    case 1:
      s.insert(at, kFragments[rng.below(kFragmentCount)]);
      break;
    case 2: {  // copies text up to a comma to another place: doubled keys, swapped values
      const size_t from = s.find_first_of(",:{", at);
      if (from == std::string::npos) break;
      const std::string piece = s.substr(from, s.find_first_of(",}", from + 1) - from);
      s.insert(
          s.find_first_of(",}", static_cast<size_t>(rng.below(static_cast<int64_t>(s.size())))) %
              s.size(),
          piece);
      break;
    }
  }
}

// Edits a safetensors file: mostly its header's text, and then corrects the header's length.
void edit_safetensors(Rng& rng, std::string& file) {
  if (rng.below(4) == 0) return edit_bytes(rng, file);
  uint64_t length;
  std::memcpy(&length, file.data(), sizeof length);
  std::string header = file.substr(8, length);
  const std::string data = file.substr(8 + length);
  edit_text(rng, header);
  file = tests::safetensors_file(header, data);
}

using Edit = void (*)(Rng&, std::string&);

std::string broken(Rng& rng, std::string s, Edit edit) {
  if (edit == edit_safetensors)
    edit(rng, s);  // once: a second edit would need a parsed header
  else
    for (int64_t n = 1 + rng.below(3); n > 0; --n) edit(rng, s);
  return s;
}

volatile uint8_t g_sink;
void touch(const uint8_t* data, int64_t bytes) {
  uint8_t sum = 0;
  for (int64_t i = 0; i < bytes; ++i) sum = static_cast<uint8_t>(sum + data[i]);
  g_sink = sum;
}

// A heap copy of exactly this size: a sanitizer reports an access one byte past it.
std::unique_ptr<uint8_t[]> exact(const std::string& s) {
  auto copy = std::make_unique<uint8_t[]>(s.size());
  std::memcpy(copy.get(), s.data(), s.size());
  return copy;
}

void read_safetensors(const std::string& s) {
  const auto copy = exact(s);
  const auto tensors = data::parse_safetensors(copy.get(), static_cast<int64_t>(s.size()), "input");
  for (const auto& [name, t] : tensors) touch(t.data, t.bytes);
}

void read_gguf(const std::string& s) {
  const auto copy = exact(s);
  const data::GgufContents contents =
      data::parse_gguf(copy.get(), static_cast<int64_t>(s.size()), "input");
  for (const auto& [name, t] : contents.tensors) {
    std::vector<float> out(static_cast<size_t>(t.numel()));
    data::gguf_dequantize(out.data(), t, name);
  }
}

void read_checkpoint(const std::string& path) {
  const auto checkpoint = models::open_checkpoint(path);
  const models::LlamaConfig& c = checkpoint->config();
  models::rope_inv_freq(c);
  models::config_from_json(checkpoint->config_json(), "its own config.json");
  for (int64_t i = 0; i < c.layers; ++i)
    for (const models::LinearShape& l : models::block_linears(c)) {
      const std::string name = models::layer_name(i, l.name);
      if (const auto format = checkpoint->packed_format(name, l.n, l.k))
        for (const quant::StoredTensor& t : format->tensors())
          touch(checkpoint->stored(name + t.suffix), t.bytes());
      else
        checkpoint->load(name + ".weight", {l.n, l.k});
    }
  checkpoint->check_finite();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: bbb_fuzz COUNT SEED\n");
    return 2;
  }
  const int64_t count = std::atoll(argv[1]);
  Rng rng(static_cast<uint64_t>(std::atoll(argv[2])));

  models::LlamaConfig config = tests::file_model_config();
  config.vocab = 8;
  config.layers = 1;
  config.d_model = config.hidden = 32;
  config.rope_scaling = models::RopeScaling{};
  const std::string packed = tests::safetensors_of(tests::tiny_packed(config, 2, 32, rng));
  const std::string packed_json = tests::packed_config(config);
  const std::string few =
      tests::safetensors_of({tests::file_tensor("a", data::FileDType::F32, {2, 3}, rng),
                             tests::file_tensor("b.weight", data::FileDType::BF16, {4}, rng),
                             tests::file_tensor("c", data::FileDType::U8, {}, rng)});
  const std::string plain_json = models::config_to_json(config);
  tests::GgufFile gguf = tests::tiny_gguf(config, rng);
  const std::string model = gguf.bytes();
  gguf.pair("strings", 9,
            tests::raw<uint32_t>(8) + tests::raw<uint64_t>(2) + tests::gguf_string("a") +
                tests::gguf_string("bb"));
  gguf.pair("flags", 9, tests::raw<uint32_t>(7) + tests::raw<uint64_t>(3) + std::string(3, '\1'));
  gguf.pair("reals", 9, tests::raw<uint32_t>(12) + tests::raw<uint64_t>(1) + tests::raw(0.5));
  gguf.integer("general.alignment", 32);
  gguf.tensor("k", {256}, 14, tests::random_bytes(rng, 210));
  const std::string rich = gguf.bytes();

  // A split model: the second part holds one tensor.
  const char* const moved = "blk.0.ffn_down.weight";
  tests::GgufFile first = tests::tiny_gguf(config, rng, moved), second;
  for (tests::GgufFile* part : {&first, &second}) {
    part->integer("split.no", part == &second);
    part->integer("split.count", 2);
  }
  second.tensor(moved, {config.d_model, config.hidden}, 0,
                std::string(static_cast<size_t>(4 * config.d_model * config.hidden), '\0'));
  const std::string parts[] = {first.bytes(), second.bytes()};

  const std::string directory =
      (std::filesystem::temp_directory_path() / ("bbb_fuzz-" + std::to_string(::getpid())))
          .string();
  std::filesystem::create_directories(directory);
  const std::string config_path = directory + "/config.json",
                    weights_path = directory + "/model.safetensors",
                    model_path = directory + "/model.gguf",
                    part_paths[] = {directory + "/part-00001-of-00002.gguf",
                                    directory + "/part-00002-of-00002.gguf"};
  const std::function<void()> kinds[] = {
      [&] { read_safetensors(broken(rng, few, edit_safetensors)); },
      [&] { read_gguf(broken(rng, rich, edit_bytes)); },
      [&] { models::config_from_json(broken(rng, plain_json, edit_text), "config.json"); },
      [&] {
        const bool weights = rng.below(2);
        tests::write_plain(config_path,
                           weights ? packed_json : broken(rng, packed_json, edit_text));
        tests::write_plain(weights_path, weights ? broken(rng, packed, edit_safetensors) : packed);
        read_checkpoint(directory);
      },
      [&] {
        tests::write_plain(model_path, broken(rng, model, edit_bytes));
        read_checkpoint(model_path);
      },
      [&] {
        const int64_t at = rng.below(2);
        for (int64_t i : {0, 1})
          tests::write_plain(part_paths[i], i == at ? broken(rng, parts[i], edit_bytes) : parts[i]);
        read_checkpoint(part_paths[0]);
      }};
  // Whole models are the slowest inputs: three of twelve.
  const int schedule[] = {0, 1, 2, 0, 1, 2, 0, 1, 2, 3, 4, 5};

  int64_t refused = 0;
  int code = 0;
  int64_t i = 0;
  for (; i < count && code == 0; ++i) {
    try {
      kinds[schedule[i % static_cast<int64_t>(std::size(schedule))]]();
    } catch (const Error& e) {
      ++refused;
      const std::string what = e.what();
      if (what.empty() || what.find('\n') != std::string::npos ||
          what.find("internal error") != std::string::npos) {
        std::printf("bbb_fuzz: input %lld: not a one-line error about the input: %s\n",
                    static_cast<long long>(i), what.c_str());
        code = 1;
      }
    } catch (const std::exception& e) {
      std::printf("bbb_fuzz: input %lld: %s\n", static_cast<long long>(i), e.what());
      code = 1;
    }
  }
  std::filesystem::remove_all(directory);
  std::printf("bbb_fuzz: %lld inputs, seed %s: %lld refused, %lld accepted\n",
              static_cast<long long>(i), argv[2], static_cast<long long>(refused),
              static_cast<long long>(i - refused));
  return code;
}
