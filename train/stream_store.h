// Streams: the hidden states of all windows, (N, T, D) act, in the fastest memory that has room.
//
//     Device   a tensor; a recorded step gathers its rows itself
//     Host     page-locked memory, copied in batches
//     File     a file in the scratch directory, read and written by its own threads, with direct
//              I/O if the file system supports it
//
// Batches of streams off the device move through a Ring, which one Reader or Writer uses at a time:
//
//     Reader   File -> staging -> slot -> batch     Writer   batch -> slot -> staging -> File
//              Host -----------> slot -> batch               batch -> slot -----------> Host
//
// A Ring has kAhead slots on the device, for files as many page-locked staging buffers, and a batch
// tensor at a fixed address, so that recorded steps can read it.
//
// A Reader knows the rows of all its batches and reads kAhead of them ahead while the device
// computes. A Writer returns before a batch is written. Neither changes a byte, so the place of a
// stream changes no result.
//
// Rows are stored at a stride of whole pages, as direct I/O requires.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "engine/backend.h"
#include "train/config.h"

namespace bbb::train {

enum class Tier { Device, Host, File };

struct StreamShape {
  int64_t rows = 0;        // N
  int64_t row_numel = 0;   // T * D
  int64_t row_bytes = 0;   // in act
  int64_t batch_rows = 0;  // rows of the largest batch

  int64_t stride_bytes() const;
};

// The room for streams. `scratch`: the directory, "" if there is none.
struct StreamRoom {
  int64_t device_bytes = 0;
  int64_t host_bytes = 0;
  std::string scratch;
  int64_t scratch_bytes = 0;
};

// The place of each stream, and the bytes that they take, rings included.
struct StreamPlan {
  std::vector<Tier> tiers;
  int rings = 0;
  std::string scratch;
  int64_t device_bytes = 0;
  int64_t host_bytes = 0;
  int64_t scratch_bytes = 0;

  bool uses(Tier tier) const;
};

// Places the first streams on the device, the next on the host, the last in files. `rings`: how
// many rings are needed if any stream is off the device. Throws, saying what to change, if the
// streams do not fit.
StreamPlan plan_streams(int64_t count, int rings, const StreamShape& shape, const StreamRoom& room);

class RowFile;     // one file and its threads
struct FileBatch;  // rows on their way from or to a file
class Stream;
class Reader;
class Writer;

class Ring {
 public:
  static constexpr int kAhead = 2;

  static int64_t device_bytes(int rings, const StreamShape& shape);

  Ring(engine::Backend& backend, const StreamShape& shape, bool staging);
  ~Ring();  // waits for all copies
  Ring(const Ring&) = delete;
  Ring& operator=(const Ring&) = delete;

  const engine::Tensor& batch() const { return batch_; }  // act (batch_rows, T * D)

 private:
  friend class Reader;
  friend class Writer;
  struct Slot {
    engine::Tensor tensor;                    // act (batch_rows, T * D)
    std::shared_ptr<engine::Storage> host;    // rows at their stride
    std::shared_ptr<engine::Fence> copied;    // the last copy between tensor and host memory
    std::shared_ptr<engine::Fence> computed;  // Compute has read or written the tensor
  };
  engine::Backend& backend_;
  engine::Tensor batch_;
  Slot slots_[kAhead];
};

class Stream {
 public:
  // A file gets its space at once. Throws if there is no room.
  Stream(engine::Backend& backend, const StreamShape& shape, Tier tier, const std::string& scratch);
  ~Stream();

  Tier tier() const { return tier_; }
  const engine::Tensor& resident() const { return resident_; }  // (N, T * D); else undefined

 private:
  friend class Reader;
  friend class Writer;
  char* host_row(int64_t row) const;

  engine::Backend& backend_;
  StreamShape shape_;
  Tier tier_;
  engine::Tensor resident_;
  std::shared_ptr<engine::Storage> host_;
  std::unique_ptr<RowFile> file_;
};

// Reads batches of `batch_rows` rows in the given order; the last batch may be shorter. Writers of
// the stream must have finished. A stream on the device is read in place, so each of its batches
// must be consecutive rows.
class Reader {
 public:
  // `ring` may be null if the stream is on the device.
  Reader(engine::Backend& backend, Stream& stream, Ring* ring, std::vector<int32_t> rows);
  ~Reader();
  Reader(const Reader&) = delete;
  Reader& operator=(const Reader&) = delete;

  // The next batch, act (count, T * D), valid until the next call: rows of ring->batch(), or of the
  // stream on the device.
  engine::Tensor next();

 private:
  int64_t first(int64_t batch) const { return batch * stream_.shape_.batch_rows; }
  int64_t count(int64_t batch) const;
  void fetch(int64_t batch);  // file -> staging, or host -> device
  void load(int64_t batch);   // host memory -> device

  engine::Backend& backend_;
  Stream& stream_;
  Ring* ring_;
  std::vector<int32_t> rows_;
  std::unique_ptr<FileBatch> files_[Ring::kAhead];
  int64_t next_ = 0;
};

// Writes batches of consecutive rows.
class Writer {
 public:
  Writer(engine::Backend& backend, Stream& stream, Ring* ring);
  ~Writer();
  Writer(const Writer&) = delete;
  Writer& operator=(const Writer&) = delete;

  void write(int64_t row, const engine::Tensor& batch);  // act (count, ...); may be reused at once
  void finish();  // returns when every row is stored; throws if one could not be written

 private:
  struct Slot {
    std::unique_ptr<FileBatch> file;
    int64_t row = 0;
    int64_t count = 0;  // rows that are copied to staging but not yet submitted to the file
  };
  void flush(int slot);  // waits for the copy to staging, then submits it to the file

  engine::Backend& backend_;
  Stream& stream_;
  Ring* ring_;
  Slot slots_[Ring::kAhead];
  int64_t written_ = 0;
};

}  // namespace bbb::train
