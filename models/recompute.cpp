#include "models/recompute.h"

#include "quant/check.h"

namespace bbb::models {

const char* to_string(Recompute recompute) {
  switch (recompute) {
    case Recompute::None:
      return "none";
    case Recompute::Attention:
      return "attention";
    case Recompute::Block:
      return "block";
  }
  BBB_ASSERT(false);
}

}  // namespace bbb::models
