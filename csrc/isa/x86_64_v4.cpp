// The kernels of one instruction set level: this file only instantiates them. setup.py holds the level's compiler flags.
#define FASTBLOCKS_LEVEL x86_64_v4
#include "../kernels/all-inl.h"

namespace fastblocks {
namespace x86_64_v4 {
KernelTable table() { return make_table("x86_64_v4"); }
}  // namespace x86_64_v4
}  // namespace fastblocks
