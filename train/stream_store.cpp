#include "train/stream_store.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <mutex>
#include <thread>

namespace bbb::train {

using engine::Backend;
using engine::Lane;
using engine::Tensor;

namespace {

constexpr int64_t kPage = 4096;
constexpr int kFileThreads = 4;  // disks are faster with several requests in flight

int64_t megabytes(int64_t bytes) { return (bytes + 999'999) / 1'000'000; }

// Waits for all lanes. For destructors: the error of a failed lane is reported elsewhere.
void drain(Backend& backend) noexcept {
  for (Lane lane : {Lane::Compute, Lane::Load, Lane::Store}) try {
      backend.transfers().mark(lane)->wait();
    } catch (const std::exception&) {
    }
}

}  // namespace

struct FileBatch {
  int64_t outstanding = 0;  // rows not yet moved
  std::string error;        // the first error, or ""
};

class RowFile {
 public:
  enum class Direction { Read, Write };

  RowFile(const std::string& directory, int64_t rows, int64_t stride_bytes)
      : name_(directory + "/bbb-stream-XXXXXX"), stride_bytes_(stride_bytes) {
    fd_ = mkostemp(name_.data(), O_CLOEXEC);
    BBB_CHECK(fd_ >= 0, directory, ": no scratch file can be made there: ", std::strerror(errno));
    unlink(name_.c_str());  // so that the space is freed however the process ends
    const int error = posix_fallocate(fd_, 0, rows * stride_bytes);
    if (error != 0) {
      close(fd_);
      throw Error(cat(directory, ": no room for a scratch file of ", megabytes(rows * stride_bytes),
                      " MB: ", std::strerror(error)));
    }
    fcntl(fd_, F_SETFL, O_DIRECT);  // fails if the file system does not support it
    for (int i = 0; i < kFileThreads; ++i) threads_.emplace_back([this] { work(); });
  }

  ~RowFile() {
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
    close(fd_);
  }
  RowFile(const RowFile&) = delete;
  RowFile& operator=(const RowFile&) = delete;

  void submit(Direction direction, int64_t row, char* memory, FileBatch& batch) {
    {
      const std::lock_guard lock(mutex_);
      jobs_.push_back({direction, row, memory, &batch});
      ++batch.outstanding;
    }
    wake_.notify_one();
  }

  void wait(FileBatch& batch) {
    wait_done(batch);
    BBB_CHECK(batch.error.empty(), batch.error);
  }

  // Does not throw the batch's error: for destructors.
  void wait_done(FileBatch& batch) {
    std::unique_lock lock(mutex_);
    done_.wait(lock, [&] { return batch.outstanding == 0; });
  }

 private:
  struct Job {
    Direction direction;
    int64_t row;
    char* memory;
    FileBatch* batch;
  };

  void work() {
    std::unique_lock lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return stopping_ || !jobs_.empty(); });
      if (jobs_.empty()) return;
      const Job job = jobs_.front();
      jobs_.pop_front();
      lock.unlock();
      const std::string error = move_row(job);
      lock.lock();
      if (!error.empty() && job.batch->error.empty()) job.batch->error = error;
      if (--job.batch->outstanding == 0) done_.notify_all();
    }
  }

  // Returns the error, or "".
  std::string move_row(const Job& job) {
    const bool reads = job.direction == Direction::Read;
    for (int64_t done = 0; done < stride_bytes_;) {
      const auto size = static_cast<size_t>(stride_bytes_ - done);
      const off_t at = job.row * stride_bytes_ + done;
      const ssize_t moved = reads ? pread(fd_, job.memory + done, size, at)
                                  : pwrite(fd_, job.memory + done, size, at);
      if (moved > 0) {
        done += moved;
      } else if (moved < 0 && errno == EINVAL && (fcntl(fd_, F_GETFL) & O_DIRECT) != 0) {
        fcntl(fd_, F_SETFL, 0);  // direct I/O needs a larger alignment here: do without
      } else if (moved == 0 || errno != EINTR) {
        return cat(name_, ": cannot be ", reads ? "read" : "written", ": ",
                   moved == 0 ? "it ends early" : std::strerror(errno));
      }
    }
    return "";
  }

  std::string name_;
  int64_t stride_bytes_;
  int fd_ = -1;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::deque<Job> jobs_;
  bool stopping_ = false;
  std::vector<std::thread> threads_;
};

int64_t StreamShape::stride_bytes() const { return (row_bytes + kPage - 1) / kPage * kPage; }

bool StreamPlan::uses(Tier tier) const {
  return std::find(tiers.begin(), tiers.end(), tier) != tiers.end();
}

StreamPlan plan_streams(int64_t count, int rings, const StreamShape& shape,
                        const StreamRoom& room) {
  const int64_t on_device_bytes = shape.rows * shape.row_bytes;
  const int64_t elsewhere_bytes = shape.rows * shape.stride_bytes();
  const auto fit = [](int64_t bytes, int64_t each, int64_t most) {
    return std::clamp<int64_t>(bytes / each, 0, most);
  };
  StreamPlan plan;
  int64_t device = fit(room.device_bytes, on_device_bytes, count), host = 0;
  if (device < count) {
    plan.rings = rings;
    plan.device_bytes = Ring::device_bytes(rings, shape);
    device = fit(room.device_bytes - plan.device_bytes, on_device_bytes, count - 1);
    host = fit(room.host_bytes, elsewhere_bytes, count - device);
  }
  int64_t files = count - device - host;
  if (files > 0) {
    plan.scratch = room.scratch;
    plan.host_bytes = rings * Ring::kAhead * shape.batch_rows * shape.stride_bytes();
    host = fit(room.host_bytes - plan.host_bytes, elsewhere_bytes, count - device);
    files = count - device - host;
  }
  plan.device_bytes += device * on_device_bytes;
  plan.host_bytes += host * elsewhere_bytes;
  plan.scratch_bytes = files * elsewhere_bytes;

  const std::string what =
      cat(count, " streams of ", megabytes(on_device_bytes), " MB do not fit: ");
  BBB_CHECK(plan.device_bytes <= room.device_bytes, what, "even the batches in use need ",
            megabytes(plan.device_bytes), " MB of the device, which has ",
            megabytes(room.device_bytes),
            " MB left for them: raise --gpu-memory, or lower --batch or --seq-len");
  const std::string places = cat(device, " fit on the device, ", host, " in ",
                                 megabytes(room.host_bytes), " MB of host memory");
  BBB_CHECK(files == 0 || !room.scratch.empty(), what, places,
            ": raise --host-memory, name a --scratch directory, or lower --samples or --seq-len");
  BBB_CHECK(plan.host_bytes <= room.host_bytes, what, "the batches in use of scratch files need ",
            megabytes(plan.host_bytes), " MB of host memory, and may take ",
            megabytes(room.host_bytes), " MB: raise --host-memory, or lower --batch or --seq-len");
  BBB_CHECK(plan.scratch_bytes <= room.scratch_bytes, what, places, ", and --scratch ",
            room.scratch, " has ", megabytes(room.scratch_bytes), " MB free of the ",
            megabytes(plan.scratch_bytes),
            " MB for the rest: make room there, or lower --samples or --seq-len");
  plan.tiers.insert(plan.tiers.end(), static_cast<size_t>(device), Tier::Device);
  plan.tiers.insert(plan.tiers.end(), static_cast<size_t>(host), Tier::Host);
  plan.tiers.insert(plan.tiers.end(), static_cast<size_t>(files), Tier::File);
  return plan;
}

int64_t Ring::device_bytes(int rings, const StreamShape& shape) {
  return rings * (1 + kAhead) * shape.batch_rows * shape.row_bytes;
}

Ring::Ring(Backend& backend, const StreamShape& shape, bool staging) : backend_(backend) {
  const engine::Shape batch{shape.batch_rows, shape.row_numel};
  batch_ = backend.empty(batch, backend.act());
  for (Slot& slot : slots_) {
    slot.tensor = backend.empty(batch, backend.act());
    slot.computed = backend.transfers().mark(Lane::Compute);
    slot.copied = slot.computed;
    if (staging)
      slot.host = backend.transfers().host_buffer(shape.batch_rows * shape.stride_bytes());
  }
}

Ring::~Ring() { drain(backend_); }

Stream::Stream(Backend& backend, const StreamShape& shape, Tier tier, const std::string& scratch)
    : backend_(backend), shape_(shape), tier_(tier) {
  switch (tier) {
    case Tier::Device:
      resident_ = backend.empty({shape.rows, shape.row_numel}, backend.act());
      break;
    case Tier::Host:
      host_ = backend.transfers().host_buffer(shape.rows * shape.stride_bytes());
      break;
    case Tier::File:
      file_ = std::make_unique<RowFile>(scratch, shape.rows, shape.stride_bytes());
      break;
  }
}

Stream::~Stream() { drain(backend_); }

char* Stream::host_row(int64_t row) const {
  return static_cast<char*>(host_->data()) + row * shape_.stride_bytes();
}

Reader::Reader(Backend& backend, Stream& stream, Ring* ring, std::vector<int32_t> rows)
    : backend_(backend), stream_(stream), ring_(ring), rows_(std::move(rows)) {
  if (stream_.tier() == Tier::Device) return;
  BBB_ASSERT(ring_ != nullptr);
  for (std::unique_ptr<FileBatch>& file : files_) file = std::make_unique<FileBatch>();
  for (int64_t batch = 0; batch < Ring::kAhead; ++batch) fetch(batch);
  if (stream_.tier() == Tier::File) load(0);
}

Reader::~Reader() {
  for (std::unique_ptr<FileBatch>& file : files_)
    if (file && stream_.file_) stream_.file_->wait_done(*file);
}

int64_t Reader::count(int64_t batch) const {
  const int64_t left = static_cast<int64_t>(rows_.size()) - first(batch);
  return std::clamp<int64_t>(left, 0, stream_.shape_.batch_rows);
}

Tensor Reader::next() {
  const int64_t batch = next_++, rows = count(batch);
  BBB_ASSERT(rows > 0);
  const int32_t* const order = &rows_[static_cast<size_t>(first(batch))];
  if (stream_.tier() == Tier::Device) {
    BBB_ASSERT(order[rows - 1] == order[0] + rows - 1);
    return stream_.resident().rows(order[0], rows);
  }
  Ring::Slot& slot = ring_->slots_[batch % Ring::kAhead];
  const Tensor out = ring_->batch().rows(0, rows);
  backend_.transfers().follow(Lane::Compute, *slot.copied);
  backend_.copy(out, slot.tensor.rows(0, rows));
  slot.computed = backend_.transfers().mark(Lane::Compute);
  fetch(batch + Ring::kAhead);
  if (stream_.tier() == Tier::File) load(batch + 1);
  return out;
}

void Reader::fetch(int64_t batch) {
  if (stream_.tier() == Tier::Host) return load(batch);
  if (count(batch) == 0) return;
  Ring::Slot& slot = ring_->slots_[batch % Ring::kAhead];
  slot.copied->wait();  // until then the copy to the device reads the staging memory
  for (int64_t i = 0; i < count(batch); ++i)
    stream_.file_->submit(RowFile::Direction::Read, rows_[static_cast<size_t>(first(batch) + i)],
                          static_cast<char*>(slot.host->data()) + i * stream_.shape_.stride_bytes(),
                          *files_[batch % Ring::kAhead]);
}

void Reader::load(int64_t batch) {
  if (count(batch) == 0) return;
  Ring::Slot& slot = ring_->slots_[batch % Ring::kAhead];
  engine::Transfers& transfers = backend_.transfers();
  if (stream_.tier() == Tier::File) stream_.file_->wait(*files_[batch % Ring::kAhead]);
  transfers.follow(Lane::Load, *slot.computed);
  for (int64_t i = 0; i < count(batch); ++i)
    transfers.load(slot.tensor.rows(i, 1),
                   stream_.tier() == Tier::Host
                       ? stream_.host_row(rows_[static_cast<size_t>(first(batch) + i)])
                       : static_cast<char*>(slot.host->data()) + i * stream_.shape_.stride_bytes());
  slot.copied = transfers.mark(Lane::Load);
}

Writer::Writer(Backend& backend, Stream& stream, Ring* ring)
    : backend_(backend), stream_(stream), ring_(ring) {
  BBB_ASSERT(stream.tier() == Tier::Device || ring != nullptr);
  for (Slot& slot : slots_) slot.file = std::make_unique<FileBatch>();
}

Writer::~Writer() {
  if (stream_.file_)
    for (Slot& slot : slots_) stream_.file_->wait_done(*slot.file);
}

void Writer::write(int64_t row, const Tensor& batch) {
  const int64_t rows = batch.numel() / stream_.shape_.row_numel;
  if (stream_.tier() == Tier::Device)
    return backend_.copy(stream_.resident().rows(row, rows), batch);
  const int index = static_cast<int>(written_++ % Ring::kAhead);
  if (stream_.tier() == Tier::File) {
    // Submit the previous batch to the file while the device computes this one. Then wait for the
    // batch before that, whose staging memory is used next.
    flush((index + Ring::kAhead - 1) % Ring::kAhead);
    stream_.file_->wait(*slots_[index].file);
    slots_[index].row = row;
    slots_[index].count = rows;
  }
  Ring::Slot& slot = ring_->slots_[index];
  engine::Transfers& transfers = backend_.transfers();
  transfers.follow(Lane::Compute, *slot.copied);
  backend_.copy(slot.tensor.rows(0, rows), batch);
  slot.computed = transfers.mark(Lane::Compute);
  transfers.follow(Lane::Store, *slot.computed);
  for (int64_t i = 0; i < rows; ++i)
    transfers.store(stream_.tier() == Tier::Host
                        ? stream_.host_row(row + i)
                        : static_cast<char*>(slot.host->data()) + i * stream_.shape_.stride_bytes(),
                    slot.tensor.rows(i, 1));
  slot.copied = transfers.mark(Lane::Store);
}

void Writer::flush(int index) {
  Slot& slot = slots_[index];
  if (slot.count == 0) return;
  ring_->slots_[index].copied->wait();
  for (int64_t i = 0; i < slot.count; ++i)
    stream_.file_->submit(
        RowFile::Direction::Write, slot.row + i,
        static_cast<char*>(ring_->slots_[index].host->data()) + i * stream_.shape_.stride_bytes(),
        *slot.file);
  slot.count = 0;
}

void Writer::finish() {
  if (stream_.tier() == Tier::Device) return;
  if (stream_.tier() == Tier::Host) return backend_.transfers().mark(Lane::Store)->wait();
  for (int index = 0; index < Ring::kAhead; ++index) flush(index);
  for (Slot& slot : slots_) stream_.file_->wait(*slot.file);
}

}  // namespace bbb::train
