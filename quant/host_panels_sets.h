// panel_gemv on each instruction set, defined in a file of its own. Only on x86-64.
#pragma once

#include "quant/host_panels.h"

namespace bbb::quant::host {

void panel_gemv_avx2(float* y, const SplitRows& x, const PanelView& w, const float* addend,
                     Rows panels);
void panel_gemv_avx512(float* y, const SplitRows& x, const PanelView& w, const float* addend,
                       Rows panels);

}  // namespace bbb::quant::host
