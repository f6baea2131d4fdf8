#include "data/gzip.h"

#include <zlib.h>

#include <algorithm>

#include "quant/check.h"

namespace bbb::data {
namespace {

constexpr size_t kChunkBytes = size_t{1} << 20;
constexpr int kGzipOnly = 16 + MAX_WBITS;

struct Inflater {
  z_stream stream = {};
  Inflater() { BBB_CHECK(inflateInit2(&stream, kGzipOnly) == Z_OK, "zlib cannot start"); }
  ~Inflater() { inflateEnd(&stream); }
};

}  // namespace

bool is_gzip(const std::string& content) { return content.starts_with("\x1f\x8b"); }

std::string gunzip(const std::string& content, const std::string& path) {
  Inflater inflater;
  z_stream& stream = inflater.stream;
  auto* const first = reinterpret_cast<Bytef*>(const_cast<char*>(content.data()));
  std::string out;
  int state = Z_OK;
  size_t read = 0;
  do {
    // The counters of zlib have 32 bits.
    const size_t piece = std::min(content.size() - read, kChunkBytes), before = out.size();
    out.resize(before + kChunkBytes);
    stream.next_in = first + read;
    stream.avail_in = static_cast<uInt>(piece);
    stream.next_out = reinterpret_cast<Bytef*>(out.data() + before);
    stream.avail_out = static_cast<uInt>(kChunkBytes);
    state = inflate(&stream, Z_NO_FLUSH);
    read += piece - stream.avail_in;
    out.resize(before + kChunkBytes - stream.avail_out);
    if (state != Z_STREAM_END && state != Z_OK && state != Z_BUF_ERROR) break;
    if (state == Z_STREAM_END && read < content.size()) inflateReset(&stream);  // another member
  } while (read < content.size() || (state == Z_OK && stream.avail_out == 0));
  BBB_CHECK(state == Z_STREAM_END, path, ": its gzip content is cut short or damaged",
            stream.msg != nullptr ? cat(" (", stream.msg, ")") : "");
  return out;
}

}  // namespace bbb::data
