// Whether the binary holds kernels that the current GPU can run.
#pragma once

namespace bbb::cuda {

// Queries one kernel, since all are built for the same architectures. Launches nothing.
bool has_device_code();

}  // namespace bbb::cuda
