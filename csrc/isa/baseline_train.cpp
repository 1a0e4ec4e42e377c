// The training kernels of one instruction set level: this file only instantiates them. setup.py holds the level's compiler
// flags.
#define FASTBLOCKS_LEVEL baseline
#include "../kernels/train/all-inl.h"
