// Of CUDA's header, what pyloss uses: thread-block clusters along x.
#pragma once

#include "shim.h"

namespace cooperative_groups {

struct cluster_group {
  unsigned block_rank() const { return blockIdx.x % shim::cluster_size(); }
  unsigned num_blocks() const { return shim::cluster_size(); }
  void sync(const char* file = __builtin_FILE(), int line = __builtin_LINE()) const {
    if (!shim::skipped(file, line)) shim::sync_cluster();
  }
  template <class T>
  T* map_shared_rank(T* p, int rank) const {
    return static_cast<T*>(shim::map_shared(p, unsigned(rank)));
  }
};
inline cluster_group this_cluster() {
  return {};
}

}  // namespace cooperative_groups
