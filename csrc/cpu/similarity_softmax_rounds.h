// Pairs of blocks of rows, in rounds in which no block occurs twice: the tasks of a round may add
// to what belongs to their two blocks without any lock, and every block adds up its terms in the
// order of the rounds, whatever the number of threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/tasks.h"

namespace pyloss::cpu {

// All pairs of one of `rows` blocks with one of `columns` blocks. Of a set with itself all pairs
// I <= J of its `rows` blocks, by the circle method of round-robin tournaments; pairs (I, I) first.
struct Rounds {
  int64_t rows, columns;
  bool itself;

  int64_t even() const { return rows + rows % 2; }  // the last one without a partner
  int64_t count() const { return itself ? (rows > 1 ? even() : 1) : std::max(rows, columns); }
  int64_t pairs(int64_t round) const {
    if (!itself) return std::min(rows, columns);
    return round == 0 ? rows : even() / 2;
  }
  // False: this place of the round is empty.
  bool pair(int64_t round, int64_t at, int64_t* i, int64_t* j) const {
    if (!itself) {
      const int64_t other = (at + round) % std::max(rows, columns);
      *i = rows <= columns ? at : other;
      *j = rows <= columns ? other : at;
      return true;
    }
    if (round == 0) {
      *i = *j = at;
      return true;
    }
    const int64_t around = even() - 1, r = round - 1;
    *i = at == 0 ? around : (r + at) % around;
    *j = at == 0 ? r : (r - at + around) % around;
    if (*i > *j) std::swap(*i, *j);
    return *j < rows;
  }
};

// fn(slot, i, j) for all pairs.
template <class Fn>
void run_rounds(const Rounds& rounds, int64_t slots, Fn&& fn) {
  for (int64_t round = 0; round < rounds.count(); ++round) {
    const int64_t pairs = rounds.pairs(round);
    run_tasks(pairs, slots_for(pairs, static_cast<int>(slots)), [&](int64_t slot, int64_t at) {
      int64_t i, j;
      if (rounds.pair(round, at, &i, &j)) fn(slot, i, j);
    });
  }
}
// The same where nothing belongs to the columns: a task is a row of blocks.
template <class Fn>
void run_rows(const Rounds& rounds, int64_t slots, Fn&& fn) {
  run_tasks(rounds.rows, slots_for(rounds.rows, static_cast<int>(slots)),
            [&](int64_t slot, int64_t i) {
              for (int64_t j = 0; j < rounds.columns; ++j) fn(slot, i, j);
            });
}
// `columns`: whether something belongs to them. Of a set with itself it always does.
template <class Fn>
void run_pairs(const Rounds& rounds, int64_t slots, bool columns, Fn&& fn) {
  if (rounds.itself || columns) {
    run_rounds(rounds, slots, fn);
  } else {
    run_rows(rounds, slots, fn);
  }
}

}  // namespace pyloss::cpu
