// Streams: the hidden states of all windows, (N, T, D) act, in the fastest memory that has room.
//
//     Device   a tensor; a recorded step gathers its rows itself
//     Host     page-locked memory, copied over in batches
//     File     a file in the scratch directory, direct I/O where it can be had, through page-locked
//              staging by threads of its own
//
// Off the device, a stream is read ahead and written behind: a Reader knows the rows of all its
// batches and keeps kAhead of them under way while the device computes; a Writer hands a batch over
// and goes on. Neither changes a byte, so where a stream lies changes no result.
//
// A Ring is what a Reader or a Writer moves batches through, one of them at a time: kAhead slots on
// the device, as many staging buffers for files, and the batch tensor that readers fill, whose
// address stays, so that recorded steps can read it.
//
// A row is stored at a stride of whole pages, which direct I/O asks for.
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
  int64_t batch_rows = 0;  // of the largest batch

  int64_t stride_bytes() const;
};

// What there is to place streams in. `scratch` is "" where there is none.
struct StreamRoom {
  int64_t device_bytes = 0;
  int64_t host_bytes = 0;
  std::string scratch;
  int64_t scratch_bytes = 0;
};

// Where each stream goes, and what that takes.
struct StreamPlan {
  std::vector<Tier> tiers;
  int rings = 0;
  std::string scratch;
  int64_t device_bytes = 0;
  int64_t host_bytes = 0;
  int64_t scratch_bytes = 0;

  bool uses(Tier tier) const;
};

// Free bytes of the file system that holds `directory`. Throws where there is no such directory.
int64_t free_disk_bytes(const std::string& directory);

// The first streams lie on the device, the next on the host, the last in files. `rings`: those in
// use where some stream is off the device. Throws, saying what to change, where they do not fit.
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
  ~Ring();  // waits for what is under way
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
    std::shared_ptr<engine::Fence> computed;  // Compute is done with the tensor
  };
  engine::Backend& backend_;
  engine::Tensor batch_;
  Slot slots_[kAhead];
};

class Stream {
 public:
  // A file is created and given its space at once: a full disk is an error here.
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

// Reads batches of `batch_rows` rows in the given order, the last one perhaps shorter. Whatever was
// written before must have been finished. A stream on the device is read in place: its batches must
// be runs of consecutive rows.
class Reader {
 public:
  // `ring` is used only where the stream is off the device.
  Reader(engine::Backend& backend, Stream& stream, Ring* ring, std::vector<int32_t> rows);
  ~Reader();
  Reader(const Reader&) = delete;
  Reader& operator=(const Reader&) = delete;

  // The next batch, good until the one after it is asked for: rows of ring.batch(), or of the
  // stream itself.
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
  void finish();  // returns when every row lies where it belongs; throws what went wrong on the way

 private:
  struct Slot {
    std::unique_ptr<FileBatch> file;
    int64_t row = 0;
    int64_t count = 0;  // rows on their way to staging, not yet given to the file
  };
  void flush(int slot);  // staging -> file, once the device's copy has arrived

  engine::Backend& backend_;
  Stream& stream_;
  Ring* ring_;
  Slot slots_[Ring::kAhead];
  int64_t written_ = 0;
};

}  // namespace bbb::train
