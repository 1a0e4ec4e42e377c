// The kernels of one instruction set level: this file only instantiates them. setup.py holds the level's compiler flags.
#define FASTBLOCKS_LEVEL x86_64_v3
#include "../kernels/all-inl.h"

namespace fastblocks {
namespace x86_64_v3 {
KernelTable table() { return make_table("x86_64_v3"); }
}  // namespace x86_64_v3
}  // namespace fastblocks
