// Soft rank and soft sort by projection onto the permutahedron, on the GPU.
#pragma once

#include "common/permutahedron.h"

namespace pyloss {
namespace cuda {

int64_t permutahedron_scratch_bytes(const permutahedron::Problem& p);

// Rows are sorted by the caller: descending for ranks, ascending to sort, NaN as torch.sort has it.
void permutahedron_forward(const permutahedron::Problem& p,
                           const void* sorted,    // [rows][n]
                           const int64_t* order,  // [rows][n], elements in that order
                           void* y,               // [rows][n]
                           int32_t* packed,       // [rows][n], see common/permutahedron.h
                           void* scratch, int64_t scratch_bytes, void* stream);

void permutahedron_backward(const permutahedron::Problem& p,
                            const void* g,          // [rows][n]
                            const void* x,          // [rows][n]; kl only
                            const int32_t* packed,  // [rows][n]
                            void* dx,               // [rows][n]
                            void* stream);

}  // namespace cuda
}  // namespace pyloss
