// Tells ThreadSanitizer about the threads of a kernel: which of them knows what of the others. In a
// program without it nothing happens. The sanitizer has a clock for every fiber and one for every
// address that was named to it: the latter are the clocks here.
#pragma once

#include <cstddef>

namespace shim::race {

using Clock = void*;

bool on();
void start();          // by the host, once
Clock new_clock();     // which knows nothing
void forget_clocks();  // all of them: their addresses are used again

// From here on the running code is that of another fiber.
void* current();
void become(void* fiber);

// One of the fibers that all launches share, of which `of` take turns.
struct Pool {
  void* fiber(size_t i, const char* name);
  void drop(size_t i);                   // it will never be resumed
  static constexpr size_t kMost = 7168;  // the library of gcc 12 knows 8128
  void* fibers[kMost];
};

void publish(Clock);  // what the running fiber knows is added to what the clock knows
void learn(Clock);    // and the other way round
// Adds what `from` knows to `to`; the running fiber learns nothing by it, nor does it give away
// what it knows: `host` stands in, the fiber of the system thread that runs.
void pass_on(Clock from, Clock to, void* host);

// Nothing has happened yet to this memory.
void forget(void* begin, size_t bytes);
// As if the running fiber had written all of it.
void overwrite(void* begin, size_t bytes);

}  // namespace shim::race
