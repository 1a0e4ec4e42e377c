// The kernels of one instruction set level: this file only instantiates them. setup.py holds the level's compiler flags.
#define FASTBLOCKS_LEVEL baseline
#include "../kernels/all-inl.h"

namespace fastblocks {
namespace baseline {
KernelTable table() { return make_table("baseline"); }
}  // namespace baseline
}  // namespace fastblocks
