// Soft rank and soft sort by projection onto the permutahedron, rows of float or double.
#pragma once

#include "common/permutahedron.h"

namespace pyloss {
namespace cpu {

void permutahedron_forward(const permutahedron::Problem& p,
                           const void* x,    // [rows][n]
                           void* y,          // [rows][n]
                           int32_t* packed,  // [rows][n], see common/permutahedron.h
                           int threads);

void permutahedron_backward(const permutahedron::Problem& p,
                            const void* g,          // [rows][n]
                            const void* x,          // [rows][n]; kl only
                            const int32_t* packed,  // [rows][n]
                            void* dx,               // [rows][n]
                            int threads);

}  // namespace cpu
}  // namespace pyloss
