// Compiles a file of kernels once per instruction set, into the namespaces v4, v3 and base:
//
//   #define PYLOSS_KERNELS "cpu/gemm_kernels.h"
//   #include "cpu/per_instruction_set.h"
//
// The file has PYLOSS_VECTOR_BYTES, the width of a vector, and PYLOSS_TILE_ROWS, the height of a
// register tile: its rows times two vectors leave room in the registers for the two vectors and a
// factor. No include guard, neither here nor there. (target_clones would lower the vector types
// before the clones exist.) v4 and v3 exist with PYLOSS_HAS_TARGET_PRAGMA
// (common/compiler.h); which of the copies runs: cpu/instruction_set.h.
#if PYLOSS_HAS_TARGET_PRAGMA
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
namespace v4 {
#define PYLOSS_VECTOR_BYTES 64
#define PYLOSS_TILE_ROWS 14
#include PYLOSS_KERNELS
#undef PYLOSS_VECTOR_BYTES
#undef PYLOSS_TILE_ROWS
}  // namespace v4
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace v3 {
#define PYLOSS_VECTOR_BYTES 32
#define PYLOSS_TILE_ROWS 6
#include PYLOSS_KERNELS
#undef PYLOSS_VECTOR_BYTES
#undef PYLOSS_TILE_ROWS
}  // namespace v3
#pragma GCC pop_options
#endif

namespace base {
#define PYLOSS_VECTOR_BYTES 16
#define PYLOSS_TILE_ROWS 6
#include PYLOSS_KERNELS
#undef PYLOSS_VECTOR_BYTES
#undef PYLOSS_TILE_ROWS
}  // namespace base

#undef PYLOSS_KERNELS
