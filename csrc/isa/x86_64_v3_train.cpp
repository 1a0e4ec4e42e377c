// The training kernels of one instruction set level: this file only instantiates them. setup.py holds the level's compiler
// flags.
#define FASTBLOCKS_LEVEL x86_64_v3
#include "../kernels/train/all-inl.h"
