// Whether the binary holds kernels that the current GPU can run.
#pragma once

namespace bbb::cuda {

// Looks for one kernel, since all are built for the same architectures; launches nothing.
bool has_device_code();

}  // namespace bbb::cuda
